"""What each process does, by name. Importing this imports every part."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from gpu_parts import smoke, speed, suite
from gpu_parts.job import Job


def machine(job: Job) -> int:
    """Says in a line what is here; exit status 1 without a GPU."""
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    if job.dry:
        job.say(f"dry run: {versions}, interpreted")
        return 0
    if not torch.cuda.is_available():
        job.say("torch finds no CUDA GPU here; scripts/gpu --dry-run needs none")
        return 1
    properties = torch.cuda.get_device_properties(0)
    memory, level = properties.total_memory >> 30, f"{properties.major}.{properties.minor}"
    job.say(f"{properties.name}, {memory} GiB, compute capability {level}, {versions}")
    return 0


JOBS: dict[str, Callable[[Job], int]] = {
    "machine": machine,
    **dict.fromkeys(("smoke-float32", "smoke-bfloat16", "smoke-int8", "smoke-int4"), smoke.smoke),
    "tests": suite.suite,
    "kernels": speed.kernels,
    **dict.fromkeys(("7b", "70b", "patched", "mixed"), speed.throughput),
    **dict.fromkeys(("warm-7b", "warm-70b"), speed.warm),
    "memcheck": smoke.memcheck,
}

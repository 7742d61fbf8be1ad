"""What is measured: kernels, and the shapes of LLaMA 2 with random weights, by the functions behind `sleb bench`."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu_parts.job import Job
from gpu_parts.smoke import patched, shape
from sleb.benchmarks.kernel_options import KernelsOptions
from sleb.benchmarks.kernels import run_kernels
from sleb.benchmarks.record import Result
from sleb.benchmarks.throughput import ThroughputBench, run_throughput
from sleb.benchmarks.workloads import ThroughputOptions, stand_in_map
from sleb.engine.model.architecture import resolve_spec
from sleb.models.shapes import shape_folder

# Bytes of a GPU for a shape in bfloat16 and in int8: weights (of 70B 64 blocks: 104 GiB, 52), KV of 64 × 192 tokens,
# and what steps take.
_MEMORY = {"llama-2-7b": (21 << 30, 14 << 30), "llama-2-70b": (125 << 30, 64 << 30)}
_TURNS_SHARE = 0.6  # of a job's time that turns may take: the rest is loading, compiling, capturing
# What matters most first: should the time be over, the last are missing.
_KERNELS = (
    *("decode_attention", "linear", "linear_activate", "linear_add", "linear_rope_store", "sample"),
    *("greedy", "prefill_attention", "add_norm", "rope_store"),
)
_ALL: dict[str, Any] = {
    "config": "llama-2-7b",
    "batches": (64,),
    "dtype": "bfloat16",
    "kernels": "triton",
    "seed": 0,
}
_JOBS: dict[str, dict[str, Any]] = {
    "7b": {"depths": (0, 7), "batches": (1, 64), "tests": ("decode", "generate", "prompt"), "mixed": False},
    "70b": {
        "config": "llama-2-70b",
        "depths": (16,),
        "tests": ("generate", "decode", "prompt"),
        "control": False,
    },
    "patched": {"depths": (0, 7), "tests": ("decode",), "control": False},
    "mixed": {"depths": (0, 2, 4, 7), "tests": ("generate",), "control": False},
}
# Of a dry run.
_TINY = {
    "config": None,
    "load_format": "dummy",
    "dtype": "float32",
    "batches": (3,),
    "prompt_tokens": (5,),
    "output_tokens": (3,),
    "repetitions": 1,
    "max_repetitions": 1,
    "control": False,
}
_TINY_DEPTHS = {"7b": (0, 1), "70b": (1,), "patched": (0, 2), "mixed": (0, 1, 2)}


class TooLargeError(Exception):
    """No format of the shape fits the GPU."""


def fitting_weights(config: str, memory: int) -> str:
    """The format of a shape's weights for a GPU of so many bytes. Raises TooLargeError, saying what it takes."""
    whole, int8 = _MEMORY[config]
    if memory < int8:
        raise TooLargeError(
            f"left out: {config} in int8 takes a GPU of {int8 >> 30} GiB, this has {memory >> 30}"
        )
    return "auto" if memory >= whole else "int8"


def _options(job: Job, name: str, folder: str) -> ThroughputOptions:
    wanted = _ALL | {"device": job.device, "time_budget": _TURNS_SHARE * job.left} | _JOBS[name]
    config = wanted["config"]
    if job.dry:
        wanted |= _TINY | {"model": str(shape(folder, 4, config, tiny=True)), "depths": _TINY_DEPTHS[name]}
    else:
        wanted["weights"] = fitting_weights(config, torch.cuda.get_device_properties(0).total_memory)
    if job.dry or name == "patched":
        spec = resolve_spec(Path(wanted.get("model") or shape_folder(config)))
        layer_map = stand_in_map(config, spec.num_blocks, spec.fingerprint)
        if name == "patched":
            served = replace(layer_map, depth=0, removed=layer_map.removed[: max(wanted["depths"])])
            layer_map = patched(served, spec.hidden_size)
        wanted["layer_map"] = layer_map
    return ThroughputOptions(**wanted)


def throughput(job: Job) -> int:
    """Depths in turns, written after every turn; exit status 1 if it was cut short. Raises TooLargeError."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_throughput(
            *(_options(job, job.name, folder), job.command),
            on_turn=lambda turns, case: job.say(turns.line(case)),
            on_result=job.write,
        )
    job.write(result)
    return int(not result.complete)


def warm(job: Job) -> int:
    """Compiles what serving a shape at these sizes runs, ahead of what measures it. Raises TooLargeError."""
    with tempfile.TemporaryDirectory() as folder:
        options = _options(job, job.name.removeprefix("warm-"), folder)
        if options.config is not None:  # a few blocks have the shapes of all
            few = shape(folder, 4, options.config, tiny=False)
            options = replace(options, model=str(few), config=None, load_format="dummy", depths=(0,))
        ThroughputBench(options)
    return 0


def kernels(job: Job) -> int:
    """Operator after operator, written after every case; exit status 1 if one of Triton's fails or is wrong."""
    before = Result("kernels", {})

    def joined(found: Result, last: bool) -> Result:
        notes = list(dict.fromkeys([*before.notes, *found.notes]))
        together = [*before.measurements, *found.measurements]
        return replace(found, measurements=together, notes=notes, complete=found.complete and last)

    def write(found: Result) -> None:
        job.write(joined(found, False))

    for place, op in enumerate(_KERNELS):
        budget = _TURNS_SHARE * job.left / (len(_KERNELS) - place)
        turns = 1 if job.dry else 7
        options = KernelsOptions(ops=(op,), device=job.device, time_budget=budget, repetitions=turns)
        found = run_kernels(options, job.command, on_case=job.say, on_result=write)
        before = joined(found, op == _KERNELS[-1])
        job.write(before)
        if not found.complete:
            break
    wrong = [each for each in before.notes if each.startswith("WRONG")]
    lost = [each for each in before.measurements if each.value is None and each.subject == "triton"]
    for line in [*wrong, *(f"{each.case}: {each.facts['failed']}" for each in lost)]:
        job.say(line)
    return int(bool(wrong or lost) or not before.complete)

"""What a measurement was made on and with: enough to judge and repeat it, nothing that names a person or machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sleb import version

if TYPE_CHECKING:
    from sleb.engine.engine import Engine

_BARE_WORD = re.compile(r"[\w@%+=:,./\-\u0080-\U0010ffff]+")
# What decides which CPU kernels can run: x86 names first, then those of ARM.
_CPU_FLAGS = (
    *(
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    ),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)


def describe_environment(engine: Engine, command: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware and settings of a measurement with `engine`, ready for JSON; see `describe_machine`."""
    runner = engine.runner
    return describe_machine(runner.device, runner.dtype, runner.executor.name, command)


def describe_machine(
    device: torch.device, dtype: torch.dtype, kernels: str, command: Sequence[str]
) -> dict[str, Any]:
    """Versions, hardware and settings of a measurement on `device`, ready for JSON.

    command: as `shown_command` gives it, recorded as `command_line` has it. memory_bytes is the machine's physical
    memory; what cannot be found out is null. Neither host nor user names nor paths are recorded.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sleb": version.__version__,
        "commit": source_commit(Path(version.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _package_version("transformers"),
        "triton": _package_version("triton"),
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "load_average": _load_average(),
        "memory_bytes": _memory_bytes(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels,
        "command": command_line(command),
    }


def command_line(words: Sequence[str]) -> str:
    """The words as a shell takes them: as `shlex.join`, which would also quote what is beyond ASCII."""
    return " ".join(word if _BARE_WORD.fullmatch(word) else shlex.quote(word) for word in words)


def shown_command(arguments: Sequence[str], model: str) -> list[str]:
    """The command line without the machine's paths: each is cut to its last component.

    arguments: program first. `model` stays whole where it is a hub id, which looks like a path but is none.
    """
    public = {model} if not Path(model).expanduser().exists() else set()
    return [argument if argument in public else _cut_path(argument) for argument in arguments]


def _cut_path(argument: str) -> str:
    option, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + (Path(value).name or value)


def source_commit(root: Path) -> str | None:
    """Commit of the checkout whose top folder is `root`, "-dirty" appended if it was edited; None elsewhere.

    An installed package may lie inside the checkout of another project, whose commit would say nothing.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str | None:
    """The processor's name as the system gives it."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string")
    return _cpuinfo().get("model name") or platform.processor() or None


def cpu_flags() -> list[str]:
    """Those instruction sets of the processor that matter here; empty where the system does not list them."""
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in _CPU_FLAGS if flag in present]


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _usable_cores() -> int | None:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _load_average() -> float | None:
    """Processes that wanted a processor in the last minute, on average: other load makes a measurement noisy."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

"""What a measurement was made on and with, and what the machine was like meanwhile.

Nothing that names a person or machine. Meanwhile: what share of the processors others took, and, by a small computation
before every turn (a virtual machine often tells a constant frequency), whether the clock was steady.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from sleb import version

if TYPE_CHECKING:
    from sleb.engine.engine import Engine

PROC = Path("/proc")
# What decides which CPU kernels can run: x86 names, then Arm's.
_CPU_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimddp", "bf16", "i8mm",
)  # fmt: skip
# What others may take before it is told, as a share of all processors; a few ticks may land on the wrong side.
_OTHERS_LIMIT, _TICK_GRACE = 0.03, 3
_DRIFT_LIMIT = 0.05  # above it is told; the turns that subjects take make up for less


def describe_environment(engine: Engine, command: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware and settings of a measurement with `engine`, ready for JSON; see `describe_machine`."""
    runner, executor = engine.runner, engine.runner.executor
    return describe_machine(runner.device, runner.dtype, executor.kernels, command) | {
        "executor": executor.name,
        "instruction_set": executor.instruction_set,
        "attention": executor.attention,
    }


def describe_machine(
    device: torch.device, dtype: torch.dtype, kernels: str, command: Sequence[str]
) -> dict[str, Any]:
    """Versions, hardware and settings of a measurement on `device`, ready for JSON; null is what cannot be found out.

    command: as `shown_command` gives it. Neither host nor user names nor paths are recorded.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "sleb": version.__version__,
        "commit": source_commit(Path(version.__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        **_processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "kernels": kernels,
        "command": shlex.join(command),
    }


def shown_command(arguments: Sequence[str], model: str = "") -> list[str]:
    """The command line without the machine's paths: each is cut to its last component.

    arguments: program first. `model` stays whole where it is a hub id, which looks like a path but is none.
    """
    shown = []
    for argument in arguments:
        flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
        is_id = argument == model and not Path(model).expanduser().exists()
        shown.append(argument if is_id else flag + equals + (Path(value).name or value))
    return shown


def source_commit(root: Path) -> str | None:
    """Commit of the checkout whose top folder is `root`, "-dirty" appended if it was edited; None elsewhere.

    An installed package may lie inside the checkout of another project, whose commit would say nothing.
    """
    git = ("git", "-C", str(root))
    top, _, commit = (_output(*git, "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    if not commit or Path(top).resolve() != root.resolve():
        return None
    return f"{commit}-dirty" if _output(*git, "status", "--porcelain", "--untracked-files=no") else commit


def _output(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> dict[str, Any]:
    """The processor's name and those of its instruction sets that matter here, as far as the system tells them."""
    if platform.system() == "Darwin":
        return {"cpu": _output("sysctl", "-n", "machdep.cpu.brand_string"), "cpu_flags": []}
    info: dict[str, str] = {}
    with suppress(OSError):
        lines = (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    present = (info.get("flags") or info.get("Features") or "").split()
    name = info.get("model name") or platform.processor() or None
    return {"cpu": name, "cpu_flags": [flag for flag in _CPU_FLAGS if flag in present]}


def processes_under(roots: Iterable[int], proc: Path = PROC) -> dict[int, int]:
    """The processes `roots` and all that descend from them: clock ticks of each, its ended children's included.

    Linux only; empty elsewhere.
    """
    parents, ticks = {}, {}
    for folder in proc.glob("[0-9]*"):
        try:  # the second field, the name, may hold spaces and brackets
            fields = (folder / "stat").read_text().rsplit(") ", 1)[1].split()
            parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), sum(map(int, fields[11:15]))
        except (OSError, IndexError, ValueError):  # it has ended meanwhile
            continue
    tree, found = set[int](), set(roots)
    while found:
        tree |= found
        found = {pid for pid, parent in parents.items() if parent in found and pid not in tree}
    return {pid: ticks[pid] for pid in tree if pid in ticks}


def peak_memory(root: int, proc: Path = PROC) -> int:
    """Bytes that a process and its descendants had resident at most, summed: what two of them share counts twice."""
    total = 0
    for pid in processes_under([root], proc):
        with suppress(OSError):
            lines = (proc / str(pid) / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


class Conditions:
    """What the machine was like during turns: the watch of `turns.measure`.

    roots: processes that, with their descendants and this one's, are not others. What a hypervisor took is theirs.
    """

    def __init__(
        self,
        roots: Callable[[], Iterable[int]] = lambda: (),
        look: Callable[[], float] | None = None,
        proc: Path = PROC,
    ) -> None:
        self._roots, self._proc, self._pace = roots, proc, look or pace
        self._paces, self._shares = list[float](), list[float]()
        self._num_disturbed = 0

    def begin_turn(self) -> None:
        """Looks at the clock."""
        self._paces.append(self._pace())

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around one run: what others take meanwhile."""
        before = self._ticks()
        yield
        busy, total, own = (now - then for now, then in zip(self._ticks(), before, strict=True))
        if total > 0:  # known, and not over before a tick of the clock
            others = max(0, busy - own)
            self._shares.append(others / total)
            self._num_disturbed += others > _OTHERS_LIMIT * total + _TICK_GRACE

    def _ticks(self) -> tuple[int, int, int]:
        """Clock ticks of all processors since the start of the machine, 0 if unknown: busy ones, all, our own."""
        try:
            # user nice system idle iowait irq softirq steal; guest time, which follows, is in user already
            first = (self._proc / "stat").read_text().split("\n", 1)[0]
        except OSError:
            return 0, 0, 0
        fields = [int(value) for value in first.split()[1:9]]
        own = processes_under([os.getpid(), *self._roots()], self._proc)
        return sum(fields) - fields[3] - fields[4], sum(fields), sum(own.values())

    def summary(self) -> dict[str, Any]:
        """For the environment of a result: what others took of the processors, and how far the clock moved."""
        shares = self._shares
        return {
            "others_share": {"median": median(shares), "high": max(shares)} if shares else None,
            "disturbed_runs": self._num_disturbed,
            "pace_drift": drift(self._paces),
        }

    def notes(self) -> list[str]:
        """What a reader of the figures must know of it."""
        notes = []
        if (moved := drift(self._paces) or 0.0) > _DRIFT_LIMIT:
            notes.append(
                f"The machine's pace changed by {moved:.0%} during the run: ratios, which are of one turn, suffer less "
                "than tokens/s."
            )
        if self._num_disturbed:
            notes.append(
                f"Other processes took up to {max(self._shares):.0%} of the processors in {self._num_disturbed} of "
                f"{len(self._shares)} runs (on a virtual machine it may be the hypervisor). Measure when it is idle."
            )
        return notes


def drift(looks: Sequence[float]) -> float | None:
    """(highest − lowest) / median of a clock's looks in the order of time; None of fewer than two.

    Of four and more, highest and lowest are of medians of three neighbours: one interrupted look is no drift.
    """
    if len(looks) < 2:
        return None
    smooth = [median(looks[place - 1 : place + 2]) for place in range(1, len(looks) - 1)]
    ends = smooth if len(looks) > 3 else looks
    return (max(ends) - min(ends)) / median(looks)


def pace() -> float:
    """How often a second this thread hashes 2 MiB, the best of three; about 1.5 ms."""
    piece, seconds = bytes(16 << 10), []
    for _ in range(3):
        started, digest = time.perf_counter(), hashlib.sha256()
        for _ in range(128):
            digest.update(piece)
        seconds.append(time.perf_counter() - started)
    return 1 / max(min(seconds), 1e-9)

"""Whether this machine is idle, and what share of its processors others took while something was measured.

Linux only: it reads /proc. Elsewhere nothing is waited for and the share is None.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

Result = TypeVar("Result")

PROC = Path("/proc")
# Clock ticks are counted where they fall: over a short run this many may land on the wrong side.
_TICK_GRACE = 3


@dataclass(frozen=True)
class CpuTicks:
    """Clock ticks of all processors since the start of the machine."""

    busy: int
    total: int

    @classmethod
    def parse(cls, text: str) -> CpuTicks:
        """From /proc/stat. Waiting for a disk counts as idle, time that the hypervisor took as busy."""
        # user nice system idle iowait irq softirq steal; guest time, which follows, is in user already
        fields = [int(value) for value in text.split("\n", 1)[0].split()[1:9]]
        total = sum(fields)
        return cls(total - fields[3] - fields[4], total)


@dataclass(frozen=True)
class ProcessTicks:
    """One process: its parent, its own clock ticks, and those of its children that have ended."""

    parent: int
    own: int
    ended_children: int

    @classmethod
    def parse(cls, text: str) -> ProcessTicks:
        """From /proc/PID/stat, whose second field, the name, may hold spaces and brackets."""
        fields = text.rsplit(") ", 1)[1].split()
        return cls(int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14]))


def read_cpu_ticks(proc: Path = PROC) -> CpuTicks | None:
    """None where the system has no /proc/stat."""
    try:
        return CpuTicks.parse((proc / "stat").read_text())
    except OSError:
        return None


def read_processes(proc: Path = PROC, pids: Iterable[int] | None = None) -> dict[int, ProcessTicks]:
    """The processes `pids`, or every one there is."""
    processes = {}
    for folder in proc.glob("[0-9]*") if pids is None else (proc / str(pid) for pid in pids):
        try:
            processes[int(folder.name)] = ProcessTicks.parse((folder / "stat").read_text())
        except (OSError, IndexError, ValueError):  # it has ended meanwhile
            continue
    return processes


def process_tree(processes: dict[int, ProcessTicks], root: int) -> set[int]:
    """`root` and all that descend from it."""
    tree = {root}
    while True:
        found = {pid for pid, ticks in processes.items() if ticks.parent in tree and pid not in tree}
        if not found:
            return tree
        tree |= found


def own_ticks(processes: dict[int, ProcessTicks], pid: int, roots: Iterable[int]) -> int:
    """Ticks of process `pid` and of those of its children that have ended, and of the trees of `roots`."""
    counted = {pid}.union(*(process_tree(processes, root) for root in roots))
    return sum(ticks.own + ticks.ended_children for number, ticks in processes.items() if number in counted)


class OthersWatch:
    """Between __enter__ and __exit__: the share of all processors that went to others.

    roots: processes that, with their descendants, are not others; nor is this process. What the hypervisor took counts
    as theirs. share: 0 to 1, of the ticks that passed, num_others of num_ticks; None if it cannot be told, as where no
    tick passed. disturbed: whether it is above `limit` by more than the grain of the clock.
    """

    def __init__(self, roots: Iterable[int], limit: float, proc: Path = PROC) -> None:
        self._roots, self._limit, self._proc = tuple(roots), limit, proc
        self.share: float | None = None
        self.disturbed = False
        self.num_others = self.num_ticks = 0

    def __enter__(self) -> OthersWatch:
        self._before = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, after = self._before, self._read()
        if before is None or after is None:
            return
        total = after[0].total - before[0].total
        if total <= 0:  # over before a tick of the clock: nobody knows
            return
        others = max(0, after[0].busy - before[0].busy - (after[1] - before[1]))
        self.num_others, self.num_ticks = others, total
        self.share = others / total
        self.disturbed = others > self._limit * total + _TICK_GRACE

    def _read(self) -> tuple[CpuTicks, int] | None:
        ticks = read_cpu_ticks(self._proc)
        if ticks is None:
            return None
        # Without roots nobody's ancestry matters, so there is no need to look at every process.
        processes = read_processes(self._proc, None if self._roots else [os.getpid()])
        return ticks, own_ticks(processes, os.getpid(), self._roots)


def wait_until_idle(
    limit_seconds: float,
    threshold: float = 0.03,
    window: float = 0.5,
    *,
    read: Callable[[], CpuTicks | None] = read_cpu_ticks,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Waits until all processors together are busy for no more than `threshold` of a window; False: it gave up."""
    for _ in range(max(1, round(limit_seconds / window))):
        before = read()
        sleep(window)
        after = read()
        if before is None or after is None:
            return True
        if (after.busy - before.busy) / max(1, after.total - before.total) <= threshold:
            return True
    return False


@dataclass(frozen=True)
class QuietPolicy:
    """Before a run, wait up to wait_seconds for an idle machine; make it anew, up to `retries` times, when others
    took more than `limit` of the processors during it."""

    wait_seconds: float = 60.0
    limit: float = 0.03
    retries: int = 3


@dataclass(frozen=True)
class QuietRun(Generic[Result]):
    """The least disturbed of `attempts` runs. others_share: see OthersWatch."""

    result: Result
    others_share: float | None
    disturbed: bool
    attempts: int


def run_quietly(
    action: Callable[[], Result], roots: Iterable[int], policy: QuietPolicy, proc: Path = PROC
) -> QuietRun[Result]:
    """Runs `action`, which times itself, as `policy` says; roots: the processes that work for it."""
    best: QuietRun[Result] | None = None
    for attempt in range(1, policy.retries + 2):
        if policy.wait_seconds:
            wait_until_idle(policy.wait_seconds, policy.limit, read=lambda: read_cpu_ticks(proc))
        with OthersWatch(roots, policy.limit, proc) as watch:
            result = action()
        run = QuietRun(result, watch.share, watch.disturbed, attempt)
        if best is None or (run.others_share or 0.0) < (best.others_share or 0.0):
            best = run
        if not run.disturbed:
            return run
    assert best is not None
    return replace(best, attempts=policy.retries + 1)


def peak_memory(root: int, proc: Path = PROC) -> dict[str, int]:
    """Of a process and its descendants, in bytes: peak resident sets summed, and what they share counted once now.

    peak_rss (VmHWM) counts a page that two of them share twice; pss (of this moment) shares it out.
    """
    total = {"peak_rss": 0, "pss": 0, "processes": 0}
    for pid in process_tree(read_processes(proc), root):
        try:
            total["peak_rss"] += _kibibytes((proc / str(pid) / "status").read_text(), "VmHWM:")
            total["pss"] += _kibibytes((proc / str(pid) / "smaps_rollup").read_text(), "Pss:")
        except OSError:
            continue
        total["processes"] += 1
    return total


def _kibibytes(text: str, name: str) -> int:
    """The bytes of a line such as "VmHWM:   123 kB"; 0 without one."""
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0

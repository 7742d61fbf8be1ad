"""What the machine was like while something was measured: what others took of the processors, and how fast these ran.

A clock frequency is read where the system tells one that moves. Virtual machines often tell a constant, whatever the
processor does, so there is a pace besides: a small computation that is always the same, in the first cache and on one
thread, timed before every repetition. All of it happens outside what is timed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sleb.benchmarks.idle import PROC, OthersWatch, QuietPolicy

CPUFREQ = Path("/sys/devices/system/cpu")
# The pace is the best of so many pieces of about this many seconds: one that others interrupt does not count.
_PIECES = 3
_PIECE_SECONDS = 0.0015
_PIECE_BYTES = bytes(16 << 10)  # half of a first cache
# A clock that moves by less than this share is a constant.
_CONSTANT = 0.001
# So many looks are two medians of three.
_LEAST_SMOOTHED = 4
# A drift above this share is told; the turns that variants take make up for less.
DRIFT_LIMIT = 0.05
# What others may take before it is told, as a share of all processors.
OTHERS_LIMIT = QuietPolicy.limit


def _hash(rounds: int) -> None:
    digest = hashlib.sha256()
    for _ in range(rounds):
        digest.update(_PIECE_BYTES)


class Pace:
    """How fast this thread computes now: a fixed piece of work, whose size the first look settles."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._rounds = 8
        while self._best_seconds() < _PIECE_SECONDS and self._rounds < 1 << 20:
            self._rounds *= 2

    def measure(self) -> float:
        """Pieces of work a second."""
        return 1 / self._best_seconds()

    def _best_seconds(self) -> float:
        return min(self._seconds() for _ in range(_PIECES))

    def _seconds(self) -> float:
        started = self._clock()
        _hash(self._rounds)
        return max(self._clock() - started, 1e-9)


def read_megahertz(proc: Path = PROC, cpufreq: Path = CPUFREQ) -> float | None:
    """The clock of the fastest processor just now, the one that has just worked; None where the system tells none."""
    found = []
    for path in cpufreq.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        try:
            found.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):
            continue
    if found:
        return max(found)
    try:
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return max((float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")), default=None)
    except (OSError, ValueError, IndexError):
        return None


def read_card_megahertz(device: torch.device) -> float | None:
    """The clock of a card's multiprocessors; None on a CPU, or where torch lacks the package that reads it."""
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.clock_rate(device))
    except (
        Exception
    ):  # nvidia-ml-py may be missing, or the driver may refuse: no measurement should end by it
        return None


@dataclass
class RepetitionConditions:
    """What one repetition met.

    Attributes:
        pace: pieces of work a second before it. megahertz: of the processor then; card_megahertz: of the card.
        others_share: of all processors, over its runs; None where it cannot be told.
        run_shares: of each run that took a tick of the clock, in their order. num_disturbed: of them with more than
            `OTHERS_LIMIT`.
    """

    workload: str
    repetition: int
    pace: float
    megahertz: float | None
    card_megahertz: float | None
    others_share: float | None
    run_shares: list[float]
    num_disturbed: int = 0


class ConditionsWatch:
    """Follows `harness.measure` as its watch; `summary` is what a result holds."""

    def __init__(self, device: torch.device, pace: Pace | None = None, proc: Path = PROC) -> None:
        self._device, self._proc = device, proc
        self._pace = pace or Pace()
        self._ticks = (0, 0)
        self._disturbed_shares: list[float] = []
        self.repetitions: list[RepetitionConditions] = []

    def begin_repetition(self, workload: str, repetition: int) -> None:
        """Looks at the clocks."""
        pace = self._pace.measure()
        self._ticks = (0, 0)
        self.repetitions.append(
            RepetitionConditions(
                workload,
                repetition,
                pace,
                read_megahertz(self._proc),
                read_card_megahertz(self._device),
                None,
                [],
            )
        )

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around one run: what others take meanwhile."""
        with OthersWatch((), OTHERS_LIMIT, self._proc) as watch:
            yield
        now = self.repetitions[-1]
        if watch.share is None:
            return
        now.run_shares.append(watch.share)
        self._ticks = (self._ticks[0] + watch.num_others, self._ticks[1] + watch.num_ticks)
        now.others_share = self._ticks[0] / self._ticks[1]
        if watch.disturbed:
            now.num_disturbed += 1
            self._disturbed_shares.append(watch.share)

    def summary(self) -> dict[str, Any]:
        """The object "conditions" of a result: notices, others_share, clock, and every repetition's own."""
        shares = [each.others_share for each in self.repetitions if each.others_share is not None]
        clocks = self._clocks()
        return {
            "notices": [
                *self._others_notices(),
                *(notice for clock in clocks for notice in clock_notices(clock)),
            ],
            "others_share": {"median": median(shares), "high": max(shares)} if shares else None,
            "clock": clocks[0] if clocks else None,
            "repetitions": [asdict(each) for each in self.repetitions],
        }

    def _others_notices(self) -> list[str]:
        if not self._disturbed_shares:
            return []
        num_runs = sum(len(each.run_shares) for each in self.repetitions)
        return [
            f"Other processes took up to {max(self._disturbed_shares):.0%} of the processors in "
            f"{len(self._disturbed_shares)} of {num_runs} runs. End them, or measure when the machine is idle. On a "
            "virtual machine it may be the hypervisor, at work for others."
        ]

    def _clocks(self) -> list[dict[str, Any]]:
        """Those that are known, the one first that says most; none of a single look, which shows no change."""
        paces = [each.pace for each in self.repetitions]
        if len(paces) < 2:
            return []
        middle = median(paces)
        clocks = [describe_clock("relative", [pace / middle for pace in paces], "processor")]
        for part, values in (
            ("processor", [each.megahertz for each in self.repetitions]),
            ("card", [each.card_megahertz for each in self.repetitions]),
        ):
            told = [value for value in values if value is not None]
            if len(told) == len(values) and max(told) > min(told) * (1 + _CONSTANT):
                clocks.insert(0, describe_clock("MHz", told, part))
        return clocks


def describe_clock(unit: str, values: Sequence[float], part: str) -> dict[str, Any]:
    """Median, low, high and drift of a clock, in the order of time. drift: (high − low) / median.

    low and high are of medians of three neighbours: a single look that something interrupted is no drift. Fewer than
    four looks have one such median at most, so theirs are the least and the greatest look.
    """
    smooth = [median(values[place - 1 : place + 2]) for place in range(1, len(values) - 1)]
    if len(values) < _LEAST_SMOOTHED:
        smooth = list(values)
    low, high, middle = min(smooth), max(smooth), median(values)
    drift = (high - low) / middle
    return {"unit": unit, "of": part, "median": middle, "low": low, "high": high, "drift": drift}


def clock_notices(clock: Mapping[str, Any]) -> list[str]:
    """What to say about a clock that was not steady."""
    if clock["drift"] <= DRIFT_LIMIT:
        return []
    name, ends = "clock", f"{clock['low']:,.0f} to {clock['high']:,.0f} MHz"
    if clock["unit"] == "relative":
        name, ends = "pace", f"{clock['low']:.2f} to {clock['high']:.2f} of its median"
    return [
        f"The {clock['of']}'s {name} changed by {clock['drift']:.0%} during the run ({ends}). Speedups suffer less "
        "than tokens/s, as they are ratios within a repetition."
    ]

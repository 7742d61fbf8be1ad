"""Variants measured in turns, so that what slows the machine down for a while meets them alike.

Within a repetition every variant runs once on the same input; a speedup is the ratio of two times of one
repetition. One run of each variant goes before, uncounted. Repetitions go on until the ratios are known well enough,
see `Stopping`.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, Protocol, TypeVar

from sleb.benchmarks.stats import ratio_interval

Workload = TypeVar("Workload", bound=Hashable)
Variant = TypeVar("Variant", bound=Hashable)
ContravariantWorkload = TypeVar("ContravariantWorkload", bound=Hashable, contravariant=True)
ContravariantVariant = TypeVar("ContravariantVariant", bound=Hashable, contravariant=True)
# For each workload, its complete repetitions: seconds by depth.
Samples = dict[Workload, list[dict[int, float]]]
# Why a workload was not repeated further: its intervals are narrow enough, there are as many repetitions as allowed,
# the time for it is over.
StopReason = Literal["interval", "repetitions", "time"]
# More than anyone needs: what is computed between repetitions grows with their number.
MOST_REPETITIONS = 10_000


@dataclass(frozen=True)
class Progress:
    """Runs done, of all (of as many as there may be), warm-ups included; what runs next."""

    num_done: int
    num_runs: int
    next_run: str


class Prepare(Protocol[ContravariantWorkload, ContravariantVariant]):
    """Makes the input of a repetition (0: the warm-up) and returns a function that runs a variant on it once.

    A run of which only a part is to be timed returns the seconds of that part itself, others None.
    """

    def __call__(
        self, workload: ContravariantWorkload, repetition: int
    ) -> Callable[[ContravariantVariant], float | None]: ...


class Watch(Protocol):
    """Looks at the machine during the counted repetitions; its own work lies outside what is timed."""

    def begin_repetition(self, workload: str, repetition: int) -> None: ...

    def run(self) -> AbstractContextManager[object]: ...


@dataclass(frozen=True)
class Stopping(Generic[Workload, Variant]):
    """When a workload has been repeated often enough; as it stands, after the least number of repetitions.

    Attributes:
        max_repetitions: the most; None: the least number, so that it is the only one.
        half_width: what the half width of every ratio's interval must not exceed, as a share of the ratio. It is looked
            at after pairs of repetitions only, an order and the same backwards, in which a drift cancels.
        ratios: those whose intervals count, from the times of a repetition.
        seconds: a budget for all workloads; 0: none. One after another they get the least number of repetitions; what
            is left is shared out equally over those whose intervals are not narrow yet. No repetition is begun that
            would overrun it, but every workload gets one.
    """

    max_repetitions: int | None = None
    half_width: float = 0.0
    ratios: Callable[[Workload, Mapping[Variant, float]], Sequence[float]] = lambda workload, times: ()
    seconds: float = 0.0

    def widest(self, workload: Workload, repetitions: Sequence[Mapping[Variant, float]]) -> float:
        """The largest half width among the ratios; 0 without a ratio."""
        by_ratio = zip(*(self.ratios(workload, times) for times in repetitions), strict=True)
        return max((ratio_interval(ratios).half_width for ratios in by_ratio), default=0.0)


def turns(variants: Sequence[Variant], rng: random.Random) -> Iterator[tuple[Variant, ...]]:
    """The order in which each repetition runs the variants: shuffled, then that order backwards, and so on.

    A drift that is steady over two repetitions, of the clock frequency say, thus adds up to the same for all.
    """
    while True:
        order = tuple(rng.sample(list(variants), len(variants)))
        yield order
        yield order[::-1]


def alternated_orders(
    variants: Sequence[Variant], repetitions: int, rng: random.Random
) -> list[tuple[Variant, ...]]:
    """The first of `turns`."""
    return list(islice(turns(variants, rng), repetitions))


def measure(
    prepare: Prepare[Workload, Variant],
    workloads: Sequence[Workload],
    variants: Sequence[Variant] | Callable[[Workload], Sequence[Variant]],
    repetitions: int,
    seed: int,
    samples: dict[Workload, list[dict[Variant, float]]],
    *,
    stopping: Stopping[Workload, Variant] | None = None,
    stops: dict[Workload, StopReason] | None = None,
    watch: Watch | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Times every workload for each of its variants, at least `repetitions` times.

    Adds a repetition to `samples` once it is complete for all variants: an interrupt loses only the one under way.
    `stops` gets what ended each workload that was not interrupted.
    """
    planned = {each: list(variants(each) if callable(variants) else variants) for each in workloads}
    run = _Measurement(
        prepare, planned, repetitions, seed, samples, stopping or Stopping(),
        {} if stops is None else stops, watch, clock, on_progress or (lambda progress: None),
    )  # fmt: skip
    gc.collect()
    gc.freeze()  # the collections between runs then look at what the runs left, not at every imported module
    try:
        run.all()
    finally:
        gc.unfreeze()


@dataclass
class _Measurement(Generic[Workload, Variant]):
    """One call of `measure`."""

    prepare: Prepare[Workload, Variant]
    variants: Mapping[Workload, Sequence[Variant]]
    least: int
    seed: int
    samples: dict[Workload, list[dict[Variant, float]]]
    stopping: Stopping[Workload, Variant]
    stops: dict[Workload, StopReason]
    watch: Watch | None
    clock: Callable[[], float]
    report: Callable[[Progress], None]
    num_done: int = 0

    def __post_init__(self) -> None:
        self.most = max(self.least, self.stopping.max_repetitions or 0)
        self._num_runs = sum((self.most + 1) * len(variants) for variants in self.variants.values())
        self._orders: dict[Workload, Iterator[tuple[Variant, ...]]] = {}
        self._last_seconds: dict[
            Workload, float
        ] = {}  # what the last repetition took, the next one's estimate

    def all(self) -> None:
        """Every workload: with a budget first the least of each, then what narrows intervals."""
        ends = self.clock() + (self.stopping.seconds or math.inf)
        if self.stopping.seconds:
            for workload in self.variants:
                self._repeat(workload, self.least, ends)
        left = [workload for workload in self.variants if workload not in self.stops]
        for place, workload in enumerate(left):
            now = self.clock()
            self._repeat(workload, self.most, now + (ends - now) / (len(left) - place))
        self.report(Progress(self.num_done, self._num_runs, "done"))

    def _repeat(self, workload: Workload, limit: int, deadline: float) -> None:
        """Repeats a workload, on from where it was left, until it has `limit` repetitions or should have no more."""
        variants = self.variants[workload]
        if workload not in self._orders:
            # Of the workload alone, so that the orders do not depend on how often others were repeated.
            self._orders[workload] = turns(variants, random.Random(f"{self.seed} {workload}"))
            self._repetition(workload, 0, variants, "warm-up")
        which = f"of {self.most}" if self.most == self.least else f"of {self.least} to {self.most}"
        while True:
            count = len(self.samples.get(workload, ()))
            if count and (reason := self._stop(workload, deadline)):
                self.stops[workload] = reason
                self._num_runs -= (self.most - count) * len(variants)
                return
            if count >= limit:
                return
            began = self.clock()
            order = next(self._orders[workload])
            times = self._repetition(workload, count + 1, order, f"repetition {count + 1} {which}")
            self.samples.setdefault(workload, []).append(times)
            self._last_seconds[workload] = self.clock() - began

    def _stop(self, workload: Workload, deadline: float) -> StopReason | None:
        """Why there should be no further repetition, if so."""
        done, bound = self.samples[workload], self.stopping.half_width
        paired = len(done) >= self.least and len(done) % 2 == 0
        if bound and paired and self.stopping.widest(workload, done) <= bound:
            return "interval"
        if len(done) >= self.most:
            return "repetitions"
        return "time" if self.clock() + self._last_seconds[workload] > deadline else None

    def _repetition(
        self, workload: Workload, number: int, order: Sequence[Variant], which: str
    ) -> dict[Variant, float]:
        """Seconds of every variant."""
        run = self.prepare(workload, number)
        watch = self.watch if number else None
        if watch is not None:
            watch.begin_repetition(str(workload), number)
        seconds = {}
        for variant in order:
            name = f"depth {variant}" if isinstance(variant, int) else str(variant)
            self.report(Progress(self.num_done, self._num_runs, f"{workload}, {name}, {which}"))
            gc.collect()
            context: AbstractContextManager[Any] = nullcontext() if watch is None else watch.run()
            with context:
                started = self.clock()
                timed = run(variant)
                elapsed = self.clock() - started
            seconds[variant] = elapsed if timed is None else timed
            self.num_done += 1
        return {variant: seconds[variant] for variant in self.variants[workload]}

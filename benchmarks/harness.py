"""Variants measured in turns, so that what slows the machine down for a while meets them alike.

Within a repetition every variant runs once on the same input; a speedup is the ratio of two times of one
repetition. One run of each variant goes before, uncounted.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

Workload = TypeVar("Workload", bound=Hashable)
Contravariant = TypeVar("Contravariant", bound=Hashable, contravariant=True)
# For each workload, its complete repetitions: seconds by depth.
Samples = dict[Workload, list[dict[int, float]]]


@dataclass(frozen=True)
class Progress:
    """Runs done, of all, warm-ups included; what runs next."""

    num_done: int
    num_runs: int
    next_run: str


class Prepare(Protocol[Contravariant]):
    """Makes the input of a repetition (0: the warm-up) and returns a function that runs it once at a depth.

    A run of which only a part is to be timed returns the seconds of that part itself, others None.
    """

    def __call__(self, workload: Contravariant, repetition: int) -> Callable[[int], float | None]: ...


def alternated_orders(depths: Sequence[int], repetitions: int, rng: random.Random) -> list[tuple[int, ...]]:
    """The order in which each repetition runs the depths: shuffled, then that order backwards, and so on.

    A drift that is steady over two repetitions, of the clock frequency say, thus adds up to the same for all.
    """
    orders: list[tuple[int, ...]] = []
    while len(orders) < repetitions:
        order = tuple(rng.sample(list(depths), len(depths)))
        orders += [order, order[::-1]]
    return orders[:repetitions]


def measure(
    prepare: Prepare[Workload],
    workloads: Sequence[Workload],
    depths: Sequence[int],
    repetitions: int,
    seed: int,
    samples: Samples[Workload],
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Times every workload at every depth.

    Adds a repetition to `samples` once it is complete for all depths: an interrupt loses only the one under way.
    """
    report = on_progress or (lambda progress: None)
    gc.collect()
    gc.freeze()  # the collections between runs then look at what the runs left, not at every imported module
    try:
        _measure(prepare, workloads, depths, repetitions, seed, samples, clock, report)
    finally:
        gc.unfreeze()


def _measure(
    prepare: Prepare[Workload],
    workloads: Sequence[Workload],
    depths: Sequence[int],
    repetitions: int,
    seed: int,
    samples: Samples[Workload],
    clock: Callable[[], float],
    report: Callable[[Progress], None],
) -> None:
    num_runs, num_done = len(workloads) * len(depths) * (repetitions + 1), 0
    rng = random.Random(seed)
    for workload in workloads:
        orders = alternated_orders(depths, repetitions, rng)
        for repetition, order in enumerate([tuple(depths), *orders]):
            run = prepare(workload, repetition)
            which = f"repetition {repetition} of {repetitions}" if repetition else "warm-up"
            seconds = {}
            for depth in order:
                report(Progress(num_done, num_runs, f"{workload}, depth {depth}, {which}"))
                gc.collect()
                started = clock()
                timed = run(depth)
                seconds[depth] = clock() - started if timed is None else timed
                num_done += 1
            if repetition:
                samples.setdefault(workload, []).append(seconds)
    report(Progress(num_done, num_runs, "done"))

"""Subjects measured in turns, so that what slows the machine down for a while meets them alike.

Within a turn every subject of a case runs once on the same input; a ratio is of two figures of one turn. The orders
are shuffled, and each is then run backwards: a drift that is steady over two turns adds up to the same for all. One
run of each subject goes before, turn 0, which is not counted. The cases are repeated round after round, until their
ratios are known well enough or the time is over: the first figures of every case come early.

    cases = [Case("decode 8 × 128 after 64", {"depth 0": run_dense, "depth 6": run_pruned}, baseline="depth 0")]
    found = measure(cases, TurnOptions(time_budget=60), on_turn=print_turn)
    result.measurements += found.measurements()
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean, harmonic_mean, median
from typing import Any, Literal, Protocol

from sleb.benchmarks.record import Measurement, Ratio, less_is_better
from sleb.benchmarks.stats import paired_ratio
from sleb.errors import ConfigError
from sleb.options import check_values, option

# The figures of one run, by metric, the one first whose intervals decide how often the case is repeated.
Sample = Mapping[str, float]
# Runs a subject once, on the input of turn 0 (not counted), 1, 2, …, the same for all subjects. It times itself, so
# that making the input is not timed.
Run = Callable[[int], Sample]
# Why a case was not repeated further: its intervals are narrow enough, it has as many turns as allowed, the time is
# over, or none of its subjects works.
Stop = Literal["interval", "repetitions", "time", "failed"]


@dataclass(frozen=True)
class TurnOptions:
    """How often. A subclass may give other defaults; `check` raises ConfigError."""

    repetitions: int = option(
        6, "Turns of each case, at least; an interval takes 6.", minimum=1, maximum=1000, group="Repetitions"
    )
    max_repetitions: int | None = option(
        None, "Turns at most.", unset="30, or --repetitions if more", maximum=1000, group="Repetitions"
    )
    interval: str = option(
        "1%", "Repeat until each ratio's 95 % interval is ± this share of it.", group="Repetitions"
    )
    time_budget: float = option(
        0.0, "Seconds for all turns; every case gets one. 0: no limit.", minimum=0, group="Repetitions"
    )
    seed: int = option(0, "Of the inputs and of the order of the runs.", group="Repetitions")

    @property
    def most(self) -> int:
        """`max_repetitions`, or what stands for it."""
        return max(30, self.repetitions) if self.max_repetitions is None else self.max_repetitions

    @property
    def half_width(self) -> float:
        """`interval`, "1%" or "0.01", as a number. Raises ConfigError where it is no share."""
        try:
            share = float(self.interval.removesuffix("%")) / (100 if self.interval.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share < 1:
            raise ConfigError(
                f"--interval is '{self.interval}'; it must be a share between 0 and 1, as 1% or 0.01"
            )
        return share

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot be."""
        check_values(self)
        if self.half_width and self.most < self.repetitions:
            raise ConfigError(
                f"--max-repetitions is {self.most}; it must be at least --repetitions, {self.repetitions}"
            )


@dataclass(frozen=True)
class Case:
    """What every subject of it does.

    Attributes:
        name: the case of its measurements.
        subjects: what takes turns, by name.
        baseline: what the others are compared with; None: nothing is compared.
        against: subjects that are compared with the mean of several others instead, which see.
        facts: of each subject, for its measurements.
    """

    name: str
    subjects: Mapping[str, Run]
    baseline: str | None = None
    against: Mapping[str, Sequence[str]] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def references(self, subject: str) -> Sequence[str]:
        """What `subject` is compared with: nothing, the baseline or several others."""
        if subject in self.against:
            return self.against[subject]
        return () if self.baseline in (None, subject) else (str(self.baseline),)


@dataclass(frozen=True)
class Progress:
    """Runs done, of all that there may be, warm-ups included; what runs next."""

    num_done: int
    num_runs: int
    next_run: str


class Watch(Protocol):
    """Looks at the machine during the counted turns, outside what is timed; see `environment.Conditions`."""

    def begin_turn(self) -> None: ...

    def run(self) -> AbstractContextManager[object]: ...


@dataclass
class Turns:
    """What was measured.

    Attributes:
        samples: of each case its complete turns: the sample of each subject.
        stops: why a case was not repeated further; none where it was interrupted.
        failures: why a subject of a case was left out.
        complete: False after an interrupt, which loses only the turn under way.
    """

    cases: Sequence[Case]
    samples: dict[str, list[dict[str, Sample]]] = field(default_factory=dict)
    stops: dict[str, Stop] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    complete: bool = True

    def of(self, case: Case) -> Sequence[Mapping[str, Sample]]:
        """The case's complete turns."""
        return self.samples.get(case.name, [])

    def ratios(self, case: Case, subject: str, metric: str) -> list[float]:
        """How many times better than its reference the subject was, in each turn that has both.

        Better than the mean of several: of times the plain one, of rates that of the times.
        """
        references, found = case.references(subject), []
        for turn in self.of(case) if references else ():
            value, *expected = (turn.get(each, {}).get(metric, 0.0) for each in (subject, *references))
            if value and all(expected):
                less = less_is_better(metric)
                found.append(fmean(expected) / value if less else value / harmonic_mean(expected))
        return found

    def ratio(self, case: Case, subject: str, metric: str) -> Ratio | None:
        """The ratio of all turns; None where nothing is compared."""
        ratios = self.ratios(case, subject, metric)
        return paired_ratio(ratios) if ratios else None

    def widest(self, case: Case) -> float:
        """The largest half width of the case's intervals, of each subject's first metric."""
        last = self.of(case)[-1].items()
        found = (self.ratio(case, subject, next(iter(sample))) for subject, sample in last if sample)
        return max((ratio.half_width for ratio in found if ratio), default=0.0)

    def measurements(self) -> list[Measurement]:
        """One of each case, subject and metric: medians, and the least and greatest turn; paired ratios.

        Facts are the case's, and `samples` (the turns' values), `repetitions` and `stopped`.
        """
        return [each for case in self.cases for name in case.subjects for each in self._figures(case, name)]

    def _figures(self, case: Case, subject: str) -> Iterator[Measurement]:
        facts = dict(case.facts.get(subject, {}))
        metrics = dict.fromkeys(metric for turn in self.of(case) for each in turn.values() for metric in each)
        if reason := self.failures.get((case.name, subject)):
            facts["failed"] = reason
            yield Measurement(case.name, subject, next(iter(metrics), "tokens/s"), None, facts=facts)
            return
        for metric in metrics:
            samples = (turn.get(subject, {}) for turn in self.of(case))
            if values := [sample[metric] for sample in samples if metric in sample]:
                stopped = self.stops.get(case.name, "interrupt")
                facts |= {"repetitions": len(values), "stopped": stopped, "samples": values}
                spread, ratio = (min(values), max(values)), self.ratio(case, subject, metric)
                yield Measurement(case.name, subject, metric, median(values), spread, ratio, dict(facts))

    def line(self, case: Case) -> str:
        """The last turn in a line: the first metric of each subject, and the ratios so far."""
        shown = []
        for subject, sample in self.of(case)[-1].items():
            for metric in list(sample)[:1]:
                ratio = self.ratio(case, subject, metric)
                so_far = f" ({ratio.estimate:.3f}×)" if ratio else ""
                shown.append(f"{subject} {sample[metric]:,.4g} {metric}{so_far}")
        return f"{case.name}, turn {len(self.of(case))}: {', '.join(shown)}"


def orders(subjects: Sequence[str], rng: random.Random) -> Iterator[tuple[str, ...]]:
    """The order of each turn: shuffled, then the same backwards, and so on."""
    while True:
        order = tuple(rng.sample(list(subjects), len(subjects)))
        yield order
        yield order[::-1]


def measure(
    cases: Sequence[Case],
    options: TurnOptions,
    *,
    failing: tuple[type[Exception], ...] = (),
    watch: Watch | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_turn: Callable[[Turns, Case], None] = lambda turns, case: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Turns:
    """Runs every case in turns. Ctrl-C ends it; what is complete is kept.

    failing: exceptions that take a subject out of its case, with the reason, instead of ending all. on_progress: called
    before every run; on_turn after every complete turn, with what there is so far. No turn is begun that would overrun
    the time budget, going by how long the case's last one took; but every case gets one.
    """
    turns, ends = Turns(cases), clock() + (options.time_budget or math.inf)
    last_seconds: dict[str, float] = {}
    num_done = 0
    # Of the case alone, so that the orders do not depend on what else is measured.
    rngs = {case.name: random.Random(f"{options.seed} {case.name}") for case in cases}
    order_of = {case.name: orders(list(case.subjects), rngs[case.name]) for case in cases}

    def stopped(case: Case) -> bool:
        """Whether there should be no further turn; the reason is noted."""
        num_turns = len(turns.of(case))
        reason: Stop | None = None
        if all((case.name, each) in turns.failures for each in case.subjects):
            reason = "failed"
        elif num_turns >= options.most:
            reason = "repetitions"
        elif num_turns and clock() + last_seconds[case.name] > ends:
            reason = "time"
        elif num_turns >= options.repetitions and num_turns % 2 == 0:
            reason = "interval" if turns.widest(case) <= options.half_width else None
        if reason:
            turns.stops.setdefault(case.name, reason)
        return case.name in turns.stops

    def turn(case: Case, number: int, order: Sequence[str]) -> None:
        nonlocal num_done
        began, seen = clock(), watch if number else None
        if seen is not None:
            seen.begin_turn()
        samples: dict[str, Sample] = {}
        for subject in order:
            if (case.name, subject) in turns.failures:
                continue
            most = {case.name: len(turns.of(case)) for case in cases if case.name in turns.stops}
            num_runs = sum((most.get(each.name, options.most) + 1) * len(each.subjects) for each in cases)
            which = f"turn {number}" if number else "warm-up"
            on_progress(Progress(num_done, num_runs, f"{case.name}, {subject}, {which}"))
            gc.collect()
            try:
                with nullcontext() if seen is None else seen.run():
                    samples[subject] = case.subjects[subject](number)
            except failing as error:
                turns.failures[case.name, subject] = " ".join(str(error).split()) or type(error).__name__
            num_done += 1
        last_seconds[case.name] = clock() - began
        if number and samples:
            complete = {subject: samples[subject] for subject in case.subjects if subject in samples}
            turns.samples.setdefault(case.name, []).append(complete)
            on_turn(turns, case)

    gc.collect()
    gc.freeze()  # the collections between runs then look at what the runs left, not at every imported module
    try:
        open_cases = list(cases)
        while open_cases:
            for case in open_cases:
                if case.name not in last_seconds:
                    turn(case, 0, tuple(case.subjects))
                # One, so that each case soon has some; then two, one backwards.
                for _ in range(1 if len(turns.of(case)) < 2 else 2):
                    if not stopped(case):
                        turn(case, len(turns.of(case)) + 1, next(order_of[case.name]))
            open_cases = [case for case in open_cases if not stopped(case)]
        on_progress(Progress(num_done, num_done, "done"))
    except KeyboardInterrupt:
        turns.complete = False
    finally:
        gc.unfreeze()
    return turns

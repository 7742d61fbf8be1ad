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

from sleb.benchmarks.record import Measurement, less_is_better
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
# What is computed between turns grows with their number.
MOST_REPETITIONS = 10_000


def parse_share(name: str, text: str) -> float:
    """A share between 0 and 1, written "1%" or "0.01". Raises ConfigError naming `name`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ConfigError(f"{name} is '{text}'; it must be a share between 0 and 1, as 1% or 0.01")
    return share


@dataclass(frozen=True)
class TurnOptions:
    """How often. A subclass may give other defaults; `check` raises ConfigError."""

    repetitions: int = option(
        6,
        "Turns of each case, at least; an interval takes 6.",
        minimum=1,
        maximum=MOST_REPETITIONS,
        group="Repetitions",
    )
    max_repetitions: int | None = option(
        None,
        "Turns at most.",
        unset="30, or --repetitions where that is more",
        maximum=MOST_REPETITIONS,
        group="Repetitions",
    )
    interval: str = option(
        "1%",
        "Repeat until the half width of each ratio's 95 % interval is this share of it.",
        group="Repetitions",
    )
    time_budget: float = option(
        0.0,
        "Seconds for all turns; every case gets one all the same. 0: no limit.",
        minimum=0,
        group="Repetitions",
    )
    seed: int = option(0, "Of the inputs and of the order of the runs.", group="Repetitions")

    @property
    def most(self) -> int:
        """`max_repetitions`, or what stands for it."""
        return max(30, self.repetitions) if self.max_repetitions is None else self.max_repetitions

    @property
    def half_width(self) -> float:
        """`interval` as a number."""
        return parse_share("--interval", self.interval)

    def check(self) -> None:
        """Raises ConfigError for the first value that cannot be."""
        check_values(self)
        if self.most < self.repetitions:
            raise ConfigError(
                f"--max-repetitions is {self.most}; it must be at least --repetitions, {self.repetitions}"
            )
        parse_share("--interval", self.interval)


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

    def values(self, case: Case, subject: str, metric: str) -> list[float]:
        """The subject's figures, one a turn that has it."""
        found = (turn.get(subject, {}).get(metric) for turn in self.samples.get(case.name, ()))
        return [value for value in found if value is not None]

    def ratios(self, case: Case, subject: str, metric: str) -> list[float]:
        """How many times better than its reference the subject was, in each turn that has both."""
        references = case.references(subject)
        found = []
        for turn in self.samples.get(case.name, ()) if references else ():
            expected = [turn.get(each, {}).get(metric) for each in references]
            value = turn.get(subject, {}).get(metric)
            if value and all(expected):
                found.append(_ratio(metric, value, [each for each in expected if each]))
        return found

    def widest(self, case: Case) -> float:
        """The largest half width of the case's intervals, of each subject's first metric."""
        compared = [each for each in case.subjects if case.references(each)]
        return max((self._half_width(case, subject) for subject in compared), default=0.0)

    def _half_width(self, case: Case, subject: str) -> float:
        metric = next(iter(self.samples[case.name][-1].get(subject, ())), None)
        ratios = [] if metric is None else self.ratios(case, subject, metric)
        return paired_ratio(ratios).half_width if ratios else 0.0

    def measurements(self) -> list[Measurement]:
        """One of each case, subject and metric: medians, and the least and greatest turn; paired ratios.

        Facts are the case's, and `samples` (the turns' values), `repetitions` and `stopped`.
        """
        return [
            measurement
            for case in self.cases
            if self.samples.get(case.name) or any(name == case.name for name, _ in self.failures)
            for subject in case.subjects
            for measurement in self._measurements(case, subject)
        ]

    def _measurements(self, case: Case, subject: str) -> Iterator[Measurement]:
        facts, done = dict(case.facts.get(subject, {})), self.samples.get(case.name, [])
        metrics = dict.fromkeys(metric for turn in done for sample in turn.values() for metric in sample)
        if reason := self.failures.get((case.name, subject)):
            yield Measurement(
                case.name, subject, next(iter(metrics), "tokens/s"), None, facts=facts | {"failed": reason}
            )
            return
        for metric in metrics:
            values, ratios = self.values(case, subject, metric), self.ratios(case, subject, metric)
            if not values:
                continue
            shown = {"repetitions": len(values), "stopped": self.stops.get(case.name, "interrupt")}
            yield Measurement(
                case.name,
                subject,
                metric,
                median(values),
                (min(values), max(values)),
                paired_ratio(ratios) if ratios else None,
                facts | shown | {"samples": values},
            )

    def line(self, case: Case) -> str:
        """The last turn in a line: the first metric of each subject, and the ratios so far."""
        turns = self.samples[case.name]
        shown = []
        for subject, sample in turns[-1].items():
            metric = next(iter(sample), None)
            if metric is None:
                continue
            ratios = self.ratios(case, subject, metric)
            ratio = f" ({paired_ratio(ratios).estimate:.3f}×)" if ratios else ""
            shown.append(f"{subject} {sample[metric]:,.4g} {metric}{ratio}")
        return f"{case.name}, turn {len(turns)}: {', '.join(shown)}"


def _ratio(metric: str, value: float, expected: Sequence[float]) -> float:
    """Better than the expected figures' mean: of times the plain one, of rates that of the times."""
    if less_is_better(metric):
        return fmean(expected) / value
    return value / harmonic_mean(expected)


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
    run = _Measuring(cases, options, failing, watch, on_progress, on_turn, clock)
    gc.collect()
    gc.freeze()  # the collections between runs then look at what the runs left, not at every imported module
    try:
        run.all()
    except KeyboardInterrupt:
        run.turns.complete = False
    finally:
        gc.unfreeze()
    return run.turns


@dataclass
class _Measuring:
    """One call of `measure`."""

    cases: Sequence[Case]
    options: TurnOptions
    failing: tuple[type[Exception], ...]
    watch: Watch | None
    on_progress: Callable[[Progress], None]
    on_turn: Callable[[Turns, Case], None]
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.turns = Turns(self.cases)
        self._ends = self.clock() + (self.options.time_budget or math.inf)
        # Of the case alone, so that the orders do not depend on what else is measured.
        self._orders = {
            case.name: orders(list(case.subjects), random.Random(f"{self.options.seed} {case.name}"))
            for case in self.cases
        }
        self._last_seconds: dict[str, float] = {}
        self._num_done = 0
        self._num_runs = sum((self.options.most + 1) * len(case.subjects) for case in self.cases)

    def all(self) -> None:
        """Rounds until no case is open: of one turn a case twice, so that each soon has some, then of two."""
        open_cases = list(self.cases)
        while open_cases:
            for case in open_cases:
                if case.name not in self._last_seconds:
                    self._turn(case, 0, tuple(case.subjects))
                for _ in range(1 if len(self.turns.samples.get(case.name, ())) < 2 else 2):
                    if not self._stopped(case):
                        number = len(self.turns.samples.get(case.name, ())) + 1
                        self._turn(case, number, next(self._orders[case.name]))
                self._stopped(case)
            open_cases = [case for case in open_cases if case.name not in self.turns.stops]
        self.on_progress(Progress(self._num_done, self._num_done, "done"))

    def _stopped(self, case: Case) -> bool:
        """Whether there should be no further turn; the reason is noted."""
        done = self.turns.samples.get(case.name, [])
        reason: Stop | None = None
        if all((case.name, each) in self.turns.failures for each in case.subjects):
            reason = "failed"
        elif len(done) >= self.options.most:
            reason = "repetitions"
        elif done and self.clock() + self._last_seconds[case.name] > self._ends:
            reason = "time"
        elif (
            len(done) >= self.options.repetitions
            and len(done) % 2 == 0
            and self.turns.widest(case) <= self.options.half_width
        ):
            reason = "interval"
        if reason and case.name not in self.turns.stops:
            self.turns.stops[case.name] = reason
            self._num_runs -= (self.options.most - len(done)) * len(case.subjects)
        return case.name in self.turns.stops

    def _turn(self, case: Case, number: int, order: Sequence[str]) -> None:
        began = self.clock()
        watch = self.watch if number else None
        if watch is not None:
            watch.begin_turn()
        which = f"turn {number}" if number else "warm-up"
        samples: dict[str, Sample] = {}
        for subject in order:
            if (case.name, subject) in self.turns.failures:
                continue
            self.on_progress(Progress(self._num_done, self._num_runs, f"{case.name}, {subject}, {which}"))
            gc.collect()
            try:
                with nullcontext() if watch is None else watch.run():
                    samples[subject] = case.subjects[subject](number)
            except self.failing as error:
                self.turns.failures[case.name, subject] = " ".join(str(error).split()) or type(error).__name__
            self._num_done += 1
        self._last_seconds[case.name] = self.clock() - began
        if number and samples:
            turn = {subject: samples[subject] for subject in case.subjects if subject in samples}
            self.turns.samples.setdefault(case.name, []).append(turn)
            self.on_turn(self.turns, case)

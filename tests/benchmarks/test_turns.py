"""Turns, pairing and stopping, on a clock that only the runs move."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from sleb.benchmarks.record import Measurement
from sleb.benchmarks.turns import Case, Progress, Sample, TurnOptions, Turns, measure, orders
from sleb.errors import ConfigError

Cost = Callable[[str, int], float]


class FakeRuns:
    """Runs that take the seconds that `cost(subject, turn)` says; their sample is these seconds."""

    def __init__(self, cost: Cost = lambda subject, turn: 1.0, interrupt_at: int | None = None) -> None:
        self.now = 100.0
        self.log: list[tuple[str, int, str]] = []
        self.cost, self._interrupt_at = cost, interrupt_at

    def case(self, name: str, subjects: str = "dense pruned", baseline: str | None = "dense") -> Case:
        def run_of(subject: str) -> Callable[[int], Sample]:
            def run(turn: int) -> Sample:
                self.now += 1000.0  # what it takes to make the input
                if len(self.log) == self._interrupt_at:
                    raise KeyboardInterrupt
                self.log.append((name, turn, subject))
                seconds = self.cost(subject, turn)
                self.now += seconds
                return {"seconds": seconds}

            return run

        return Case(name, {subject: run_of(subject) for subject in subjects.split()}, baseline)

    def measure(self, *cases: Case, **options: object) -> Turns:
        found = {"repetitions": 6, "max_repetitions": 30} | options
        return measure(cases or [self.case("a")], TurnOptions(**found), clock=lambda: self.now)  # type: ignore[arg-type]


def counts(turns: Turns) -> dict[str, int]:
    return {name: len(done) for name, done in turns.samples.items()}


def figure(turns: Turns, subject: str, case: str = "a") -> Measurement:
    return next(each for each in turns.measurements() if (each.case, each.subject) == (case, subject))


def test_every_turn_runs_every_subject_and_the_next_one_runs_them_backwards() -> None:
    subjects = ["0", "3", "6", "9"]
    found = orders(subjects, random.Random(1))
    first = [next(found) for _ in range(6)]
    assert all(sorted(order) == subjects for order in first)
    assert first[1] == first[0][::-1] and first[3] == first[2][::-1]
    assert len({first[0], first[2], first[4]}) > 1


def test_subjects_take_turns_and_the_warm_up_is_not_counted() -> None:
    runs = FakeRuns(lambda subject, turn: 99.0 if not turn else turn + 10.0 * (subject == "dense"))
    turns = runs.measure(runs.case("a"), runs.case("b"), repetitions=3, max_repetitions=3)
    wanted = [{"dense": {"seconds": 10.0 + turn}, "pruned": {"seconds": 1.0 * turn}} for turn in (1, 2, 3)]
    assert turns.samples == {"a": wanted, "b": wanted}
    assert [turn for case, turn, _ in runs.log if case == "a"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert runs.log[4][:2] == ("b", 0), "the second case's first figures come before the first one's second"


def test_a_slow_spell_meets_all_subjects_and_leaves_the_ratio_alone() -> None:
    """A machine that is ten times slower during some turns: medians of times move, paired ratios do not."""
    slow = {1: 1.0, 2: 10.0, 3: 12.0, 4: 1.0, 5: 9.0, 6: 1.0}
    runs = FakeRuns(lambda subject, turn: slow.get(turn, 1.0) * (1.2 if subject == "dense" else 1.0))
    pruned = figure(runs.measure(max_repetitions=6), "pruned")
    assert pruned.facts["samples"] == pytest.approx([1.0, 10.0, 12.0, 1.0, 9.0, 1.0])
    assert (pruned.value, pruned.spread) == (5.0, (1.0, 12.0))
    assert pruned.ratio is not None and pruned.ratio.verdict == "faster"
    assert (pruned.ratio.estimate, pruned.ratio.low, pruned.ratio.high) == pytest.approx((1.2, 1.2, 1.2))


def test_below_six_turns_there_is_an_estimate_and_no_interval() -> None:
    """The Walsh averages of log 2, log 4 and log 32 have a median of 2½ logs of 2."""
    times = {"dense": (0.0, 2.0, 12.0, 96.0), "pruned": (0.0, 1.0, 3.0, 3.0)}
    runs = FakeRuns(lambda subject, turn: times[subject][turn])
    ratio = figure(runs.measure(repetitions=3, max_repetitions=3), "pruned").ratio
    assert ratio is not None and ratio.estimate == pytest.approx(2**2.5)
    assert (ratio.low, ratio.high, ratio.verdict) == (None, None, "no difference")


def test_of_rates_more_is_better_and_a_mean_of_rates_is_that_of_the_times() -> None:
    """A batch of which half would run at 10 and half at 40 tokens/s alone is expected at 16."""
    rates = {"dense": 10.0, "pruned": 40.0, "mixed": 16.0}

    def run_of(subject: str) -> Callable[[int], Sample]:
        return lambda turn: {"tokens/s": rates[subject], "TTFT ms": 1000 / rates[subject]}

    case = Case("a", {name: run_of(name) for name in rates}, "dense", {"mixed": ("dense", "pruned")})
    found = {each.key: each for each in measure([case], TurnOptions()).measurements()}
    assert {key[1:]: each.ratio and each.ratio.estimate for key, each in found.items()} == {
        ("dense", "tokens/s"): None, ("dense", "TTFT ms"): None,
        ("pruned", "tokens/s"): pytest.approx(4.0), ("pruned", "TTFT ms"): pytest.approx(4.0),
        ("mixed", "tokens/s"): pytest.approx(1.0), ("mixed", "TTFT ms"): pytest.approx(1.0),
    }  # fmt: skip


def test_an_interrupt_keeps_the_turns_that_are_complete_for_all_subjects() -> None:
    # A warm-up and a turn of both cases are 8 runs; then a second of "a", and half of a second of "b".
    runs = FakeRuns(interrupt_at=8 + 2 + 1)
    turns = runs.measure(runs.case("a"), runs.case("b"))
    assert not turns.complete
    assert counts(turns) == {"a": 2, "b": 1} and turns.stops == {}
    assert figure(turns, "pruned").facts["stopped"] == "interrupt"


def test_progress_counts_every_run_and_shrinks_to_what_was_run() -> None:
    seen: list[Progress] = []
    runs = FakeRuns()
    options = TurnOptions(repetitions=6, max_repetitions=30)
    measure([runs.case("a")], options, clock=lambda: runs.now, on_progress=seen.append)
    assert [each.num_done for each in seen] == list(range(15))
    assert seen[0].num_runs == 31 * 2 and seen[-1].num_runs == 7 * 2
    assert seen[0].next_run == "a, dense, warm-up" and "turn 6" in seen[-2].next_run


def test_what_there_is_so_far_is_told_after_every_turn() -> None:
    lines: list[str] = []
    runs = FakeRuns(lambda subject, turn: 1.5 if subject == "dense" else 1.0)
    measure(
        [runs.case("a")], TurnOptions(repetitions=2, max_repetitions=2), clock=lambda: runs.now,
        on_turn=lambda turns, case: lines.append(turns.line(case)),
    )  # fmt: skip
    assert lines == [f"a, turn {turn}: dense 1.5 seconds, pruned 1 seconds (1.500×)" for turn in (1, 2)]


def repeated(cost: Cost, **limits: object) -> tuple[int, str]:
    """How often a case is repeated, 6 times at least, and why not more."""
    turns = FakeRuns(cost).measure(**limits)
    return len(turns.samples["a"]), turns.stops["a"]


def test_it_repeats_until_the_intervals_are_narrow() -> None:
    assert repeated(lambda subject, turn: 1.0) == (6, "interval")
    noise = random.Random(3)
    count, reason = repeated(lambda subject, turn: 1 + noise.gauss(0, 0.01))
    assert 6 < count < 30 and count % 2 == 0 and reason == "interval"
    assert repeated(lambda subject, turn: 1 + noise.gauss(0, 0.2)) == (30, "repetitions")
    assert repeated(lambda subject, turn: 1.0, repetitions=7) == (8, "interval"), "after pairs alone"


def test_the_interval_of_every_subject_counts() -> None:
    """The third subject alone is noisy."""
    noise = random.Random(1)
    runs = FakeRuns(lambda subject, turn: 1 + noise.gauss(0, 0.2) * (subject == "noisy"))
    assert counts(runs.measure(runs.case("a", "dense pruned noisy"), max_repetitions=20)) == {"a": 20}


def test_a_budget_is_kept_and_every_case_gets_a_turn() -> None:
    """A turn takes 2,002 s, 2,000 of them to make inputs; so does the warm-up."""
    noise = random.Random(1)
    for seconds, wanted in (
        (1.0, {"a": 1, "b": 1}),
        (16_100.0, {"a": 4, "b": 2}),
        (20_050.0, {"a": 4, "b": 4}),
    ):
        runs = FakeRuns(lambda subject, turn: 1.0 + noise.random() / 100)
        began = runs.now
        turns = runs.measure(runs.case("a"), runs.case("b"), interval="0.1%", time_budget=seconds)
        assert (counts(turns), set(turns.stops.values())) == (wanted, {"time"})
        assert seconds == 1.0 or runs.now - began <= seconds


def test_the_least_turns_of_all_come_before_narrow_intervals_of_one() -> None:
    """The first case would be repeated 30 times; it has 6 by when the second has its 6."""
    noise = random.Random(1)
    runs = FakeRuns(lambda subject, turn: 1 + noise.gauss(0, 0.2) * (runs.log[-1][0] == "a"))
    turns = runs.measure(runs.case("a"), runs.case("b"))
    assert counts(turns) == {"a": 30, "b": 6}
    last_of_b = max(place for place, run in enumerate(runs.log) if run[0] == "b")
    assert sum(case == "a" for case, turn, _ in runs.log[:last_of_b] if turn) == 6 * 2


def test_orders_of_a_case_do_not_depend_on_what_else_is_measured() -> None:
    def order_of_b(*others: str) -> list[str]:
        runs = FakeRuns()
        runs.measure(*(runs.case(name, "x y z", None) for name in (*others, "b")))
        return [subject for case, _, subject in runs.log if case == "b"]

    assert order_of_b() == order_of_b("a", "c")


def test_a_subject_that_fails_is_left_out_with_the_reason() -> None:
    def cost(subject: str, turn: int) -> float:
        if subject == "pruned" and turn == 2:
            raise ConfigError("it is\ngone")
        return 1.0

    runs = FakeRuns(cost)
    options = TurnOptions(repetitions=4, max_repetitions=4)
    cases = [runs.case("a", "dense pruned control")]
    turns = measure(cases, options, failing=(ConfigError,), clock=lambda: runs.now)
    assert turns.complete and counts(turns) == {"a": 4}
    failed = figure(turns, "pruned")
    assert (failed.value, failed.facts["failed"]) == (None, "it is gone")
    assert len(figure(turns, "control").facts["samples"]) == 4
    with pytest.raises(ConfigError, match="gone"):
        measure(cases, options)
    only = measure([runs.case("a", "pruned", None)], options, failing=(ConfigError,))
    assert only.stops == {"a": "failed"} and only.measurements()[0].value is None


def test_the_watch_sees_the_counted_runs() -> None:
    log: list[str] = []

    class FakeWatch:
        def begin_turn(self) -> None:
            log.append("turn")

        @contextmanager
        def run(self) -> Iterator[None]:
            yield
            log.append("run")

    runs = FakeRuns()
    measure([runs.case("a")], TurnOptions(repetitions=2, max_repetitions=2), watch=FakeWatch())
    assert log == ["turn", "run", "run"] * 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"repetitions": 0}, "repetitions is 0"),
        ({"repetitions": 9, "max_repetitions": 8}, "at least --repetitions, 9"),
        ({"interval": "0"}, "--interval is '0'"),
        ({"interval": "narrow"}, "a share between 0 and 1"),
        ({"time_budget": -1.0}, "time_budget is -1"),
        ({"time_budget": float("nan")}, "time_budget is nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        TurnOptions(**options).check()  # type: ignore[arg-type]
    assert TurnOptions(interval="2.5%").half_width == 0.025 and TurnOptions(repetitions=40).most == 40


def test_a_planted_slowdown_is_found_and_equal_subjects_come_out_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 simulated measurements: noise of 1 %, one run in twenty up to 30 % slower, a clock that drifts by 8 %."""
    collections = dict.fromkeys(("collect", "freeze", "unfreeze"), int)
    monkeypatch.setattr("sleb.benchmarks.turns.gc", SimpleNamespace(**collections))
    num_seeds, found, equal, repetitions = 200, 0, 0, 0
    for seed in range(num_seeds):
        rng = random.Random(seed)

        def cost(subject: str, turn: int, rng: random.Random = rng) -> float:
            spell = 1 + (rng.uniform(0, 0.3) if rng.random() < 1 / 20 else 0.0)
            drift = 1 + 0.08 * turn / 30
            return (1.05 if subject == "slow" else 1.0) * drift * spell * rng.lognormvariate(0, 0.01)

        runs = FakeRuns(cost)
        turns = runs.measure(runs.case("a", "dense copy slow"), seed=seed)
        slow, copy = figure(turns, "slow").ratio, figure(turns, "copy").ratio
        assert slow is not None and copy is not None
        found += slow.verdict == "slower"
        equal += copy.verdict == "no difference"
        repetitions += len(turns.samples["a"])
    assert found / num_seeds >= 0.99
    assert equal / num_seeds >= 0.92
    assert 12 < repetitions / num_seeds < 25

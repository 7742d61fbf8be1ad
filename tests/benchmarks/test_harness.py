"""Turn-taking and pairing, on a clock that only the runs move."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from sleb.benchmarks.harness import Progress, Samples, Stopping, StopReason, alternated_orders, measure
from sleb.benchmarks.results import Row, make_row
from sleb.benchmarks.stats import ratio_interval, verdict

_COLLECTIONS = ("collect", "freeze", "unfreeze")


class FakeRuns:
    """Runs that take the seconds that `cost(depth, repetition)` says."""

    def __init__(self, cost: Callable[[int, int], float], interrupt_at: int | None = None) -> None:
        self.now = 100.0
        self.log: list[tuple[str, int, int]] = []
        self._cost = cost
        self._interrupt_at = interrupt_at

    def clock(self) -> float:
        return self.now

    def prepare(self, workload: str, repetition: int) -> Callable[[int], None]:
        self.now += 1000.0  # what it takes to make the input must not be measured

        def run(depth: int) -> None:
            if len(self.log) == self._interrupt_at:
                raise KeyboardInterrupt
            self.log.append((workload, repetition, depth))
            self.now += self._cost(depth, repetition)

        return run


def test_every_repetition_runs_every_depth_and_the_next_one_runs_them_backwards() -> None:
    orders = alternated_orders((0, 3, 6, 9), 7, random.Random(1))
    assert len(orders) == 7
    assert all(sorted(order) == [0, 3, 6, 9] for order in orders)
    assert orders[1] == orders[0][::-1] and orders[3] == orders[2][::-1]
    assert len({orders[0], orders[2], orders[4]}) > 1
    assert orders == alternated_orders((0, 3, 6, 9), 7, random.Random(1))


def test_depths_take_turns_and_the_warm_up_is_not_counted() -> None:
    runs = FakeRuns(lambda depth, repetition: 99.0 if repetition == 0 else 10.0 - depth + repetition)
    samples: Samples[str] = {}
    measure(runs.prepare, ["a", "b"], (0, 6), 3, 0, samples, clock=runs.clock)
    assert samples == {name: [{0: 11.0, 6: 5.0}, {0: 12.0, 6: 6.0}, {0: 13.0, 6: 7.0}] for name in ("a", "b")}
    assert [workload for workload, _, _ in runs.log] == ["a"] * 8 + ["b"] * 8
    by_repetition = [repetition for _, repetition, _ in runs.log[:8]]
    assert by_repetition == [0, 0, 1, 1, 2, 2, 3, 3]


def row_of(repetitions: list[dict[int, float]], ideal_speedup: float, counted_tokens: int = 1) -> Row:
    """The row of depth 6 against depth 0."""
    ratios = [times[0] / times[6] for times in repetitions]
    names = ("depth", "baseline_depth", "num_blocks_kept", "batch", "prompt_tokens", "output_tokens")
    facts = dict.fromkeys((*names, "weight_bytes", "kv_bytes_per_token", "kv_bytes"), 1)
    return make_row(
        [times[6] for times in repetitions],
        ratios,
        counted_tokens=counted_tokens,
        ideal_speedup=ideal_speedup,
        test="generate",
        **facts,
    )


def test_a_slow_spell_meets_all_depths_and_leaves_the_speedup_alone() -> None:
    """A machine that gets ten times slower during one repetition: medians of times move, paired ratios do not."""
    slow = {1: 1.0, 2: 10.0, 3: 12.0, 4: 1.0, 5: 9.0, 6: 1.0}
    runs = FakeRuns(lambda depth, repetition: slow.get(repetition, 1.0) * (1.2 if depth == 0 else 1.0))
    samples: Samples[str] = {}
    measure(runs.prepare, ["a"], (0, 6), 6, 0, samples, clock=runs.clock)
    row = row_of(samples["a"], ideal_speedup=1.25, counted_tokens=90)
    assert row.seconds_samples == pytest.approx([1.0, 10.0, 12.0, 1.0, 9.0, 1.0])
    assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx((1.2, 1.2, 1.2))
    assert (row.speedup_level, row.verdict) == (0.95, "faster")
    assert row.ideal_gain_share == pytest.approx(0.8)
    assert row.tokens_per_second == pytest.approx((90 + 10) / 2)
    assert row.relative_spread == pytest.approx((90 - 7.5) / 2 / 50)
    assert row.noisy


def test_speedup_is_made_of_ratios_and_below_six_repetitions_has_their_range() -> None:
    """The Walsh averages of log 2, log 4 and log 32 have a median of 2½ logs of 2."""
    repetitions = [{0: 2.0, 6: 1.0}, {0: 12.0, 6: 3.0}, {0: 96.0, 6: 3.0}]
    row = row_of(repetitions, ideal_speedup=1.0)
    assert row.speedup_samples == [2.0, 4.0, 32.0]
    assert row.speedup == pytest.approx(2**2.5)
    assert (row.speedup_low, row.speedup_high, row.speedup_level) == (2.0, 32.0, None)
    assert row.verdict == "no difference"  # none that is shown
    assert row.ideal_gain_share is None and row.half_width is None


def test_one_repetition_has_no_spread() -> None:
    row = row_of([{0: 2.0, 6: 2.0}], ideal_speedup=1.0, counted_tokens=4)
    assert row.relative_spread is None and not row.noisy
    assert (row.tokens_per_second, row.speedup) == (2.0, 1.0)


def test_an_interrupt_keeps_the_repetitions_that_are_complete_for_all_depths() -> None:
    # Warm-up and three repetitions of two depths are 8 runs of "a"; "b" is interrupted half way through its second.
    runs = FakeRuns(lambda depth, repetition: 1.0, interrupt_at=8 + 5)
    samples: Samples[str] = {}
    with pytest.raises(KeyboardInterrupt):
        measure(runs.prepare, ["a", "b", "c"], (0, 6), 3, 0, samples, clock=runs.clock)
    assert {name: len(repetitions) for name, repetitions in samples.items()} == {"a": 3, "b": 1}


def test_progress_counts_every_run() -> None:
    seen: list[Progress] = []
    runs = FakeRuns(lambda depth, repetition: 1.0)
    measure(runs.prepare, ["a"], (0, 6), 2, 0, {}, clock=runs.clock, on_progress=seen.append)
    assert [progress.num_done for progress in seen] == list(range(7))
    assert {progress.num_runs for progress in seen} == {6}
    assert "warm-up" in seen[0].next_run and "repetition 2 of 2" in seen[-2].next_run


def ratios_of(workload: str, times: Mapping[int, float]) -> list[float]:
    return [times[0] / seconds for depth, seconds in times.items() if depth]


def repeated(cost: Callable[[int, int], float], **limits: Any) -> tuple[int, str]:
    """How often a workload is repeated, 6 times at least, and why not more."""
    runs, samples, stops = FakeRuns(cost), {}, {}
    measure(
        runs.prepare, ["a"], (0, 6), 6, 0, samples, clock=runs.clock, stops=stops,
        stopping=Stopping(30, 0.01, ratios_of, **limits),
    )  # fmt: skip
    return len(samples["a"]), stops["a"]


def test_it_repeats_until_the_intervals_are_narrow() -> None:
    assert repeated(lambda depth, repetition: 1.0) == (6, "interval")
    # Between 1 % either way: the interval of eight is as wide as its extremes, that of more narrows.
    noise = random.Random(3)
    count, reason = repeated(lambda depth, repetition: 1 + noise.gauss(0, 0.01))
    assert 6 < count < 30 and count % 2 == 0 and reason == "interval"
    assert repeated(lambda depth, repetition: 1 + noise.gauss(0, 0.2)) == (30, "repetitions")


def test_it_stops_after_pairs_of_repetitions() -> None:
    """An order and the same backwards: seven at least are eight."""
    runs, samples = FakeRuns(lambda depth, repetition: 1.0), {}
    measure(
        runs.prepare, ["a"], (0, 6), 7, 0, samples, clock=runs.clock, stopping=Stopping(30, 0.01, ratios_of)
    )
    assert len(samples["a"]) == 8


def test_the_interval_of_every_variant_counts() -> None:
    """The third variant alone is noisy."""
    noise = random.Random(1)
    runs = FakeRuns(lambda depth, repetition: 1 + noise.gauss(0, 0.2) * (depth == 9))
    samples: Samples[str] = {}
    measure(
        runs.prepare, ["a"], (0, 6, 9), 6, 0, samples, clock=runs.clock,
        stopping=Stopping(20, 0.01, ratios_of),
    )  # fmt: skip
    assert len(samples["a"]) == 20


def budgeted(
    seconds: float, noise: float = 0.01, least: int = 6
) -> tuple[FakeRuns, dict[str, int], dict[str, StopReason]]:
    """Of "long", 7,000 s a repetition, and "short", 1,000 s and two runs: the runs, how often, and why not more."""
    rng = random.Random(1)

    def cost(depth: int, repetition: int) -> float:
        return (3000.0 if runs.log[-1][0] == "long" else 1.0) * (1 + noise * rng.random())

    runs = FakeRuns(cost)
    samples: Samples[str] = {}
    stops: dict[str, StopReason] = {}
    began = runs.now
    measure(
        runs.prepare, ["long", "short"], (0, 6), least, 0, samples, clock=runs.clock, stops=stops,
        stopping=Stopping(30, 0.001, ratios_of, seconds=seconds),
    )  # fmt: skip
    assert runs.now - began <= seconds
    return runs, {name: len(repetitions) for name, repetitions in samples.items()}, stops


def test_the_least_repetitions_come_before_narrow_intervals() -> None:
    """Seven times each, warm-ups included, take 56,000 s; half of the other 13,000 are too few for a long one more."""
    runs, counts, stops = budgeted(69_000.0)
    assert counts == {"long": 6, "short": 18}
    assert stops == {"long": "time", "short": "time"}
    assert [workload for workload, repetition, _ in runs.log if repetition == 0] == ["long"] * 2 + [
        "short"
    ] * 2


def test_what_is_left_is_shared_out_over_those_that_are_not_narrow() -> None:
    """24,000 s are left for each: three long repetitions, and as many short ones as there may be."""
    runs, counts, stops = budgeted(105_000.0)
    assert counts == {"long": 9, "short": 30} and stops == {"long": "time", "short": "repetitions"}
    # Taken up again, a workload goes on with its orders.
    for workload, count in counts.items():
        order = [depth for name, repetition, depth in runs.log if name == workload and repetition]
        planned = alternated_orders((0, 6), count, random.Random(f"0 {workload}"))
        assert order == [depth for each in planned for depth in each]
    narrow = budgeted(105_000.0, noise=0.0)
    assert narrow[1:] == ({"long": 6, "short": 6}, {"long": "interval", "short": "interval"})


def test_an_odd_least_number_is_made_even_by_what_is_left() -> None:
    assert budgeted(100_000.0, noise=0.0, least=7)[1:] == (
        {"long": 8, "short": 8}, {"long": "interval", "short": "interval"},
    )  # fmt: skip


def test_the_time_goes_in_order_and_every_workload_gets_a_repetition() -> None:
    """A repetition takes 1,002 s: 1,000 to prepare, and two runs; so does the warm-up."""
    runs = FakeRuns(lambda depth, repetition: 1.0 + random.Random(repetition * 10 + depth).random() / 10)
    samples: Samples[str] = {}
    stops: dict[str, StopReason] = {}
    seen: list[Progress] = []
    started = runs.now
    measure(
        runs.prepare, ["a", "b"], (0, 6), 6, 0, samples, clock=runs.clock, stops=stops, on_progress=seen.append,
        stopping=Stopping(30, 0.001, ratios_of, seconds=10_050.0),
    )  # fmt: skip
    assert {name: len(repetitions) for name, repetitions in samples.items()} == {"a": 6, "b": 2}
    assert stops == {"a": "time", "b": "time"}
    assert runs.now - started <= 10_050
    assert seen[-1].num_done == seen[-1].num_runs == 2 * (7 + 3)
    assert repeated(lambda depth, repetition: 1.0, seconds=1.0) == (1, "time")


def test_an_interrupt_while_intervals_are_narrowed_keeps_what_is_complete() -> None:
    noise = random.Random(1)
    runs = FakeRuns(lambda depth, repetition: 1 + noise.random(), interrupt_at=2 * 2 * 7 + 2 + 1)
    samples: Samples[str] = {}
    stops: dict[str, StopReason] = {}
    with pytest.raises(KeyboardInterrupt):
        measure(
            runs.prepare, ["a", "b"], (0, 6), 6, 0, samples, clock=runs.clock, stops=stops,
            stopping=Stopping(30, 0.001, ratios_of, seconds=1e6),
        )  # fmt: skip
    assert {name: len(repetitions) for name, repetitions in samples.items()} == {"a": 7, "b": 6}
    assert stops == {}


def test_time_that_a_workload_leaves_goes_to_the_others() -> None:
    noise = random.Random(1)
    runs = FakeRuns(lambda depth, repetition: 1.0 if runs.log[-1][0] == "a" else 1 + noise.gauss(0, 0.1))
    samples: Samples[str] = {}
    measure(
        runs.prepare, ["a", "b"], (0, 6), 6, 0, samples, clock=runs.clock,
        stopping=Stopping(30, 0.01, ratios_of, seconds=30_000.0),
    )  # fmt: skip
    assert len(samples["a"]) == 6
    assert len(samples["b"]) > 15 - 1  # its half of the time alone


def test_orders_of_a_workload_do_not_depend_on_how_often_others_ran() -> None:
    def order_of_b(count: int) -> list[int]:
        runs = FakeRuns(lambda depth, repetition: 1.0)
        measure(runs.prepare, ["a"] * count + ["b"], (0, 3, 6), 4, 0, {}, clock=runs.clock)
        return [depth for workload, _, depth in runs.log if workload == "b"]

    assert order_of_b(0) == order_of_b(1)


def test_variants_may_differ_from_workload_to_workload() -> None:
    runs = FakeRuns(lambda depth, repetition: 1.0)
    samples: Samples[str] = {}
    measure(
        runs.prepare, ["a", "b"], lambda name: (0, 6) if name == "a" else (0,), 2, 0, samples,
        clock=runs.clock,
    )  # fmt: skip
    assert [set(times) for times in (*samples["a"], *samples["b"])] == [{0, 6}, {0, 6}, {0}, {0}]


def test_progress_shrinks_to_what_was_run() -> None:
    seen: list[Progress] = []
    runs = FakeRuns(lambda depth, repetition: 1.0)
    measure(
        runs.prepare, ["a", "b"], (0, 6), 6, 0, {}, clock=runs.clock, on_progress=seen.append,
        stopping=Stopping(30, 0.01, ratios_of),
    )  # fmt: skip
    assert (seen[0].num_done, seen[0].num_runs) == (0, 2 * 31 * 2)
    assert (seen[-1].num_done, seen[-1].num_runs) == (2 * 7 * 2, 2 * 7 * 2)
    assert "repetition 6 of 6 to 30" in seen[-2].next_run


class FakeWatch:
    """Moves the clock, which must not be measured."""

    def __init__(self, runs: FakeRuns) -> None:
        self.runs, self.log = runs, []

    def begin_repetition(self, workload: str, repetition: int) -> None:
        self.log.append((workload, repetition))
        self.runs.now += 7.0

    @contextmanager
    def run(self) -> Iterator[None]:
        self.runs.now += 100.0
        yield
        self.runs.now += 50.0
        self.log.append("run")


def test_what_the_watch_does_is_not_timed_and_the_warm_up_is_not_watched() -> None:
    runs = FakeRuns(lambda depth, repetition: 1.0)
    watch = FakeWatch(runs)
    samples: Samples[str] = {}
    measure(runs.prepare, ["a"], (0, 6), 2, 0, samples, clock=runs.clock, watch=watch)
    assert samples["a"] == [{0: 1.0, 6: 1.0}] * 2
    assert watch.log == [("a", 1), "run", "run", ("a", 2), "run", "run"]


def test_a_planted_slowdown_is_found_and_equal_variants_come_out_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 simulated measurements: noise of 1 %, one run in twenty up to 30 % slower, a clock that drifts by 8 %.

    Variant 5 is 5 % slower than the baseline, variant 1 its copy.
    """
    monkeypatch.setattr("sleb.benchmarks.harness.gc", SimpleNamespace(**dict.fromkeys(_COLLECTIONS, int)))
    num_seeds, found, equal, repetitions = 200, 0, 0, 0
    for seed in range(num_seeds):
        rng = random.Random(seed)

        def cost(variant: int, repetition: int, rng: random.Random = rng) -> float:
            drift = 1 + 0.08 * repetition / 30
            spell = 1 + (rng.uniform(0, 0.3) if rng.random() < 1 / 20 else 0.0)
            return (1.05 if variant == 5 else 1.0) * drift * spell * rng.lognormvariate(0, 0.01)

        runs, samples = FakeRuns(cost), {}
        measure(
            runs.prepare, ["a"], (0, 1, 5), 6, seed, samples, clock=runs.clock,
            stopping=Stopping(30, 0.01, ratios_of),
        )  # fmt: skip
        times = samples["a"]
        found += verdict(ratio_interval([each[0] / each[5] for each in times])) == "slower"
        equal += verdict(ratio_interval([each[0] / each[1] for each in times])) == "no difference"
        repetitions += len(times)
    assert found / num_seeds >= 0.99
    assert equal / num_seeds >= 0.92
    assert 12 < repetitions / num_seeds < 25

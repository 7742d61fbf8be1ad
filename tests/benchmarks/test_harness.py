"""Turn-taking and pairing, on a clock that only the runs move."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sleb.benchmarks.harness import Progress, Samples, alternated_orders, measure
from sleb.benchmarks.results import make_row


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


def test_a_slow_spell_meets_all_depths_and_leaves_the_speedup_alone() -> None:
    """A machine that gets ten times slower during one repetition: medians of times move, paired ratios do not."""
    slow = {1: 1.0, 2: 10.0, 3: 12.0, 4: 1.0, 5: 9.0}
    runs = FakeRuns(lambda depth, repetition: slow.get(repetition, 1.0) * (1.2 if depth == 0 else 1.0))
    samples: Samples[str] = {}
    measure(runs.prepare, ["a"], (0, 6), 5, 0, samples, clock=runs.clock)
    row = make_row("generate", 6, 0, samples["a"], counted_tokens=90, ideal_speedup=1.25, **facts())
    assert row.seconds_samples == pytest.approx([1.0, 10.0, 12.0, 1.0, 9.0])
    assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx((1.2, 1.2, 1.2))
    assert row.ideal_gain_share == pytest.approx(0.8)
    assert row.tokens_per_second == pytest.approx(10.0)
    assert row.relative_spread == pytest.approx((90 - 7.5) / 2 / 10)
    assert row.noisy


def test_speedup_is_the_median_of_ratios_not_the_ratio_of_medians() -> None:
    repetitions = [{0: 2.0, 6: 1.0}, {0: 3.0, 6: 2.0}, {0: 9.0, 6: 8.0}]
    row = make_row("prompt", 6, 0, repetitions, counted_tokens=1, ideal_speedup=1.0, **facts())
    assert row.speedup_samples == [2.0, 1.5, 1.125]
    assert (row.speedup, row.speedup_low, row.speedup_high) == (1.5, 1.125, 2.0)
    assert row.ideal_gain_share is None


def test_one_repetition_has_no_spread() -> None:
    row = make_row("prompt", 0, 0, [{0: 2.0}], counted_tokens=4, ideal_speedup=1.0, **facts())
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


def facts() -> dict[str, int]:
    return {
        "num_blocks_kept": 1,
        "batch": 1,
        "prompt_tokens": 1,
        "output_tokens": 1,
        "weight_bytes": 1,
        "kv_bytes_per_token": 1,
        "kv_bytes": 1,
    }

"""The estimate and interval of a ratio, against brute force and by simulation."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from statistics import median

import pytest

from sleb.benchmarks.record import Ratio
from sleb.benchmarks.stats import interval_rank, paired_ratio, signed_rank_counts, walsh_averages


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The estimate and the ends of its interval."""
    found = paired_ratio(ratios)
    assert found.low is not None and found.high is not None
    return found.estimate, found.low, found.high


def signed_rank(values: list[float], centre: float) -> int:
    """Wilcoxon's statistic by its definition: the sum of the ranks of |x − centre| over the values above it."""
    ordered = sorted(values, key=lambda value: abs(value - centre))
    return sum(rank for rank, value in enumerate(ordered, 1) if value > centre)


@pytest.mark.parametrize("num_values", range(1, 12))
def test_the_null_distribution_is_that_of_all_sign_assignments(num_values: int) -> None:
    signs = itertools.product((0, 1), repeat=num_values)
    sums = Counter(sum(rank for rank, sign in enumerate(each, 1) if sign) for each in signs)
    counts = signed_rank_counts(num_values)
    assert list(counts) == [sums[total] for total in range(num_values * (num_values + 1) // 2 + 1)]


@pytest.mark.parametrize("num_values", range(6, 31))
def test_the_rank_is_the_greatest_that_covers(num_values: int) -> None:
    rank = interval_rank(num_values)
    assert rank is not None
    counts, total = signed_rank_counts(num_values), 2**num_values
    assert 1 - 2 * sum(counts[:rank]) / total >= 0.95 > 1 - 2 * sum(counts[: rank + 1]) / total


def test_ranks_of_the_printed_tables() -> None:
    """Critical values of the signed rank statistic, two-sided 5 %, as printed: the rank is one more."""
    printed = {6: 0, 7: 2, 8: 3, 9: 5, 10: 8, 12: 13, 15: 25, 20: 52, 25: 89, 30: 137}
    assert {n: (interval_rank(n) or 0) - 1 for n in printed} == printed
    assert [interval_rank(n) for n in range(1, 6)] == [None] * 5


@pytest.mark.parametrize("num_values", [6, 7, 9, 10])
def test_the_interval_is_where_the_test_does_not_reject(num_values: int) -> None:
    """Brute force: a centre lies in the interval if and only if its p-value, over all signs, is above 5 %."""
    rng = random.Random(num_values)
    ratios = [math.exp(rng.gauss(0.1, 0.05)) for _ in range(num_values)]
    logs = [math.log(ratio) for ratio in ratios]
    _, low, high = interval(ratios)
    sums = [
        sum(rank for rank, sign in enumerate(signs, 1) if sign)
        for signs in itertools.product((0, 1), repeat=num_values)
    ]
    for step in range(-400, 600):
        centre = step / 1000 + 1e-7
        statistic = signed_rank(logs, centre)
        tail = min(sum(total <= statistic for total in sums), sum(total >= statistic for total in sums))
        inside = math.log(low) <= centre <= math.log(high)
        assert inside is (2 * tail / len(sums) > 0.05), centre


def test_the_estimate_by_hand() -> None:
    """Walsh averages of 0, 1, 5 are 0, ½, 1, 2½, 3, 5: their median is 1¾."""
    assert list(walsh_averages([5.0, 0.0, 1.0])) == [0.0, 0.5, 1.0, 2.5, 3.0, 5.0]
    found = paired_ratio([math.exp(value) for value in (5.0, 0.0, 1.0)])
    assert found.estimate == pytest.approx(math.exp(1.75))
    assert (found.low, found.high, found.half_width) == (None, None, math.inf)


def test_one_over_the_ratios_is_one_over_the_interval() -> None:
    ratios = [1.2, 1.1, 1.25, 1.19, 1.3, 1.22, 1.21]
    found, inverse = paired_ratio(ratios), paired_ratio([1 / ratio for ratio in ratios])
    estimate, low, high = interval(ratios)
    assert interval([1 / ratio for ratio in ratios]) == pytest.approx((1 / estimate, 1 / high, 1 / low))
    assert (found.verdict, inverse.verdict) == ("faster", "slower")


def test_verdicts() -> None:
    assert Ratio(1.1, 1.001, 1.2).verdict == "faster"
    assert Ratio(0.9, 0.8, 0.999).verdict == "slower"
    assert Ratio(1.1, 1.0, 1.2).verdict == "no difference"
    assert Ratio(1.1).verdict == "no difference"  # too few turns to tell
    assert paired_ratio([1.0] * 8).verdict == "no difference"


def test_one_slow_repetition_of_twelve_does_not_move_it() -> None:
    steady = [1.19, 1.2, 1.21, 1.2, 1.19, 1.21, 1.2, 1.2, 1.21, 1.19, 1.2]
    estimate, _, high = interval([*steady, 3.0])
    assert estimate == pytest.approx(1.2, rel=0.01)
    assert high < 1.22


def gaussian(rng: random.Random) -> float:
    return rng.gauss(0, 0.02)


def heavy(rng: random.Random) -> float:
    """Student's t with two degrees of freedom, whose variance is infinite."""
    return 0.01 * rng.gauss(0, 1) / math.sqrt(rng.expovariate(1.0))


def spells(rng: random.Random) -> float:
    """Quiet, but for one repetition in eight in which either side may meet a spell of up to 50 %."""
    return rng.gauss(0, 0.005) + (rng.uniform(-0.5, 0.5) if rng.random() < 0.125 else 0.0)


@pytest.mark.parametrize("noise", [gaussian, heavy, spells])
@pytest.mark.parametrize("num_values", [6, 12, 20])
def test_coverage(noise: Callable[[random.Random], float], num_values: int) -> None:
    """Of 1,500 intervals at least 95 % cover; three standard errors are 1.7 %."""
    rng, true, covered = random.Random(num_values), 1.19, 0
    runs = 1500
    estimates = []
    for _ in range(runs):
        estimate, low, high = interval([true * math.exp(noise(rng)) for _ in range(num_values)])
        covered += low <= true <= high
        estimates.append(estimate)
    assert covered / runs >= 0.95 - 0.017
    assert median(estimates) == pytest.approx(true, rel=0.002)


@pytest.mark.parametrize(("noise", "at_least"), [(gaussian, 0.92), (heavy, 0.92), (spells, 0.92)])
def test_coverage_when_repeated_until_it_is_narrow(
    noise: Callable[[random.Random], float], at_least: float
) -> None:
    """Looking after every pair of repetitions, from 6 to 30, until the half width is 1 %, costs a few percent."""
    rng, covered, runs = random.Random(5), 0, 400
    for _ in range(runs):
        ratios: list[float] = []
        while len(ratios) < 30:
            ratios += [math.exp(noise(rng)) for _ in range(2)]
            if len(ratios) >= 6 and paired_ratio(ratios).half_width <= 0.01:
                break
        _, low, high = interval(ratios)
        covered += low <= 1 <= high
    assert covered / runs >= at_least


@pytest.mark.parametrize("num_values", [101, 120, 137])
def test_above_a_hundred_the_rank_is_approximated_from_below(num_values: int) -> None:
    rank = interval_rank(num_values)
    assert rank is not None
    below, exact = itertools.accumulate(signed_rank_counts(num_values)), 0
    while next(below) <= 0.025 * 2**num_values:
        exact += 1
    assert exact - 3 <= rank <= exact


@pytest.mark.parametrize("num_values", [101, 102])
@pytest.mark.parametrize("grain", [1e-9, 0.01])
def test_above_a_hundred_the_ends_are_at_the_approximated_ranks(num_values: int, grain: float) -> None:
    """Equal averages among them too."""
    rng = random.Random(num_values)
    logs = [grain * round(rng.gauss(0.1, 0.05) / grain) for _ in range(num_values)]
    averages, rank = walsh_averages(logs), interval_rank(num_values)
    assert rank is not None
    wanted = [math.exp(value) for value in (median(averages), averages[rank - 1], averages[-rank])]
    assert interval([math.exp(value) for value in logs]) == pytest.approx(wanted, rel=1e-12)


def test_thousands_of_ratios_have_an_interval() -> None:
    """2¹⁰²⁴ is past what a float holds."""
    rng = random.Random(7)
    ratios = [1.19 * math.exp(rng.gauss(0, 0.02)) for _ in range(2000)]
    _, low, high = interval(ratios)
    assert 1.185 < low < 1.19 < high < 1.195
    assert paired_ratio([1.0] * 1024).verdict == "no difference"
    assert interval_rank(10_000) is not None

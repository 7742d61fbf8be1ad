"""How much faster one variant is than another, from ratios paired within repetitions, with a confidence interval.

The logarithms of the ratios are taken to be independent and symmetric about one value, and nothing else: not normal,
not free of outliers. The estimate is the Hodges–Lehmann one, the median of the Walsh averages (x_i + x_j) / 2, i ≤ j
(Hodges & Lehmann 1963, "Estimates of location based on rank tests", Annals of Mathematical Statistics 34). The interval
is the distribution-free one of Wilcoxon's signed rank statistic: its ends are the k-th smallest and the k-th largest
Walsh average, k from the statistic's exact distribution (Hollander & Wolfe, "Nonparametric Statistical Methods",
section 3.3). It covers the true value with at least the level asked for.

Whoever repeats until the interval is narrow looks at it more than once, which costs a little of that level, see
`UNTIL_NARROW`.

Above 100 ratios k is that of the normal approximation (Hollander & Wolfe, same section), rounded down: the exact
distribution has lighter tails, so the level is still met. The averages are then counted, not listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, median
from typing import Literal

from sleb.benchmarks.record import Ratio

LEVEL = 0.95
# With fewer, even the widest interval, from the least to the greatest, has a level below 95 %: 1 − 2 / 2⁵ is 93.75 %.
LEAST_FOR_LEVEL = 6
# What is left of the level where repetitions go on until the interval is narrow, by simulation
# (`tests/benchmarks/test_intervals.py`).
UNTIL_NARROW = "92 to 95 %"
# With more ratios the distribution is approximated, and averages are counted.
_MOST_EXACT = 100

Verdict = Literal["baseline", "faster", "slower", "no difference"]


@dataclass(frozen=True)
class RatioInterval:
    """An estimate of a ratio. level: of the interval; None where low and high are the least and greatest ratio."""

    estimate: float
    low: float
    high: float
    level: float | None

    @property
    def half_width(self) -> float:
        """Half the interval's width over the estimate; infinite where it has no level."""
        return math.inf if self.level is None else (self.high - self.low) / 2 / self.estimate


def ratio_interval(ratios: Sequence[float], level: float = LEVEL) -> RatioInterval:
    """The estimate of the ratio that `ratios`, positive, one a repetition, scatter about."""
    logs = sorted(math.log(ratio) for ratio in ratios)
    rank = interval_rank(len(logs), level)
    if len(logs) > _MOST_EXACT:
        assert rank is not None, f"no rank for {len(logs)} values"
        return _interval_by_counting(logs, rank, level)
    averages = walsh_averages(logs)
    estimate = math.exp(median(averages))
    if rank is None:
        return RatioInterval(estimate, min(ratios), max(ratios), None)
    return RatioInterval(estimate, math.exp(averages[rank - 1]), math.exp(averages[-rank]), level)


def paired_ratio(ratios: Sequence[float]) -> Ratio:
    """What `ratios`, one a turn, say: the estimate, and its 95 % interval from six on."""
    found = ratio_interval(ratios)
    return Ratio(found.estimate) if found.level is None else Ratio(found.estimate, found.low, found.high)


def walsh_averages(values: Sequence[float]) -> list[float]:
    """(x_i + x_j) / 2 for all i ≤ j, ascending."""
    return sorted((first + second) / 2 for i, first in enumerate(values) for second in values[i:])


def _interval_by_counting(ordered: Sequence[float], rank: int, level: float) -> RatioInterval:
    num_averages = len(ordered) * (len(ordered) + 1) // 2
    middle = (num_averages + 1) // 2, num_averages // 2 + 1  # one and the same of an odd number
    ends = [kth_walsh_average(ordered, each) for each in (rank, num_averages + 1 - rank)]
    estimate = sum(kth_walsh_average(ordered, each) for each in middle) / 2
    return RatioInterval(math.exp(estimate), math.exp(ends[0]), math.exp(ends[1]), level)


def kth_walsh_average(ordered: Sequence[float], rank: int) -> float:
    """The average of that rank, 1 the least, by halving: of ascending values, whose averages are n²/2 to list."""
    low, high = ordered[0], ordered[-1]
    for _ in range(60):  # then the last bit is settled
        middle = (low + high) / 2
        if _num_averages_to(ordered, middle) >= rank:
            high = middle
        else:
            low = middle
    return high


def _num_averages_to(ordered: Sequence[float], limit: float) -> int:
    """How many Walsh averages are at most `limit`."""
    count, last = 0, len(ordered) - 1
    for first, value in enumerate(ordered):
        while last >= first and value + ordered[last] > 2 * limit:
            last -= 1
        if last < first:
            break
        count += last - first + 1
    return count


def signed_rank_counts(num_values: int) -> tuple[int, ...]:
    """Of the 2ⁿ ways to give signs to the ranks 1 … n, how many have positive ranks that sum to 0, 1, … n(n+1)/2."""
    counts = [1]
    for rank in range(1, num_values + 1):
        counts = [
            (counts[total] if total < len(counts) else 0) + (counts[total - rank] if total >= rank else 0)
            for total in range(len(counts) + rank)
        ]
    return tuple(counts)


@cache
def interval_rank(num_values: int, level: float = LEVEL) -> int | None:
    """The greatest k for which the k-th Walsh averages from both ends cover with `level`; None where no k does.

    They cover with a probability of 1 − 2 · P(W⁺ < k). Above 100 values W⁺ is taken to be normal, of mean n(n+1)/4 and
    variance n(n+1)(2n+1)/24.
    """
    if num_values > _MOST_EXACT:
        pairs = num_values * (num_values + 1)
        deviation = math.sqrt(pairs * (2 * num_values + 1) / 24)
        return math.floor(pairs / 4 + NormalDist().inv_cdf((1 - level) / 2) * deviation)
    allowed = (1 - level) / 2 * 2**num_values
    rank, below = 0, 0
    for count in signed_rank_counts(num_values):
        below += count
        if below > allowed:
            break
        rank += 1
    return rank or None


def verdict(interval: RatioInterval) -> Verdict:
    """What the interval shows. Without a level it shows nothing: "no difference"."""
    if interval.level is None or interval.low <= 1 <= interval.high:
        return "no difference"
    return "faster" if interval.low > 1 else "slower"

"""How much faster one variant is than another, from ratios paired within repetitions, with a confidence interval.

The logarithms of the ratios are taken to be independent and symmetric about one value, and nothing else: not normal,
not free of outliers. The estimate is the Hodges–Lehmann one, the median of the Walsh averages (x_i + x_j) / 2, i ≤ j
(Hodges & Lehmann 1963, "Estimates of location based on rank tests", Annals of Mathematical Statistics 34). The interval
is the distribution-free one of Wilcoxon's signed rank statistic: its ends are the k-th smallest and the k-th largest
Walsh average, k from the statistic's exact distribution (Hollander & Wolfe, "Nonparametric Statistical Methods",
section 3.3). It covers the true value with at least the level asked for.

Whoever repeats until the interval is narrow looks at it more than once, which costs a little of that level:
`tests/benchmarks/test_intervals.py` says how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import Literal

LEVEL = 0.95
# With fewer, even the widest interval, from the least to the greatest, has a level below 95 %: 1 − 2 / 2⁵ is 93.75 %.
LEAST_FOR_LEVEL = 6

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
    averages = walsh_averages([math.log(ratio) for ratio in ratios])
    estimate = math.exp(median(averages))
    rank = interval_rank(len(ratios), level)
    if rank is None:
        return RatioInterval(estimate, min(ratios), max(ratios), None)
    return RatioInterval(estimate, math.exp(averages[rank - 1]), math.exp(averages[-rank]), level)


def walsh_averages(values: Sequence[float]) -> list[float]:
    """(x_i + x_j) / 2 for all i ≤ j, ascending."""
    return sorted((first + second) / 2 for i, first in enumerate(values) for second in values[i:])


@cache
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

    They cover with a probability of 1 − 2 · P(W⁺ < k).
    """
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

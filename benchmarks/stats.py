"""How much better one subject is than another, from ratios paired within turns, with a confidence interval.

The logarithms of the ratios are taken to be independent and symmetric about one value, and nothing else: not normal,
not free of outliers. The estimate is the Hodges–Lehmann one, the median of the Walsh averages (x_i + x_j) / 2, i ≤ j
(Hodges & Lehmann 1963, "Estimates of location based on rank tests", Annals of Mathematical Statistics 34). The interval
is the distribution-free one of Wilcoxon's signed rank statistic: its ends are the k-th smallest and the k-th largest
Walsh average, k from the statistic's exact distribution (Hollander & Wolfe, "Nonparametric Statistical Methods",
section 3.3). It covers the true value with at least 95 %; of fewer than six ratios even the widest, from the least to
the greatest, does not: 1 − 2 / 2⁵ is 93.75 %.

Whoever repeats until the interval is narrow looks at it more than once, which leaves 92 to 95 %, by simulation
(`tests/benchmarks/test_intervals.py`).

Above 100 ratios k is that of the normal approximation (Hollander & Wolfe, same section), rounded down: the exact
distribution has lighter tails, so the level is still met.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING

from sleb.benchmarks.record import Ratio

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

_LEVEL = 0.95
_MOST_EXACT = 100  # with more ratios the distribution is approximated


def paired_ratio(ratios: Sequence[float]) -> Ratio:
    """The estimate of the ratio that `ratios`, positive, one a turn, scatter about; from six on with an interval."""
    averages = walsh_averages([math.log(ratio) for ratio in ratios])
    middle = float(averages[(len(averages) - 1) // 2] + averages[len(averages) // 2]) / 2
    rank = interval_rank(len(ratios))
    ends = () if rank is None else (averages[rank - 1], averages[-rank])
    return Ratio(*map(math.exp, (middle, *ends)))


def walsh_averages(values: Sequence[float]) -> NDArray[float64]:
    """(x_i + x_j) / 2 for all i ≤ j, ascending: of n values n (n + 1) / 2."""
    import numpy as np  # which help and slips on the command line do without

    first, second = np.triu_indices(len(values))
    array = np.array(values)
    return np.sort((array[first] + array[second]) / 2)


def signed_rank_counts(num_values: int) -> tuple[int, ...]:
    """Of the 2ⁿ ways to give signs to the ranks 1 … n, how many have positive ranks that sum to 0, 1, … n(n+1)/2."""
    counts = [1]
    for rank in range(1, num_values + 1):
        added = [0] * rank
        counts = [without + having for without, having in zip(counts + added, added + counts, strict=True)]
    return tuple(counts)


@cache
def interval_rank(num_values: int) -> int | None:
    """The greatest k for which the k-th Walsh averages from both ends cover with the level; None where no k does.

    They cover with a probability of 1 − 2 · P(W⁺ < k). Above 100 values W⁺ is taken to be normal, of mean n(n+1)/4 and
    variance n(n+1)(2n+1)/24.
    """
    if num_values > _MOST_EXACT:
        pairs = num_values * (num_values + 1)
        deviation = math.sqrt(pairs * (2 * num_values + 1) / 24)
        return math.floor(pairs / 4 + NormalDist().inv_cdf((1 - _LEVEL) / 2) * deviation)
    allowed = (1 - _LEVEL) / 2 * 2**num_values
    return sum(below <= allowed for below in accumulate(signed_rank_counts(num_values))) or None

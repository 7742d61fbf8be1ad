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
distribution has lighter tails, so the level is still met. The averages are then counted, not listed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist, median

from sleb.benchmarks.record import Ratio

_LEVEL = 0.95
# With more ratios the distribution is approximated, and averages are counted.
_MOST_EXACT = 100


def paired_ratio(ratios: Sequence[float]) -> Ratio:
    """The estimate of the ratio that `ratios`, positive, one a turn, scatter about; from six on with an interval."""
    logs = sorted(math.log(ratio) for ratio in ratios)
    rank, count = interval_rank(len(logs)), len(logs)
    if count <= _MOST_EXACT:
        averages = walsh_averages(logs)
        if rank is None:
            return Ratio(math.exp(median(averages)))
        found = [median(averages), averages[rank - 1], averages[-rank]]
    else:
        assert rank is not None, f"no rank for {count} values"
        num_averages = count * (count + 1) // 2
        middle = (num_averages + 1) // 2, num_averages // 2 + 1  # one and the same of an odd number
        found = [sum(kth_walsh_average(logs, each) for each in middle) / 2]
        found += [kth_walsh_average(logs, each) for each in (rank, num_averages + 1 - rank)]
    return Ratio(*map(math.exp, found))


def walsh_averages(values: Sequence[float]) -> list[float]:
    """(x_i + x_j) / 2 for all i ≤ j, ascending."""
    return sorted((first + second) / 2 for i, first in enumerate(values) for second in values[i:])


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
    rank, below = 0, 0
    for count in signed_rank_counts(num_values):
        below += count
        if below > allowed:
            break
        rank += 1
    return rank or None

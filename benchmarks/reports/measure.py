"""One main figure of a result, with the interval that its samples give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sleb.benchmarks.stats import LEAST_FOR_LEVEL, LEVEL

Interval = tuple[float, float]

_Z = 1.96
_MANY = 100


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        name: what was measured, by which rows of two results are matched.
        unit: of value, as "tokens/s". higher_is_better: whether more of it is better.
        interval: around value; None where there are too few samples. speedup: a ratio that the row itself tells.
    """

    name: str
    value: float
    unit: str
    higher_is_better: bool = True
    interval: Interval | None = None
    speedup: float | None = None

    def check(self) -> None:
        """Raises ValueError for what is no number: it may come from a file."""
        figures: list[Any] = [self.value, *(self.interval or ())]
        if self.speedup is not None:
            figures.append(self.speedup)
        for figure in figures:
            if not isinstance(figure, int | float) or not math.isfinite(figure):
                raise ValueError(f"{self.name}: {figure!r} is no number")


def sample_interval(samples: Sequence[float] | None) -> Interval | None:
    """Where the median that samples scatter about is: a 95 % interval by ranks. None for fewer than six samples.

    From the k-th smallest to the k-th largest, which covers it unless fewer than k samples fall on one side: two tails
    of a binomial distribution (David & Nagaraja, "Order Statistics", section 7.1). Even the least and the greatest of
    five cover it with 1 − 2 / 2⁵ only, which is below 95 %.
    """
    if not samples or len(samples) < LEAST_FOR_LEVEL:
        return None
    ordered = sorted(samples)
    rank = _interval_rank(len(ordered))
    return ordered[rank - 1], ordered[-rank]


def _interval_rank(num_samples: int) -> int:
    """The greatest k that covers the median with 95 %, of six samples or more."""
    if num_samples > _MANY:  # the normal approximation, rounded so that it covers more
        return math.floor((num_samples - _Z * math.sqrt(num_samples)) / 2)
    rank, tail = 0, 0.0
    while tail <= (1 - LEVEL) / 2:
        tail += math.comb(num_samples, rank) / 2**num_samples
        rank += 1
    return rank - 1

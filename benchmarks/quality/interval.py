"""Confidence intervals for means over a text, whose tokens are anything but independent.

Batch means (Schmeiser 1982, "Batch size effects in the analysis of simulation output", Operations Research 30): the
values, in the order of the text, are cut into k stretches of equal length, whose means are nearly normal and nearly
independent, so Student's t with k − 1 degrees of freedom gives the interval. Schmeiser shows that 10 to 30 are enough.
Here k is 30, and 20 or 10 while the stretches' lag-1 autocorrelation (Law & Carson 1979, Operations Research 27) is
above 0.84 / √k, a test at 20 %: stretches that are too short cost coverage, needlessly long ones little width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BATCHES = (30, 20, 10)
_MIN_BATCH = 16  # values in a stretch, at least
_ONE_SIDED_Z = 0.84
# Student's t: the 97.5 % quantile for 1 to 29 degrees of freedom.
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; None where there are too few values for one."""

    value: float
    interval: tuple[float, float] | None

    def exp(self) -> Estimate:
        """The estimate of exp(mean), which is monotonic: the interval's ends are mapped."""
        value, *ends = (
            math.inf if each > 709 else math.exp(each) for each in (self.value, *(self.interval or ()))
        )
        return Estimate(value, (ends[0], ends[1]) if ends else None)

    def clamped(self, low: float, high: float) -> Estimate:
        """With the interval's ends kept between the least and the greatest value that there can be."""
        if self.interval is None:
            return self
        return Estimate(self.value, (max(self.interval[0], low), min(self.interval[1], high)))


def choose_num_batches(values: Tensor) -> int:
    """Into how many stretches values [N] are cut: see the module; 1 where there are too few for an interval."""
    fitting = [number for number in _BATCHES if number * _MIN_BATCH <= len(values)]
    for number in fitting:
        means = batch_means(values, number)
        means -= means.mean()
        if means[:-1] @ means[1:] <= _ONE_SIDED_Z / math.sqrt(number) * means.square().sum():
            return number
    return fitting[-1] if fitting else max(1, len(values) // _MIN_BATCH)


def batch_means(values: Tensor, num_batches: int) -> Tensor:
    """Means [num_batches] float64 of consecutive stretches of values [N], whose lengths differ by one at most."""
    return torch.stack([part.mean() for part in values.double().tensor_split(num_batches)])


def estimate(values: Tensor, num_batches: int) -> Estimate:
    """The mean of values [N], with the interval that `num_batches` stretches give it."""
    mean = float(values.double().mean())
    if num_batches < 2 or not math.isfinite(mean):
        return Estimate(mean, None)
    means = batch_means(values, num_batches)
    half = _T[min(num_batches - 1, len(_T)) - 1] * float(means.std()) / math.sqrt(num_batches)
    return Estimate(mean, (mean - half, mean + half))

"""Intervals for means of correlated values: coverage on synthetic data, and the table of Student's t."""

from __future__ import annotations

import math

import pytest
import torch

from sleb.benchmarks.quality.interval import _T, Estimate, batch_means, choose_num_batches, estimate

LENGTH = 6000
REPETITIONS = 400


def autoregressive(phi, seed=0):
    """REPETITIONS series of mean 2 and deviation 1, each value `phi` of the one before plus noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(LENGTH, REPETITIONS, generator=generator) * math.sqrt(1 - phi**2)
    series = torch.empty_like(noise)
    series[0] = torch.randn(REPETITIONS, generator=generator)
    for step in range(1, LENGTH):
        series[step] = phi * series[step - 1] + noise[step]
    return (series + 2).T


def coverage(series):
    inside = 0
    for values in series:
        low, high = estimate(values, choose_num_batches(values)).interval
        inside += low <= 2 <= high
    return inside / len(series)


class TestCoverage:
    def test_of_independent_values(self):
        assert 0.92 <= coverage(autoregressive(0.0)) <= 0.98

    def test_of_values_like_their_neighbours(self):
        """A correlation of 0.9 is worth 19 times fewer values: an interval that knows nothing of it covers 35 %."""
        series = autoregressive(0.9)
        half = 1.96 * series.std(1) / math.sqrt(LENGTH)
        naive = ((series.mean(1) - 2).abs() <= half).float().mean()
        assert naive < 0.5
        assert coverage(series) >= 0.91

    def test_stretches_grow_until_they_are_unlike(self):
        """A correlation that reaches over hundreds of values, as topics do."""
        series = autoregressive(0.99)
        assert coverage(series) >= 0.9
        fixed = [estimate(values, 30).interval for values in series]
        assert sum(low <= 2 <= high for low, high in fixed) / len(series) < coverage(series) - 0.02
        chosen = [choose_num_batches(values) for values in series[:100]]
        assert chosen.count(30) < 60
        assert [choose_num_batches(values) for values in autoregressive(0.0)[:100]].count(30) > 70

    def test_pairs_are_closer_than_the_values(self):
        text = autoregressive(0.9)[0]
        other = text + 0.1 + 0.05 * torch.randn(LENGTH, generator=torch.Generator().manual_seed(1))
        difference = estimate(other - text, 30)
        low, high = difference.interval
        assert low <= 0.1 <= high and high - low < 0.01
        apart = estimate(other, 30).interval
        assert (apart[1] - apart[0]) > 10 * (high - low)


class TestByHand:
    def test_two_stretches(self):
        """Means 1.5 and 3.5: 2.5 ± t(1) · √2 / √2."""
        values = torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert batch_means(values, 2).tolist() == [1.5, 3.5]
        found = estimate(values, 2)
        assert found.value == 2.5
        assert found.interval == pytest.approx((2.5 - 12.706, 2.5 + 12.706))

    def test_stretches_of_unequal_length_take_every_value(self):
        values = torch.arange(7.0)
        assert batch_means(values, 3).tolist() == [1.0, 3.5, 5.5]
        assert estimate(values, 3).value == 3.0

    @pytest.mark.parametrize(("length", "number"), [(31, 1), (32, 2), (100, 6), (160, 10), (1000, 30)])
    def test_as_many_stretches_as_the_values_are_enough_for(self, length, number):
        assert choose_num_batches(torch.ones(length)) == number

    def test_too_few_values_have_no_interval(self):
        assert estimate(torch.tensor([1.0, 3.0]), 1) == Estimate(2.0, None)
        assert estimate(torch.full((64,), math.nan), 4).interval is None

    def test_equal_values(self):
        values = torch.full((480,), 2.0)
        assert choose_num_batches(values) == 30
        assert estimate(values, 30) == Estimate(2.0, (2.0, 2.0))

    def test_exp_and_clamp(self):
        found = Estimate(0.0, (-1.0, 1000.0)).exp()
        assert found == Estimate(1.0, (math.exp(-1), math.inf))
        assert Estimate(0.5, (-0.1, 1.1)).clamped(0.0, 1.0) == Estimate(0.5, (0.0, 1.0))
        assert Estimate(0.5, None).clamped(0.0, 1.0).exp().interval is None


@pytest.mark.parametrize("freedom", range(1, 30))
def test_quantiles(freedom):
    """Half the area beyond ± t is 2.5 %: the density, integrated by the trapezoid rule in x = tan θ."""
    t = _T[freedom - 1]
    angle = torch.linspace(0, math.atan(t), 20001, dtype=torch.float64)
    density = (1 + angle.tan().square() / freedom) ** (-(freedom + 1) / 2) / angle.cos().square()
    logs = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)
    inside = float(torch.trapezoid(density, angle)) * math.exp(logs)
    assert inside == pytest.approx(0.475, abs=3e-5)

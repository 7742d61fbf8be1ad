"""Mixtures of experts in plain torch, against each token's sum worked out alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sleb.kernels.quantization import quantize_int4, quantize_int8
from sleb.kernels.reference.experts import mix_experts, route

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_highest_get_their_part_of_the_softmax(normalised):
    logits = 3 * random(50, 7)
    chosen, shares = route(logits, 3, normalised)
    for row, places, parts in zip(logits, chosen, shares, strict=True):
        order = sorted(range(7), key=lambda each: -row[each])[:3]
        assert places.tolist() == order
        among = order if normalised else range(7)
        total = sum(math.exp(row[each]) for each in among)
        assert parts.tolist() == pytest.approx([math.exp(row[each]) / total for each in order], rel=1e-5)


def test_a_correction_changes_the_choice_and_not_the_shares():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]])
    correction = torch.tensor([0.0, 0.0, 0.0, 5.0])
    chosen, shares = route(logits, 2, False, correction)
    assert chosen.tolist() == [[3, 0]]
    torch.testing.assert_close(shares, logits.softmax(-1)[:, [3, 0]])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "make", [lambda weight: weight, quantize_int8, quantize_int4], ids=["float", "8", "4"]
)
def test_each_token_gets_the_sum_of_its_experts(make, gated):
    """Of five experts one has no token; another has all."""
    width, inner, number = 12, 10, 5
    ups = [random(2 * inner if gated else inner, width) for _ in range(number)]
    downs = [random(width, inner) for _ in range(number)]
    up_bias, down_bias = random(number * ups[0].shape[0]), random(number * width)
    x, chosen, shares = random(9, width), torch.tensor([[0, 1], [3, 0], [0, 4]] * 3), random(9, 2)
    up, down = make(torch.cat(ups)), make(torch.cat(downs))
    found = mix_experts(x, up, up_bias, down, down_bias, chosen, shares, number, "silu", gated)
    plain_up, plain_down = (
        each if isinstance(each, torch.Tensor) else each.dequantize(torch.float32) for each in (up, down)
    )
    for row in range(9):
        total = torch.zeros(width)
        for expert, share in zip(chosen[row].tolist(), shares[row], strict=True):
            hidden = plain_up.view(number, -1, width)[expert] @ x[row] + up_bias.view(number, -1)[expert]
            hidden = F.silu(hidden[:inner]) * hidden[inner:] if gated else F.silu(hidden)
            total += share * (
                plain_down.view(number, width, -1)[expert] @ hidden + down_bias.view(number, -1)[expert]
            )
        torch.testing.assert_close(found[row], total, atol=1e-4, rtol=1e-4)


def test_rows_know_nothing_of_each_other():
    """A row of NaN is one alone, and no tokens give none."""
    up, down = random(4 * 6, 8), random(4 * 8, 3)
    x, logits = random(5, 8), random(5, 4)
    x[2], logits[2] = math.nan, math.nan
    chosen, shares = route(logits, 2, True)
    found = mix_experts(x, up, None, down, None, chosen, shares, 4, "silu", True)
    assert found.isnan().any(dim=1).tolist() == [False, False, True, False, False]
    for row in (0, 4):
        alone = mix_experts(
            x[row : row + 1],
            up,
            None,
            down,
            None,
            *(each[row : row + 1] for each in (chosen, shares)),
            4,
            "silu",
            True,
        )
        torch.testing.assert_close(alone[0], found[row], atol=1e-5, rtol=0)
    none = mix_experts(x[:0], up, None, down, None, chosen[:0], shares[:0], 4, "silu", True)
    assert none.shape == (0, 8)

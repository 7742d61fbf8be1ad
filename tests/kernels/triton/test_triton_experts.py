"""Mixtures of experts (Triton) against float64, a token and an expert at a time; rows past the count are NaN."""

from __future__ import annotations

import pytest
import torch

from sleb.kernels.quantization import GroupedWeight, Groups, quantize_int4, quantize_int8
from sleb.kernels.reference import device as device_reference
from sleb.kernels.triton.experts import grouped_linear, mix_experts
from sleb.kernels.triton.linear import CONFIGS

NAN = float("nan")
# experts, experts a token, features inside, hidden size, tokens
SHAPES = [(4, 2, 24, 40, 7), (5, 3, 33, 18, 4), (1, 1, 16, 16, 3), (64, 8, 16, 32, 2), (3, 2, 8, 130, 70)]
GATES = {
    "silu": lambda gate, up: gate * gate.sigmoid() * up,
    "clamped_swiglu": lambda gate, up: (
        gate.clamp(max=7) * (1.702 * gate.clamp(max=7)).sigmoid() * (up.clamp(-7, 7) + 1)
    ),
}


def as_grouped(weight):
    """Of eight bits, by groups of 32 with a zero point."""
    generator = torch.Generator().manual_seed(3)
    columns = weight.shape[1]
    q = torch.randint(0, 256, weight.shape, generator=generator, dtype=torch.uint8)
    groups = (weight.shape[0], -(-columns // 32))
    scale = 0.002 * (1 + torch.rand(groups, generator=generator))
    zero = torch.randint(100, 156, groups, generator=generator)
    return GroupedWeight.of(q, scale.half(), zero.half(), Groups(8, 32, "zero"))


STORED = {"plain": lambda weight: weight, "int8": quantize_int8, "int4": quantize_int4, "grouped": as_grouped}


class Case:
    """The arguments of one call; the tokens from `present` on are not there, and their experts no experts at all."""

    def __init__(self, device, randn, shape, dtype, present, stored="plain", bias=False, gated=True):
        number, top_k, inner, hidden, tokens = shape
        self.number, self.present, self.dtype, self.gated = number, present, dtype, gated
        self.x = randn(tokens, hidden, dtype=dtype)
        self.x[present:] = NAN
        rows = number * inner * (2 if gated else 1)
        up, down = 0.5 * randn(rows, hidden, dtype=dtype), 0.5 * randn(number * hidden, inner, dtype=dtype)
        self.up, self.down = STORED[stored](up), STORED[stored](down)
        self.biases = [randn(size, dtype=dtype) if bias else None for size in (rows, number * hidden)]
        generator = torch.Generator().manual_seed(tokens)
        every = [torch.randperm(number, generator=generator)[:top_k] for _ in range(tokens)]
        self.chosen = torch.stack(every).to(device)
        self.shares = torch.rand(tokens, top_k, generator=generator).to(device)
        self.count = torch.tensor([present], dtype=torch.int32, device=device)

    def run(self, operator, activation="silu"):
        (up_bias, down_bias), form = self.biases, (self.number, activation, self.gated)
        weights = (self.up, up_bias, self.down, down_bias)
        return operator(self.x, *weights, self.chosen, self.shares, *form, self.count)

    def expected(self, activation="silu"):
        """[present, E] float64 of weights as they are stored."""
        up, down = (
            each if isinstance(each, torch.Tensor) else each.dequantize(self.dtype)
            for each in (self.up, self.down)
        )
        up, down = (each.double().cpu().view(self.number, -1, each.shape[1]) for each in (up, down))
        up_bias, down_bias = (
            torch.zeros(self.number, 1).double()
            if each is None
            else each.double().cpu().view(self.number, -1)
            for each in self.biases
        )
        out = torch.zeros(self.present, self.x.shape[1], dtype=torch.float64)
        for token in range(self.present):
            for expert, share in zip(
                self.chosen[token].tolist(), self.shares[token].double().cpu(), strict=True
            ):
                hidden = up[expert] @ self.x[token].double().cpu() + up_bias[expert]
                hidden = hidden.to(self.dtype).double()
                hidden = GATES[activation](*hidden.chunk(2)) if self.gated else hidden.clamp_min(0)
                update = down[expert] @ hidden.to(self.dtype).double() + down_bias[expert]
                out[token] += share * update.to(self.dtype).double()
        return out


def check(out, case, activation="silu"):
    assert out.shape == case.x.shape and out.dtype == case.dtype
    expected = case.expected(activation)
    # Three results are rounded on the way, each to its own size.
    tolerance = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[
        case.dtype
    ] * expected.abs().max()
    torch.testing.assert_close(out[: case.present].double().cpu(), expected, atol=float(tolerance), rtol=0)


@pytest.mark.parametrize("operator", [mix_experts, device_reference.mix_experts], ids=["triton", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixtures(device, randn, dtype, shape, operator):
    case = Case(device, randn, shape, dtype, present=max(1, shape[-1] - 2), bias=shape[0] == 5)
    check(case.run(operator), case)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("activation", GATES)
def test_formats_and_gates(device, randn, stored, activation):
    case = Case(device, randn, SHAPES[0], torch.float32, 6, stored, bias=True)
    check(case.run(mix_experts, activation), case, activation)


def test_experts_without_gates(device, randn):
    case = Case(device, randn, SHAPES[1], torch.float32, 4, gated=False)
    check(case.run(mix_experts, "relu"), case, "relu")


def test_all_tokens_of_one_expert_and_none_at_all(device, randn):
    """An expert may have every row of a step, in more blocks than one; a step may have no rows."""
    case = Case(device, randn, (3, 1, 8, 16, 150), torch.float32, present=150)
    case.chosen[:] = 1
    check(case.run(mix_experts), case)
    case.count.zero_()
    assert case.run(mix_experts).shape == case.x.shape
    case.x, case.chosen, case.shares = case.x[:0], case.chosen[:0], case.shares[:0]
    assert case.run(mix_experts).shape == (0, 16)


def test_weights_of_experts_without_tokens_are_not_read(device, randn):
    case = Case(device, randn, (4, 2, 8, 16, 3), torch.float32, present=3)
    case.chosen[:] = torch.tensor([0, 3])
    case.up.view(4, -1)[1:3] = NAN
    case.down.view(4, -1)[1:3] = NAN
    check(case.run(mix_experts), case)


def test_results_past_the_end_stay_as_they_are(device, randn, monkeypatch):
    """Where nothing is to be written, what lies there is left alone."""
    filled = torch.full((6, 5), 7.0, device=device)
    monkeypatch.setattr("sleb.kernels.triton.experts.torch.empty", lambda *shape, **options: filled)
    starts = torch.tensor([0, 1, 1, 4], dtype=torch.int32, device=device)
    x, weight = randn(6, 8), randn(3 * 5, 8)
    grouped_linear(x, weight, None, None, starts, 3)
    expected = torch.stack(
        [x[row] @ weight.view(3, 5, 8)[expert].T for row, expert in enumerate((0, 2, 2, 2))]
    )
    torch.testing.assert_close(filled[:4], expected)
    assert (filled[4:] == 7.0).all()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(device, randn, config):
    starts = torch.tensor([0, 20, 20, 21], dtype=torch.int32, device=device)
    tokens = torch.arange(21, dtype=torch.int32, device=device).flip(0)
    x, weight, bias = randn(21, 72), randn(3 * 70, 72), randn(3 * 70)
    out = grouped_linear(x, weight, bias, tokens, starts, 3, config=config)
    weights, biases = weight.view(3, 70, 72), bias.view(3, 70)
    expected = torch.cat((x.flip(0)[:20] @ weights[0].T + biases[0], x[:1] @ weights[2].T + biases[2]))
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)

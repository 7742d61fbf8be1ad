"""Cross-entropy over pieces of the vocabulary, against torch's over all of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sleb.kernels.reference import cross_entropy
from sleb.kernels.reference.cross_entropy import expected_rows, linear_cross_entropy, linear_divergence

HEADS = pytest.mark.parametrize(
    ("with_bias", "softcap"), [(False, None), (True, None), (False, 3.0), (True, 2.0)]
)


def logits_of(states, weight, bias, softcap):
    logits = F.linear(states.double(), weight.double(), None if bias is None else bias.double())
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "width", "entries"), [(1, 3, 1), (7, 16, 33), (300, 24, 4100), (257, 8, 9000)]
)
@HEADS
def test_losses_and_their_gradient(rows, width, entries, with_bias, softcap, dtype):
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(entries, width, generator=generator).to(dtype)
    targets = torch.randint(0, entries, (rows,), generator=generator)
    targets[0], targets[-1] = 0, entries - 1
    factors = torch.rand(rows, generator=generator)
    bias = torch.randn(entries, generator=generator).to(dtype) if with_bias else None
    wanted = F.cross_entropy(logits_of(states, weight, bias, softcap), targets, reduction="none")
    found = linear_cross_entropy(states, weight, targets, bias, softcap)
    tolerance = TOLERANCE[dtype]
    assert found.shape == (rows,) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    [gradient] = torch.autograd.grad((found * factors).sum(), states)
    [expected] = torch.autograd.grad((wanted * factors).sum(), states)
    torch.testing.assert_close(gradient.double(), expected.double(), rtol=tolerance, atol=5 * tolerance)


def test_the_logits_are_never_there_as_a_whole(monkeypatch):
    largest = 0
    linear = F.linear

    def watched(*arguments):
        nonlocal largest
        result = linear(*arguments)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(cross_entropy.F, "linear", watched)
    linear_cross_entropy(torch.randn(600, 4), torch.randn(10_000, 4), torch.zeros(600, dtype=torch.int64))
    assert 0 < largest <= cross_entropy._ROWS * cross_entropy._ENTRIES < 600 * 10_000 / 2


def test_large_logits_do_not_overflow():
    states = torch.full((2, 4), 100.0)
    weight = torch.tensor([[100.0] * 4, [-100.0] * 4, [99.0] * 4])
    losses = linear_cross_entropy(states, weight, torch.tensor([0, 2]))
    assert losses.tolist() == pytest.approx([0.0, 400.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@HEADS
def test_divergences_are_those_of_whole_distributions(with_bias, softcap, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9000, 24, generator=generator).to(dtype)
    states, others = (torch.randn(600, 24, generator=generator).to(dtype) for _ in range(2))
    targets = torch.randint(0, 9000, (600,), generator=generator)
    bias = torch.randn(9000, generator=generator).to(dtype) if with_bias else None
    head = (bias, softcap)
    p, q = (logits_of(each, weight, *head).log_softmax(-1) for each in (states, others))
    expected = expected_rows(states, weight, *head)
    assert expected[0].shape == states.shape
    found, losses = linear_divergence(others, weight, *expected, targets, *head)
    wanted = (p.exp() * (p - q)).sum(-1)
    assert found.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        losses.double(), F.nll_loss(q, targets, reduction="none"), rtol=1e-5, atol=1e-4
    )
    same, _ = linear_divergence(states, weight, *expected, targets, *head)
    assert float(same.min()) >= 0 and float(same.max()) < 2e-5

"""Residual add with norm, and the activations (Triton), against float64."""

from __future__ import annotations

import math

import pytest
import torch

from sleb.kernels.reference import device as device_reference
from sleb.kernels.triton.activation import activate, gated_activate, soft_cap
from sleb.kernels.triton.add_norm import add_norm, moments

NAN = float("nan")

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # numpy's, on infinities under the interpreter


def expected_norm(x, weight, bias, eps, kind):
    """[T, E] float64 of rows as they are stored."""
    x = x.double().cpu()
    if kind == "layer":
        x = x - x.mean(dim=1, keepdim=True)
    normed = x if kind == "none" else x / (x.pow(2).mean(dim=1, keepdim=True) + eps).sqrt()
    if weight is not None:
        normed = normed * weight.double().cpu()
    return normed if bias is None else normed + bias.double().cpu()


@pytest.mark.parametrize("size", [1, 72, 576])
@pytest.mark.parametrize(
    ("kind", "affine"),
    [("rms", "weight"), ("rms", "none"), ("layer", "both"), ("layer", "weight"), ("layer", "none")],
)
@pytest.mark.parametrize(("num_delta", "num_norm"), [(3, 3), (4, 2), (1, 4), (0, 2), (3, 0), (0, 0)])
def test_add_norm(device, randn, count, close, dtype, size, kind, affine, num_delta, num_norm):
    residual, delta = randn(5, size, dtype=dtype), randn(4, size, dtype=dtype)
    weight = randn(size, dtype=dtype) if affine != "none" else None
    bias = randn(size, dtype=dtype) if affine == "both" else None
    delta[num_delta:] = NAN  # rows that no one computed
    residual[max(num_delta, num_norm) :] = NAN
    before = residual.clone()
    counts = count(num_delta), count(num_norm)
    out = add_norm(residual, delta, weight, bias, 1e-5, kind, *counts, max_rows=4)
    close(residual[:num_delta], before[:num_delta].double() + delta[:num_delta].double())
    torch.testing.assert_close(residual[num_delta:], before[num_delta:], atol=0, rtol=0, equal_nan=True)
    assert out.shape == (4, size)
    # From the sum as it is stored: it is rounded before it is normed.
    close(out[:num_norm], expected_norm(residual[:num_norm], weight, bias, 1e-5, kind))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_alone_leaves_the_residual(randn, count, close, dtype, kind):
    residual, weight, bias = randn(3, 80, dtype=dtype), randn(80, dtype=dtype), randn(80, dtype=dtype)
    before = residual.clone()
    out = add_norm(residual, None, weight, bias, 1e-3, kind, None, count(2))
    assert torch.equal(residual, before)
    assert out.shape == before.shape
    close(out[:2], expected_norm(before[:2], weight, bias, 1e-3, kind))


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("size", [1, 72])
def test_post_norm_takes_the_place_of_the_residual(device, randn, count, close, dtype, size, with_delta):
    residual, delta = randn(4, size, dtype=dtype), randn(3, size, dtype=dtype)
    weight, bias = randn(size, dtype=dtype), randn(size, dtype=dtype)
    delta[2:] = NAN
    residual[2:] = 7.0
    rows = count(2)
    summed = residual[:2].double() + (delta[:2].double() if with_delta else 0)
    out = add_norm(
        residual, delta if with_delta else None, weight, bias, 1e-5, "layer", rows, rows, post=True
    )
    assert out is residual
    close(residual[:2], expected_norm(summed, weight, bias, 1e-5, "layer"), 3.0)  # the sum was rounded too
    assert (residual[2:] == 7.0).all()


# Of the delta and of the norm: overlapping, apart, one in the other, empty ones.
RANGES = [((1, 4), (2, 5)), ((0, 2), (3, 5)), ((2, 3), (0, 5)), ((3, 3), (1, 3)), ((1, 4), (5, 5))]


@pytest.mark.parametrize("operator", [add_norm, device_reference.add_norm], ids=["triton", "reference"])
@pytest.mark.parametrize(
    ("kind", "post", "size"),
    [("rms", False, 72), ("layer", True, 33), ("none", True, 72), ("none", False, 1)],
)
def test_ranges_of_rows(randn, count, close, dtype, operator, kind, post, size):
    """Rows outside both ranges stay as they are, whatever lies in them; a sum that is not normed is kept."""
    weight, bias = randn(size, dtype=dtype), None if kind == "rms" else randn(size, dtype=dtype)
    for added, normed in RANGES:
        residual, delta = randn(6, size, dtype=dtype), randn(5, size, dtype=dtype)
        is_added, is_normed = ([start <= row < end for row in range(6)] for start, end in (added, normed))
        untouched = torch.tensor([not (a or n) for a, n in zip(is_added, is_normed, strict=True)])
        residual[untouched] = NAN
        delta[~torch.tensor(is_added[:5])] = NAN
        before = residual.clone()
        sums = before.double().cpu()
        sums[slice(*added)] += delta[slice(*added)].double().cpu()
        sums = sums.to(dtype)  # it is rounded before it is normed
        starts = {"delta_start": count(added[0]), "norm_start": count(normed[0])}
        counts = count(added[1]), count(normed[1])
        out = operator(residual, delta, weight, bias, 1e-5, kind, *counts, **starts, max_rows=5, post=post)
        close(out[slice(*normed)], expected_norm(sums, weight, bias, 1e-5, kind)[slice(*normed)], 3.0)
        kept = [row for row in range(6) if is_added[row] and not (post and is_normed[row])]
        close(residual[kept], sums[kept])
        torch.testing.assert_close(residual[untouched], before[untouched], atol=0, rtol=0, equal_nan=True)
        if not post:  # the residual has the sum alone
            apart = [row for row in range(6) if is_normed[row] and not is_added[row]]
            assert torch.equal(residual[apart], before[apart])
        assert out is residual if post else out.shape == (5, size)


@pytest.mark.parametrize("operator", [add_norm, device_reference.add_norm], ids=["triton", "reference"])
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize(
    ("delta_kind", "affine"),
    [("rms", "weight"), ("rms", "none"), ("layer", "both"), ("layer", "none"), ("none", "none")],
)
def test_the_update_is_normed_and_scaled_before_it_is_added(
    randn, count, close, dtype, delta_kind, affine, scale, operator
):
    """Of rows in its range alone, whether they are normed then or not; the norm then is that of the stored sum."""
    residual, delta, weight = randn(6, 72, dtype=dtype), randn(5, 72, dtype=dtype), randn(72, dtype=dtype)
    delta_weight = randn(72) if affine != "none" else None  # of another dtype, as shifted ones are
    delta_bias = randn(72) if affine == "both" else None
    delta[0] = delta[4] = NAN
    before = residual.clone()
    update = expected_norm(delta[1:4], delta_weight, delta_bias, 1e-5, delta_kind).to(dtype).double() * scale
    ranges = {"delta_start": count(1), "norm_start": count(0)}
    options = {"delta_kind": delta_kind, "delta_weight": delta_weight, "delta_bias": delta_bias}
    counts = count(4), count(5)
    out = operator(
        residual, delta, weight, None, 1e-5, "rms", *counts, **ranges, **options, delta_scale=scale
    )
    close(residual[1:4], before[1:4].double().cpu() + update.to(dtype).double(), 6.0)
    assert torch.equal(residual[[0, 4, 5]], before[[0, 4, 5]])
    close(out[:5], expected_norm(residual[:5], weight, None, 1e-5, "rms"), 3.0)


def expected_moments(x):
    """Of chunks of 64 features, in float64."""
    return torch.stack([part.pow(2).sum(dim=1) for part in x.double().cpu().split(64, dim=1)], dim=1)


@pytest.mark.parametrize("operator", [moments, device_reference.moments], ids=["triton", "reference"])
@pytest.mark.parametrize("size", [1, 64, 72, 576])
def test_moments(randn, close, dtype, operator, size):
    x = randn(3, size, dtype=dtype)
    out = operator(x)
    assert out.dtype == torch.float32
    close(out, expected_moments(x), 4.0)


@pytest.mark.parametrize("operator", [add_norm, device_reference.add_norm], ids=["triton", "reference"])
@pytest.mark.parametrize("post", [False, True])
def test_moments_follow_the_residual(randn, count, close, dtype, operator, post):
    """Those of rows that change, whether they are added to or replaced; the others' are left as they are."""
    residual, delta, kept = randn(6, 100, dtype=dtype), randn(5, 100, dtype=dtype), torch.full((6, 2), 7.0)
    kept = kept.to(residual.device)
    ranges = {"delta_start": count(1), "norm_start": count(2)}
    operator(
        *(residual, delta, None, None, 1e-5, "rms", count(3), count(5)), **ranges, post=post, moments=kept
    )
    changed = [1, 2, 3, 4] if post else [1, 2]
    close(kept[changed], expected_moments(residual)[changed], 4.0)
    assert (kept[[row for row in range(6) if row not in changed]] == 7.0).all()


@pytest.mark.parametrize("operator", [soft_cap, device_reference.soft_cap], ids=["triton", "reference"])
def test_soft_cap(randn, close, dtype, operator):
    logits = 60 * randn(3, 101, dtype=dtype)
    logits[0, :3] = torch.tensor([0.0, NAN, -1e4])
    before = logits.clone()
    assert operator(logits, 30.0) is logits
    close(logits, 30.0 * (before.double() / 30.0).tanh(), 2.0)
    assert operator(logits[:0], 30.0).shape == (0, 101)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_add_norm_is_the_reference(randn, count, close, dtype, kind, post):
    """The specification itself: on the rows that it promises, up to the order of a sum."""
    residual, delta, weight = (randn(*shape, dtype=dtype) for shape in ((6, 96), (5, 96), (96,)))
    other = residual.clone()
    arguments = (delta, weight, None, 1e-6, kind, count(5), count(3))
    expected = device_reference.add_norm(other, *arguments, max_rows=6, post=post)
    actual = add_norm(residual, *arguments, max_rows=6, post=post)
    close(actual[:3], expected[:3], 3.0)
    close(residual, other, 3.0)
    assert torch.equal(residual[5:], other[5:])


def test_large_values_do_not_overflow_in_float16(randn, count, close):
    """Squares of 300 are more than float16 holds: they must not be summed in it."""
    residual = 300 * randn(2, 72, dtype=torch.float16)
    out = add_norm(residual.clone(), None, None, None, 1e-5, "rms", None, count(2))
    close(out, expected_norm(residual, None, None, 1e-5, "rms"))


def test_add_norm_of_no_rows(device, randn, count):
    out = add_norm(randn(0, 8), None, randn(8), None, 1e-5, "rms", None, count(0))
    assert out.shape == (0, 8)


FORMULAS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "swish": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x.clamp_min(0),
    "relu2": lambda x: x.clamp_min(0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("size", [1, 70, 1030])
@pytest.mark.parametrize("name", FORMULAS)
def test_activations(device, randn, count, close, dtype, name, size):
    x = 3 * randn(3, 2 * size, dtype=dtype)
    x[2] = NAN
    gate, up = x.double().cpu().chunk(2, dim=1)
    gated, alone = gated_activate(x, name, count(2)), activate(x, name, count(2))
    assert gated.shape == (3, size) and alone.shape == (3, 2 * size)
    close(gated[:2], (FORMULAS[name](gate) * up)[:2])
    close(alone[:2], FORMULAS[name](x.double().cpu())[:2])


@pytest.mark.parametrize("name", FORMULAS)
def test_activations_of_extremes(device, count, name):
    """No overflow inside, and a NaN is not hidden."""
    x = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, NAN]], device=device)
    out = activate(x, name, count(1))[0].cpu()
    power = 2 if name == "relu2" else 1
    assert out[:5].tolist() == [0.0, 0.0, 0.0, 100.0**power, 1e4**power]
    assert out[5].isnan()


def test_activations_of_rows_past_the_count_are_not_computed(device, randn, count, monkeypatch):
    """What lies under a result is left as it is past the count: written here with a known value first."""
    filled = torch.full((4, 8), 7.0, device=device)
    monkeypatch.setattr("sleb.kernels.triton.activation.torch.empty", lambda *shape, **options: filled)
    activate(randn(4, 8), "relu", count(2))
    assert (filled[2:] == 7.0).all() and (filled[:2] >= 0).all() and not (filled[:2] == 7.0).any()


@pytest.mark.parametrize("operator", [gated_activate, activate])
def test_activations_of_no_rows(device, randn, count, operator):
    assert operator(randn(0, 8), "silu", count(0)).shape[0] == 0

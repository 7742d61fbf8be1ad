"""Linear layers with the norm before them and what follows them (Triton), against the steps apart in float64."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from sleb.kernels.quantization import Groups, quantize_int4, quantize_int8
from sleb.kernels.reference import device as device_reference
from sleb.kernels.reference.device import HeadNorm, RowNorm
from sleb.kernels.triton import linear as module
from sleb.kernels.triton import linear_rope as rope_module
from sleb.kernels.triton.linear import COMPOSED, linear, linear_activate, linear_add
from sleb.kernels.triton.linear_rope import linear_rope_store
from sleb.kernels.triton.runtime import counters

NAN = float("nan")
TRITON, REFERENCE = module, device_reference


def as_grouped(weight):
    """Of eight bits, by groups of 16 with a minimum."""
    stored = Groups(8, 16, "minimum").empty(*weight.shape, weight.device)
    stored.values.copy_(torch.arange(stored.values.numel()).view(stored.values.shape) * 37 % 256)
    stored.scale.copy_(0.0005 * (1 + torch.arange(stored.scale.numel()).view(stored.scale.shape) % 7))
    stored.minimum.copy_(-128 * stored.scale.float())
    return stored


STORED = {"plain": lambda weight: weight, "int8": quantize_int8, "int4": quantize_int4, "grouped": as_grouped}
# rows, inputs, parts
SIZES = [(1, 128, 1), (3, 70, 1), (16, 260, 2), (40, 400, 4)]
# Every format with every size, and all else in turn.
CASES = [
    (*case, dtype, norm)
    for case, dtype, norm in zip(
        itertools.product(STORED, SIZES),
        itertools.cycle([torch.float32, torch.bfloat16, torch.float16]),
        itertools.cycle(["weight", "none", "alone", "float32 weight"]),
        strict=False,
    )
]


class Case:
    """x, its norm and a weight; `normed` and `product` in float64, of values rounded where the steps are apart."""

    def __init__(self, randn, monkeypatch, stored, size, dtype, norm, outputs):
        (rows, inputs, parts), self.dtype = size, dtype
        for each in (module, rope_module):
            monkeypatch.setattr(each, "choose_num_parts", lambda *arguments: parts)
        self.x = randn(rows, inputs, dtype=dtype)
        plain = (randn(outputs, inputs) / inputs**0.5).to(dtype)
        self.weight, self.bias = STORED[stored](plain), randn(outputs, dtype=dtype)
        self.norm, normed = None, self.x.double().cpu()
        if norm != "none":
            of_norm = None if norm == "alone" else 1 + 0.3 * randn(inputs)
            of_norm = of_norm if norm != "weight" else of_norm.to(dtype)
            self.norm = RowNorm(of_norm, 1e-5, device_reference.moments(self.x))
            normed = normed / (normed.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
            normed = (normed if of_norm is None else normed * of_norm.double().cpu()).to(dtype).double()
        widened = self.weight
        if stored == "int8":
            widened = self.weight.values.double() * self.weight.scale.double()[:, None]
        elif stored != "plain":
            widened = self.weight.dequantize(dtype)
        exact = normed @ widened.double().cpu().T + self.bias.double().cpu()
        self.product = exact.to(dtype).double()
        # The interpreter cuts bits off where it makes bfloat16: of x, of the weight, of the product.
        self.slack = 16.0 if dtype == torch.bfloat16 else 6.0


def silu(x):
    return x * x.sigmoid()


@pytest.mark.parametrize(("stored", "size", "dtype", "norm"), CASES)
def test_norm_before(randn, close, monkeypatch, stored, size, dtype, norm):
    case = Case(randn, monkeypatch, stored, size, dtype, norm, 66)
    outs = [linear(case.x, case.weight, case.bias, norm=case.norm) for _ in range(2)]
    close(outs[0], case.product, case.slack)
    assert torch.equal(*outs) and not counters(case.x.device).any()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("stored", "size", "dtype", "norm"), CASES[::4])
def test_activation_after(randn, count, close, monkeypatch, stored, size, dtype, norm, gated):
    case = Case(randn, monkeypatch, stored, size, dtype, norm, 70)
    present = max(1, size[0] - 1)
    out = linear_activate(case.x, case.weight, case.bias, "silu", gated, count(present), norm=case.norm)
    gate, up = case.product.chunk(2, dim=1)
    expected = silu(gate) * up if gated else silu(case.product)
    assert out.shape == expected.shape and out.dtype == dtype
    close(out[:present], expected[:present], case.slack)
    assert not counters(case.x.device).any()


@pytest.mark.parametrize("activation", ["clamped_swiglu", "gelu_pytorch_tanh", "relu2", "gelu"])
def test_activations(randn, count, close, monkeypatch, activation):
    case = Case(randn, monkeypatch, "plain", SIZES[1], torch.float32, "none", 64)
    for gated in (True, False)[: 1 if activation == "clamped_swiglu" else 2]:
        arguments = (10 * case.x, case.weight, case.bias, activation, gated, count(3))
        close(linear_activate(*arguments), device_reference.linear_activate(*arguments), 20.0)


@pytest.mark.parametrize(("stored", "size", "dtype", "norm"), CASES[1::2])
def test_added_to_the_residual(randn, count, close, monkeypatch, stored, size, dtype, norm):
    """With its moments, of the rows of the range alone."""
    case = Case(randn, monkeypatch, stored, size, dtype, "none", 70)
    rows = size[0]
    scale = 1.0 if norm == "none" else 0.22
    start, end = (1, rows - 1) if rows > 2 else (0, rows)
    residual = randn(rows + 2, 70, dtype=dtype)
    before, moments = residual.clone(), torch.full((rows + 2, 2), 7.0, device=residual.device)
    options = {"start": count(start) if start else None, "scale": scale}
    linear_add(case.x, case.weight, case.bias, residual, moments, count(end), **options)
    added = (scale * case.product).to(dtype).double()
    close(residual[start:end], (before[:rows].double().cpu() + added)[start:end], case.slack)
    exact = device_reference.moments(residual)
    close(moments[start:end], exact[start:end], 8.0)
    for kept, old in ((residual, before), (moments, torch.full_like(moments, 7.0))):
        assert torch.equal(kept[:start], old[:start]) and torch.equal(kept[end:], old[end:])
    assert not counters(case.x.device).any()


@pytest.mark.parametrize("operator", [TRITON, REFERENCE], ids=["triton", "reference"])
def test_no_moments_are_wanted(randn, count, close, monkeypatch, operator):
    case = Case(randn, monkeypatch, "plain", SIZES[1], torch.float32, "none", 20)
    residual = randn(4, 20)
    expected = residual[:3].double().cpu() + case.product
    operator.linear_add(case.x, case.weight, case.bias, residual, None, count(3))
    close(residual[:3], expected, 4.0)


# query heads, KV heads, features of a head, rotated ones; the norm of queries and keys, the clip
HEADS = [
    (4, 2, 16, 16, None, None),
    (2, 1, 32, 8, "layer, each head's own, after the rotation", 1.5),
    (1, 1, 64, 0, None, None),
    (3, 3, 16, 8, "rms", None),
]


def head_norm_of(name, randn, dtype, num_heads, num_kv, head_dim):
    if name is None:
        return None
    sizes = (num_heads * head_dim, num_kv * head_dim) if "own" in name else (head_dim, head_dim)
    weights = [(1 + 0.3 * randn(size)).to(dtype) for size in sizes]
    if name == "rms":
        return HeadNorm("rms", *weights, eps=1e-5)
    biases = [(0.3 * randn(size)).to(dtype) for size in sizes]
    return HeadNorm("layer", *weights, *biases, eps=1e-5, after_rotation=True)


@pytest.mark.parametrize(
    ("case", "form"), list(zip(CASES[1::2], itertools.cycle(HEADS), strict=False)), ids=str
)
def test_heads(device, randn, count, close, monkeypatch, case, form):
    """The norm, the rotation and the write into the pages, against the specification of those on the exact product."""
    (stored, size, dtype, norm), (num_heads, num_kv, head_dim, rotated, name, clip) = case, form
    case = Case(randn, monkeypatch, stored, size, dtype, norm, (num_heads + 2 * num_kv) * head_dim)
    rows = size[0]
    present = max(1, rows - 1)
    head_norm = head_norm_of(name, randn, dtype, num_heads, num_kv, head_dim)
    angles = torch.arange(50)[:, None] * (0.3 + torch.arange(rotated // 2))[None, :]
    rotation = (angles.cos().to(device), angles.sin().to(device)) if rotated else None
    positions = torch.arange(rows, dtype=torch.int32, device=device) + 5
    slots = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:rows].int().to(device)
    caches = [randn(60, num_kv, head_dim, dtype=dtype) for _ in range(2)]
    others = [cache.clone() for cache in caches]
    stored_in = (slots, count(present), clip)
    arguments = (case.x, case.weight, case.bias, num_heads, rotation, positions, head_norm)
    query = linear_rope_store(*arguments, *caches, *stored_in, norm=case.norm)
    heads = case.product.to(device, dtype).view(rows, -1, head_dim)
    expected = device_reference.rope_store(
        heads, num_heads, rotation, positions, head_norm, *others, *stored_in
    )
    slack = case.slack * (4 if head_norm else 1)
    close(query[:present], expected[:present], slack)
    for cache, other in zip(caches, others, strict=True):
        close(cache, other, slack)
        kept = [slot for slot in range(60) if slot not in slots[:present].tolist()]
        assert torch.equal(cache[kept], other[kept])
    assert not counters(device).any()


def test_heads_that_are_no_tile(randn, count, close, monkeypatch):
    """Head sizes that are no power of two, and norms of all heads together, are composed."""
    for head_dim, whole in ((12, False), (16, True)):
        case = Case(randn, monkeypatch, "plain", SIZES[1], torch.float32, "weight", 4 * head_dim)
        sizes = (2 * head_dim, head_dim) if whole else (head_dim, head_dim)
        head_norm = HeadNorm("rms", *(randn(size) for size in sizes), whole=whole)
        places, rest = torch.arange(3, dtype=torch.int32, device=case.x.device), (count(3), None)
        caches = [[torch.zeros(3, 1, head_dim, device=case.x.device) for _ in range(2)] for _ in range(2)]
        query, expected = (
            operator(
                *(case.x, case.weight, case.bias, 2, None, places, head_norm, *cache, places, *rest),
                norm=case.norm,
            )
            for operator, cache in zip(
                (linear_rope_store, device_reference.linear_rope_store), caches, strict=True
            )
        )
        close(query, expected, 8.0)
        close(caches[0][0], caches[1][0], 8.0)


@pytest.mark.parametrize("rows", [3, 5])
def test_composed(randn, count, close, monkeypatch, rows):
    """Of few rows where that is faster, of many in any case: the same."""
    for each in (module, rope_module):
        monkeypatch.setattr(each, "FEW_ROWS", 4)
    case = Case(randn, monkeypatch, "int4", (rows, 70, 1), torch.float32, "weight", 32)
    config = COMPOSED if rows == 3 else None
    options = {"norm": case.norm, "config": config}
    close(linear(case.x, case.weight, case.bias, **options), case.product, 8.0)
    gate, up = case.product.chunk(2, dim=1)
    out = linear_activate(case.x, case.weight, case.bias, "silu", True, count(rows), **options)
    close(out, silu(gate) * up, 8.0)
    residual = randn(rows, 32)
    expected = residual.double().cpu() + (
        case.x.double().cpu() @ case.weight.dequantize(torch.float32).double().cpu().T
    )
    moments = device_reference.moments(residual)
    linear_add(case.x, case.weight, None, residual, moments, count(rows), config=config)
    close(residual, expected, 8.0)
    close(moments, device_reference.moments(residual), 8.0)
    places = torch.arange(rows, dtype=torch.int32, device=case.x.device)
    caches = [torch.zeros(rows, 1, 8, device=case.x.device) for _ in range(2)]
    query = linear_rope_store(
        *(case.x, case.weight, case.bias, 2, None, places, None, *caches, places, count(rows)), **options
    )
    heads = case.product.view(rows, 4, 8)
    for actual, want in zip((query, *caches), heads.split([2, 1, 1], dim=1), strict=True):
        close(actual, want, 8.0)


def test_no_rows(randn, count):
    x, weight, nothing = randn(0, 40), randn(16, 40), count(0)
    assert linear_activate(x, weight, None, "silu", True, nothing).shape == (0, 8)
    linear_add(x, weight, None, randn(2, 16), None, nothing)
    places, cache = torch.zeros(0, dtype=torch.int32, device=x.device), randn(4, 1, 4)
    query = linear_rope_store(x, weight, None, 2, None, places, None, cache, cache, places, nothing)
    assert query.shape == (0, 2, 4)


def test_rows_past_the_count_may_be_anything(randn, count, close, monkeypatch):
    case = Case(randn, monkeypatch, "int8", (18, 70, 1), torch.float32, "weight", 32)
    case.x[5:], case.norm.moments[5:] = NAN, NAN
    out = linear_activate(case.x, case.weight, case.bias, "silu", True, count(5), norm=case.norm)
    gate, up = case.product.chunk(2, dim=1)
    close(out[:5], (silu(gate) * up)[:5], 6.0)


def test_streams_do_not_share_counters(monkeypatch):
    """Where one engine captures while another serves on the same GPU, their launches overlap."""
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: object())
    gpu = torch.device("cuda", 63)
    serving = counters(gpu)
    stream.cuda_stream = 7
    capturing = counters(gpu)
    assert capturing is not serving and counters(gpu) is capturing
    stream.cuda_stream = 0
    assert counters(gpu) is serving

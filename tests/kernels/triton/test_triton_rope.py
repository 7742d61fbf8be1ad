"""Rotary embedding, q/k norm, clipping and the write into the pages (Triton), against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch

from sleb.kernels.reference import device as device_reference
from sleb.kernels.reference.device import HeadNorm
from sleb.kernels.triton.rope_store import rope_store

NAN = float("nan")
# query heads, KV heads, head dimension, rotated features; GQA of 2 and 3, MHA, MQA, nothing rotated, all or a part
SHAPES = [(6, 3, 64, 64), (9, 3, 80, 32), (4, 4, 96, 48), (5, 1, 128, 128), (2, 1, 256, 64), (3, 3, 12, 6)]


def angles(device, num_positions, half):
    """cos and sin of unlike angles, [positions, half]."""
    steps = torch.arange(num_positions)[:, None] * (0.3 + torch.arange(half))[None, :]
    return steps.cos().to(device), steps.sin().to(device)


def normed(x, weight, bias, norm, dtype):
    """The norm of [T, heads, D] in float64, rounded to the dtype as when it is done apart."""
    over = (1, 2) if norm.whole else (2,)
    if norm.kind == "layer":
        x = x - x.mean(dim=over, keepdim=True)
    scaled = x / (x.pow(2).mean(dim=over, keepdim=True) + norm.eps).sqrt()
    heads, dim = x.shape[1:]
    if weight is not None:
        scaled = scaled * weight.double().cpu().view(-1, dim).expand(heads, dim)
    if bias is not None:
        scaled = scaled + bias.double().cpu().view(-1, dim).expand(heads, dim)
    return scaled.to(dtype).double()


def rotated(x, rotation, positions):
    """Pairs (i, i + half) turned as complex numbers."""
    half = rotation[0].shape[1]
    cos, sin = (table.double().cpu()[positions.cpu().long()][:, None, :] for table in rotation)
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


class Case:
    """The arguments of one call, where only the first `present` tokens are real."""

    def __init__(self, device, randn, shape, dtype, *, tokens=5, present=4, norm="rms", rotation=True, clip=None,
                 whole=False, per_head=False, after_rotation=False):  # fmt: skip
        self.num_heads, self.num_kv, head_dim, rotated_dim = shape
        self.present, self.dtype = present, dtype
        self.heads = randn(tokens, self.num_heads + 2 * self.num_kv, head_dim, dtype=dtype)
        self.heads[present:] = NAN
        self.key_cache, self.value_cache = (randn(20, self.num_kv, head_dim, dtype=dtype) for _ in range(2))
        self.rotation = angles(device, 30, rotated_dim // 2) if rotation else None
        self.clip, self.norm = clip, None
        if norm:
            sizes = [head_dim * (heads if whole or per_head else 1) for heads in shape[:2]]
            weights = [(1 + 0.3 * randn(size)).to(dtype) for size in sizes]
            biases = [(0.3 * randn(size)).to(dtype) for size in sizes] if norm == "biased" else (None, None)
            kind = "layer" if norm == "biased" else norm
            self.norm = HeadNorm(kind, *weights, *biases, 1e-5, whole, after_rotation)
        self.positions = torch.tensor([0, 29, 7, 7, 11, 3][:tokens], dtype=torch.int32, device=device)
        self.slots = torch.tensor([3, 19, 1, 0, 4, 5][:tokens], dtype=torch.int32, device=device)

    def run(self, operator, count):
        """The queries; the caches are written."""
        return operator(
            self.heads,
            self.num_heads,
            self.rotation,
            self.positions,
            self.norm,
            self.key_cache,
            self.value_cache,
            self.slots,
            count(self.present),
            self.clip,
        )

    def expected(self):
        """Queries and keys [present, heads, D] in float64, and the values as they are."""
        sizes, norm = (self.num_heads, self.num_kv, self.num_kv), self.norm
        heads = self.heads[: self.present].double().cpu()
        if self.clip is not None:
            heads = heads.clamp(-self.clip, self.clip)
        query, key, value = heads.split(sizes, dim=1)
        for turn in ("before", "after"):
            if norm is not None and norm.after_rotation == (turn == "after"):
                query = normed(query, norm.query, norm.query_bias, norm, self.dtype)
                key = normed(key, norm.key, norm.key_bias, norm, self.dtype)
            if turn == "before" and self.rotation is not None:
                positions = self.positions[: self.present]
                query, key = rotated(query, self.rotation, positions), rotated(key, self.rotation, positions)
        return query, key, value


@pytest.mark.parametrize("norm", ["rms", None], ids=["norm", "plain"])
@pytest.mark.parametrize("rotation", [True, False], ids=["rotated", "still"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_store(device, randn, count, close, dtype, shape, rotation, norm):
    case = Case(device, randn, shape, dtype, norm=norm, rotation=rotation)
    keys, values = case.key_cache.clone(), case.value_cache.clone()
    query, key, value = case.expected()
    actual = case.run(rope_store, count)
    assert actual.shape == (5, shape[0], shape[2]) and actual.dtype == dtype
    slack = 4.0 if norm else 1.0  # the norm's result is rounded too, and rotation adds two such
    close(actual[:4], query, slack)
    slots = case.slots[:4].long()
    close(case.key_cache[slots], key, slack)
    assert torch.equal(case.value_cache[slots].double().cpu(), value)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert torch.equal(case.key_cache[others], keys[others])
    assert torch.equal(case.value_cache[others], values[others])


NORMS = [
    {"norm": "rms", "whole": True},
    {"norm": "layer"},
    {"norm": "biased", "whole": True},
    {"norm": "layer", "per_head": True},
    {"norm": "rms", "after_rotation": True},
    {"norm": "biased", "after_rotation": True, "per_head": True},
    {"norm": None, "clip": 0.75},
    {"norm": "rms", "whole": True, "clip": 0.75},
    {"norm": "layer", "clip": 0.75},
]


@pytest.mark.parametrize("operator", [rope_store, device_reference.rope_store], ids=["triton", "reference"])
@pytest.mark.parametrize("kind", NORMS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1, 24, 16), (3, 3, 12, 6)], ids=str)
def test_norms_of_every_kind(device, randn, count, close, dtype, shape, kind, operator):
    case = Case(device, randn, shape, dtype, **kind)
    query, key, value = case.expected()
    actual = case.run(operator, count)
    close(actual[:4], query, 6.0)
    slots = case.slots[:4].long()
    close(case.key_cache[slots], key, 6.0)
    assert torch.equal(case.value_cache[slots].double().cpu(), value)


def test_a_clipped_nan_stays_one(device, randn, count):
    """What is wrong with a model must be seen in its logits."""
    case = Case(device, randn, (2, 1, 16, 8), torch.float32, norm=None, clip=0.5)
    case.heads[1, :, 3] = NAN
    assert case.run(rope_store, count)[1, :, 3].isnan().all()
    assert case.value_cache[case.slots[1], :, 3].isnan().all()


@pytest.mark.parametrize("present", [0, 1, 6])
def test_counts(device, randn, count, present):
    """The caches change in the slots of the tokens that are there, and in no other."""
    case = Case(device, randn, (6, 3, 16, 16), torch.float32, tokens=6, present=present)
    before = case.key_cache.clone(), case.value_cache.clone()
    case.run(rope_store, count)
    for cache, old in zip((case.key_cache, case.value_cache), before, strict=True):
        changed = (cache != old).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert sorted(changed) == sorted(case.slots[:present].tolist())


def test_no_tokens(device, randn, count):
    case = Case(device, randn, (6, 3, 16, 16), torch.float32, tokens=0, present=0)
    assert case.run(rope_store, count).shape == (0, 6, 16)


@pytest.mark.parametrize("shape", [(6, 3, 80, 32), (2, 2, 12, 12)], ids=str)
def test_is_the_reference(device, randn, count, close, dtype, shape):
    case, other = (Case(device, randn, shape, dtype) for _ in range(2))
    for name in ("heads", "key_cache", "value_cache", "norm"):
        setattr(other, name, getattr(case, name))
    other.key_cache, other.value_cache = case.key_cache.clone(), case.value_cache.clone()
    actual = case.run(rope_store, count)
    expected = other.run(device_reference.rope_store, count)
    close(actual[:4], expected[:4], 3.0)
    close(case.key_cache, other.key_cache, 3.0)
    assert torch.equal(case.value_cache, other.value_cache)

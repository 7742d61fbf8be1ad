"""Keys and values in bytes (Triton) against torch's float8_e4m3fn."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sleb.kernels.reference import device as device_reference
from sleb.kernels.triton.e4m3 import from_e4m3, to_e4m3
from sleb.kernels.triton.linear_rope import configs_for, linear_rope_store

E4M3 = torch.float8_e4m3fn


@triton.jit
def _narrow(x, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, to_e4m3(tl.load(x + at)))


@triton.jit
def _widen(stored, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, from_e4m3(tl.load(stored + at), out.dtype.element_ty))


def numbers(kind):
    """All of 16 bits, or many of 32."""
    bits = torch.arange(1 << 16).to(torch.int16)
    if kind != torch.float32:
        return bits.view(kind).float()
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).to(torch.int32)
    near = torch.randn(1 << 16, generator=generator) * torch.exp2(torch.arange(1 << 16) % 22 - 12)
    # Halfway between neighbours, and the float32 numbers on either side.
    every = torch.arange(127).to(torch.uint8).view(E4M3).float()
    ties = (every[1:] + every[:-1]) / 2
    ties = torch.cat((ties, torch.nextafter(ties, every[1:]), torch.nextafter(ties, every[:-1])))
    rest = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 448.1, 464.0, -500.0, 1e30])
    made = torch.cat((any_bits.view(torch.float32), near, ties, -ties, rest))
    return torch.nn.functional.pad(made, (0, -len(made) % 8192))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_numbers_are_stored_as_torch_rounds_them(device, kind):
    x = numbers(kind)
    stored = torch.zeros(len(x), dtype=torch.uint8, device=device)
    _narrow[(len(x) // 8192,)](x.to(device), stored, 8192)
    stored, nan = stored.cpu(), x.isnan()
    assert torch.equal(stored[~nan], x[~nan].clamp(-448, 448).to(E4M3).view(torch.uint8))
    assert (stored[nan] & 0x7F == 0x7F).all() and nan.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_are_widened_exactly(device, dtype):
    stored = torch.arange(256).to(torch.uint8)
    out = torch.zeros(256, dtype=dtype, device=device)
    _widen[(1,)](stored.to(device), out, 256)
    expected = stored.view(E4M3).to(dtype)
    assert torch.equal(out.cpu().isnan(), expected.isnan()) and expected.isnan().sum() == 2
    assert torch.equal(1 / out.cpu().nan_to_num(), 1 / expected.nan_to_num())  # and the signs of zeros


@pytest.mark.parametrize("fused", [True, False])
def test_products_are_stored_in_bytes(device, randn, count, fused):
    """Those that the specification stores, but where float32 sums end on either side of a tie."""
    x, weight = randn(5, 64), randn(4 * 16, 64)
    angles = torch.outer(torch.arange(30.0), torch.arange(1, 5).float()).to(device)
    places = torch.tensor([3, 7, 1, 0, 9], dtype=torch.int32, device=device)
    made = []
    options = {"config": configs_for(x, weight, 16)[0]} if fused else {}
    for operator, more in ((linear_rope_store, options), (device_reference.linear_rope_store, {})):
        caches = [torch.full((12, 1, 16), 0x7F, dtype=torch.uint8, device=device) for _ in range(2)]
        rotation = angles.cos(), angles.sin()
        query = operator(*(x * 3, weight, None, 2, rotation, places, None, *caches, places, count(4)), **more)
        made.append((query[:4], *(cache.view(E4M3).float() for cache in caches)))
    (query, *stored), (expected, *wanted) = made
    torch.testing.assert_close(query, expected, rtol=1e-5, atol=1e-4)
    for actual, expected in zip(stored, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.13, atol=0.02, equal_nan=True)
        assert (actual == expected)[expected.isfinite()].float().mean() > 0.95

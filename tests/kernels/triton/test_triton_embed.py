"""The embedding of a step's tokens (Triton) against indexing in float64."""

from __future__ import annotations

import pytest
import torch

from sleb.kernels.quantization import Groups, Int4Weight, quantize_int8
from sleb.kernels.reference import device as device_reference
from sleb.kernels.triton.embed import embed


def integers(device, *numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=device)


@pytest.mark.parametrize("operator", [embed, device_reference.embed], ids=["triton", "reference"])
@pytest.mark.parametrize("size", [1, 72, 128])
@pytest.mark.parametrize("extras", ["none", "scale", "learned", "both"])
@pytest.mark.parametrize("kind", ["plain", "int8"])
def test_embed(device, randn, close, dtype, operator, size, extras, kind):
    """Tokens that are known and pending ones, one of which has ended; the numbers and their sums of squares."""
    weight, table = randn(11, size, dtype=dtype), randn(9, size, dtype=dtype)
    expected = weight.double().cpu()
    if kind == "int8":
        weight = quantize_int8(weight)
        expected = weight.dequantize(dtype).double().cpu()
    ids, sources = integers(device, 10, 0, 0, 3, 0), integers(device, -1, 1, 0, -1, 2)
    sampled = integers(device, 7, 5, -1, dtype=torch.int64)
    expected = expected[[10, 5, 7, 3, 0]]
    options = {"pending": (sources, sampled)}
    if extras in ("scale", "both"):
        options["scale"] = 1.75
        expected = (expected * 1.75).to(dtype).double()
    if extras in ("learned", "both"):
        options["learned"] = (integers(device, 8, 0, 1, 1, 4), table)
        expected = expected + table.double().cpu()[[8, 0, 1, 1, 4]]
    out = torch.empty(5, size, dtype=dtype, device=device)
    moments = torch.empty(5, -(-size // 64), device=device)
    operator(ids, weight, out, moments, **options)
    close(out, expected, 10.0 if dtype == torch.bfloat16 else 2.0)  # three roundings, of numbers up to 6
    close(moments, device_reference.moments(out), 4.0)


def test_tokens_that_the_host_knows(device, randn):
    weight = randn(11, 8)
    out = torch.empty(3, 8, device=device)
    embed(integers(device, 4, 10, 0), weight, out, None)
    assert torch.equal(out, weight[[4, 10, 0]])
    embed(integers(device), weight, out[:0], None)


def test_a_weight_of_groups_is_looked_up_by_torch(device, randn):
    weight = Int4Weight.empty(11, 64, device)
    weight.fill(randn(11, 64))
    assert isinstance(weight.groups, Groups)
    out = torch.empty(2, 64, device=device)
    embed(integers(device, 4, 10), weight, out, None)
    assert torch.equal(out, weight.dequantize(torch.float32)[[4, 10]])

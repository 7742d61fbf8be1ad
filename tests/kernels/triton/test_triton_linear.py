"""Linear layers over plain, 8-bit and 4-bit weights (Triton) against the widened matrix in float64."""

from __future__ import annotations

import pytest
import torch

from sleb.kernels.quantization import Groups, Int4Weight, Int8Weight
from sleb.kernels.reference import ops as reference
from sleb.kernels.triton import linear as module
from sleb.kernels.triton import product as tile
from sleb.kernels.triton.linear import COMPOSED, CONFIGS, linear
from sleb.kernels.triton.product import choose_num_parts
from sleb.kernels.triton.runtime import counters

GROUPED = {
    "4 by 64, zero": Groups(4, 64, "zero"),
    "4 by 32, middle": Groups(4, 32, "middle"),
    "8 by 32, middle": Groups(8, 32, "middle"),
    "8 by 16, minimum": Groups(8, 16, "minimum"),
    "8 by 128, zero": Groups(8, 128, "zero"),
}
KINDS = ["plain", "int8", "int4"]
# rows, outputs, inputs: tails of tiles and of groups of 32, one of each, and the sizes of small models
SHAPES = [
    (1, 1, 1),
    (2, 7, 31),
    (3, 70, 100),
    (1, 65, 33),
    (15, 48, 127),
    (16, 64, 128),
    (17, 3, 576),
    (5, 130, 1090),
    (64, 20, 60),
    (65, 33, 129),
    (130, 66, 96),
]


@pytest.fixture
def make(device, randn):
    """make(kind, rows, outputs, inputs, dtype) -> x, the weight, bias, and the weight as it is multiplied."""

    def make(kind, rows, outputs, inputs, dtype):
        x, weight, bias = (
            randn(rows, inputs, dtype=dtype),
            randn(outputs, inputs),
            randn(outputs, dtype=dtype),
        )
        weight = weight / inputs**0.5
        if kind == "plain":
            weight = weight.to(dtype)
            return x, weight, bias, weight
        if kind in GROUPED:
            stored = GROUPED[kind].empty(outputs, inputs, device)
            for tensor, low, high in (
                (stored.values, 0, 256),
                (stored.scale, -9, 9),
                (stored.minimum, 0, 16),
            ):
                if tensor is not None:
                    tensor.copy_(torch.randint(low, high, tensor.shape))
            stored.scale.mul_(2.0 ** -(GROUPED[kind].bits + 2) / inputs**0.5)
            if stored.groups.base == "minimum":
                stored.minimum.mul_(0.1 / inputs**0.5)
            return x, stored, bias, stored.dequantize(dtype)
        stored = (Int8Weight if kind == "int8" else Int4Weight).empty(outputs, inputs, device)
        stored.fill(weight)
        if kind == "int8":  # the sum is scaled, so nothing is rounded
            return x, stored, bias, stored.values.double() * stored.scale.double()[:, None]
        return x, stored, bias, stored.dequantize(dtype)

    return make


def product(x, widened, bias):
    exact = x.double().cpu() @ widened.double().cpu().T
    return exact if bias is None else exact + bias.double().cpu()


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("number", [2, 5, 10], ids=lambda number: str(SHAPES[number]))
def test_groups(make, close, kind, number):
    x, weight, bias, widened = make(kind, *SHAPES[number], torch.float32)
    for config in CONFIGS[:2]:
        close(linear(x, weight, bias, config=config), product(x, widened, bias), 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=lambda number: str(SHAPES[number]))
def test_linear(make, close, dtype, kind, number):
    x, weight, bias, widened = make(kind, *SHAPES[number], dtype)
    bias = bias if number % 2 else None
    out = linear(x, weight, bias, config=CONFIGS[0])
    assert out.dtype == dtype and out.is_contiguous()
    # 8- and 4-bit weights are cut, not rounded, to bfloat16 by the interpreter; tf32 is not used for float32.
    slack = 2.0 if dtype != torch.bfloat16 or kind == "plain" else 4.0
    close(out, product(x, widened, bias), slack)
    if SHAPES[number][0] > 64:  # the library's, or other tiles
        close(linear(x, weight, bias), product(x, widened, bias), slack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_configurations(make, close, kind, config):
    x, weight, bias, widened = make(kind, 3, 133, 1120, torch.float16)
    close(linear(x, weight, bias, config=config), product(x, widened, bias), 2.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("parts", "inputs"), [(1, 576), (2, 576), (4, 1028), (8, 576), (16, 1028)])
def test_parts(make, close, monkeypatch, kind, parts, inputs):
    """More parts than tiles too: what has no inputs adds zeros."""
    monkeypatch.setattr(module, "choose_num_parts", lambda *arguments: parts)
    x, weight, bias, widened = make(kind, 18, 70, inputs, torch.float32)
    bias = bias if parts != 4 else None
    close(linear(x, weight, bias, config=CONFIGS[0]), product(x, widened, bias), 2.0)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("kind", "rows", "inputs"), [("plain", 70, 129), ("int8", 18, 256), ("int4", 35, 300)]
)
def test_a_range_of_rows(make, count, close, monkeypatch, kind, rows, inputs, parts):
    """Rows of the range as always; others are not written, and their x may be anything."""
    monkeypatch.setattr(module, "choose_num_parts", lambda *arguments: parts)
    x, weight, bias, widened = make(kind, rows, 21, inputs, torch.float32)
    empty = torch.empty
    monkeypatch.setattr(module.torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(7.0))
    for start, end in ((2, 3), (rows // 2, rows), (5, 5), (rows, rows)):
        out = linear(x, weight, bias, (count(start), count(end)), config=CONFIGS[0])
        close(out[start:end], product(x, widened, bias)[start:end], 2.0)
        assert (out[:start] == 7.0).all() and (out[end:] == 7.0).all()


@pytest.mark.parametrize("kind", [*KINDS, "8 by 16, minimum"])
def test_parts_are_joined_in_their_order(make, device, monkeypatch, kind):
    """Whoever is last, bit for bit: the sanitizer runs every second launch from its last program to its first."""
    x, weight, _, _ = make(kind, 3, 70, 1028, torch.float32)
    monkeypatch.setattr(module, "choose_num_parts", lambda *arguments: 4)
    outs = [linear(x, weight, None, config=CONFIGS[0]) for _ in range(2)]
    assert torch.equal(*outs)
    monkeypatch.setattr(module, "choose_num_parts", lambda *arguments: 1)
    sums = torch.zeros_like(outs[0])
    for start in range(0, 1028, 384):
        only = torch.zeros_like(x)
        only[:, start : start + 384] = x[:, start : start + 384]
        sums += linear(only, weight, None, config=CONFIGS[0])
    assert torch.equal(outs[0], sums)
    assert not counters(device).any()


def test_choice_of_parts(device):
    """A power of two, each part with four tiles or more, only where outputs are too few to fill the GPU."""
    processors = tile.num_processors(device)
    assert choose_num_parts(4 * processors, 1 << 20, 128, device) == 1
    assert choose_num_parts(1, 128, 128, device) == 1
    assert choose_num_parts(1, 8 * 128, 128, device) == 2
    for programs in (0, 1, 3, processors):
        for inputs in (1, 576, 4096, 1 << 20):
            parts = choose_num_parts(programs, inputs, 128, device)
            assert 1 <= parts <= 16 and parts & (parts - 1) == 0
            assert parts == 1 or 4 * 128 * parts <= inputs


def test_plain_weights_by_the_library(make, close, dtype):
    """The library's product is a configuration of its own, and the only one for many rows."""
    for rows, with_bias in ((3, True), (3, False), (65, True)):
        x, weight, bias, widened = make("plain", rows, 33, 40, dtype)
        bias = bias if with_bias else None
        close(linear(x, weight, bias, config=COMPOSED if rows == 3 else None), product(x, widened, bias), 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(make, kind):
    x, weight, bias, _ = make(kind, 0, 5, 40, torch.float32)
    assert linear(x, weight, bias).shape == (0, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_contiguous(make, close, kind):
    x, weight, bias, widened = make(kind, 4, 20, 70, torch.float32)
    strided = x.t().contiguous().t()
    close(linear(strided, weight, bias, config=CONFIGS[0]), product(x, widened, bias), 2.0)


def test_four_bit_padding_is_not_multiplied(device, randn, close):
    """Padding stands for the group's minimum: whatever lies there must meet activations of 0."""
    weight = Int4Weight.empty(9, 40, device)
    weight.fill(5 + randn(9, 40))
    weight.values.view(9, 2, 16)[:, 1, 4:] = 255
    x = randn(2, 40)
    close(
        linear(x, weight, None, config=CONFIGS[0]),
        product(x, weight.dequantize(torch.float32), None),
        2.0,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_disturb_the_others(make, close, kind):
    x, weight, bias, widened = make(kind, 18, 20, 70, torch.float32)
    x[5] = float("nan")
    others = [row for row in range(18) if row != 5]
    out = linear(x, weight, bias, config=CONFIGS[0])
    assert out[5].isnan().all()
    close(out[others], product(x, widened, bias)[others], 2.0)


@pytest.mark.parametrize("kind", KINDS)
def test_is_the_reference(make, close, dtype, kind):
    x, weight, bias, _ = make(kind, 6, 40, 300, dtype)
    close(linear(x, weight, bias, config=CONFIGS[0]), reference.linear(x, weight, bias), 6.0)

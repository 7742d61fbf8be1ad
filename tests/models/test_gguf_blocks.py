"""Blocks of GGUF files, held as integers with scales, against the gguf package's dequantisation of the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from sleb.engine.model.quantized.gguf import GGUF
from sleb.kernels.quantization import GroupedWeight, Groups, common_kind
from sleb.models.gguf.blocks import BLOCKS, kept_end

# Where the halves of a block are: random bytes there would be infinite or no numbers.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def blocks(name, num_rows, num_columns):
    block, rng = BLOCKS[name], np.random.default_rng(len(name))
    data = rng.integers(0, 256, (num_rows, num_columns // block.inputs, block.num_bytes), np.uint8)
    for at in HALVES.get(name, (0,)):
        half = rng.uniform(1e-3, 2e-2, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = half[..., None].view(np.uint8)
    return data.reshape(num_rows, -1)


@pytest.mark.parametrize("name", BLOCKS)
def test_they_stand_for_what_the_gguf_package_says(name):
    data = blocks(name, 6, 512)
    [form] = [form for form in GGUF if form.mark == kept_end(name)]
    decoded = form.plan(module_of(form.mark, data)).decode({form.mark: torch.from_numpy(data)})
    expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))
    assert torch.equal(decoded.dequantize(torch.float32), expected)
    held = decoded.groups.empty(6, 512)
    held.take(decoded)
    # Products of scales are rounded to float16: a relative 2^-11 of the scale's part and of the minimum's.
    size = decoded.q().float() * decoded.scale.repeat_interleave(decoded.groups.size, 1).abs()
    if decoded.minimum is not None:
        size += decoded.minimum.float().repeat_interleave(decoded.groups.size, 1).abs()
    error = (held.dequantize(torch.float32) - expected).abs()
    assert (error <= size * 2.0**-11 if "K" in name else error == 0).all()


def test_a_matrix_fused_of_several_kinds_is_held_in_one_that_has_the_numbers_of_all():
    """As the queries, keys and values of a Q4_K_M file are."""
    forms = {form.mark: form for form in GGUF}
    parts = []
    for name in ("Q4_K", "Q6_K"):
        data, end = blocks(name, 4, 512), kept_end(name)
        parts.append(forms[end].plan(module_of(end, data)).decode({end: torch.from_numpy(data)}))
    kind = common_kind([part.groups for part in parts])
    assert kind == Groups(8, 16, "minimum")
    for part in parts:
        own, joined = part.groups.empty(4, 512), kind.empty(4, 512)
        own.take(part)
        joined.take(part)
        exact = own.dequantize(torch.float64)
        torch.testing.assert_close(joined.dequantize(torch.float64), exact, atol=1e-5, rtol=0)
    assert common_kind([Groups(4, 32, "zero"), Groups(4, 32, "minimum")]) is None
    assert isinstance(joined, GroupedWeight) and common_kind([Groups(4, 32, "zero"), None]) is None


def module_of(end, data):
    from pathlib import Path

    from sleb.engine.model.quantized.formats import Module
    from sleb.fields import Fields
    from sleb.models.weight_files import StoredTensor

    part = StoredTensor(f"x{end}", Path("file"), "U8", data.shape)
    return Module({end: part}, Fields({}, "config.json"))

"""Rows of x times rows of a weight of 16, 8 or 4 bits: the tile of which linear layers and experts are made (Triton).

A weight is widened to the dtype of x as it is read, as `sleb.kernels.quantization` says:

    int8    w = values[n, k], and the sum of its products times scale[n]
    groups  w = scale[n, k // g] · q[n, k] + minimum[n, k // g], or scale · (q − zero);  q of 8 bits, or of 4, that of
            even k in the low ones of a byte

and products are summed in float32, so the result is that of `dequantize` followed by a matrix product; that of int8 is
nearer to the exact one, for 8 bits are exact in every dtype. x may be normed as it is read: its rows' sums of squares
are known (`sleb.kernels.reference.device.RowNorm`), so nothing has to be read twice.

Few rows take the time of reading the weight once. A program takes a run of outputs, and where those are too few to fill
the GPU, a part of the inputs too. The last program of a run to arrive adds up the parts' float32 sums in their order,
whoever is last, so results do not change from launch to launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.quantization import GROUP, GroupedWeight, Int8Weight, Weight
from sleb.kernels.reference.device import RowNorm
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    dot_precision,
    floats,
    launch_options,
    multiply,
    num_processors,
    power_of_two,
    prefetch,
    shared_memory,
)
from sleb.kernels.triton.tuning import Config

PLAIN, INT8, INT4, GROUPED_INT8 = range(4)
_BASES = ("minimum", "zero", "middle")
_MAX_PARTS = 16
_UNIT = 16  # bytes of grouped values that one thread loads: 32 of 4 bits, 16 of 8


@triton.jit
def product(
    x,
    factors,
    norm_weight,
    values,
    scale,
    minimum,
    row,
    in_rows,
    output,
    in_outputs,
    start,
    stop,
    num_inputs,
    num_bytes,
    num_groups,
    NORMED: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows [ROWS, 1] of x, times `factors` [ROWS, 1] and the norm's weight, times rows `output` [OUTPUTS, 1] of the
    weight, over the inputs from start to stop: [ROWS, OUTPUTS] float32. Rows and outputs are int64."""
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    # A part is whole tiles, so only the end of a row is masked; that the compiler knows num_inputs to be a multiple
    # of 16 lets it load 16 bytes at once.
    for begin in range(start, stop, INPUTS):
        column = begin + tl.arange(0, INPUTS)[None, :]
        in_columns = column < num_inputs
        part = tl.load(x + row * num_inputs + column, mask=in_rows & in_columns, other=0.0)
        if NORMED:
            part = part.to(tl.float32) * factors
            if HAS_NORM_WEIGHT:
                part *= tl.load(norm_weight + column, mask=in_columns, other=0.0).to(tl.float32)
            part = part.to(dtype)
        if KIND < 2:
            weight = tl.load(values + output * num_bytes + column, mask=in_outputs & in_columns, other=0)
            if KIND == 1:
                weight = floats(weight, dtype, PRECISION)
        else:
            # Units of 16 bytes, which a thread has to itself: all of a unit share a scale.
            unit = begin // UNIT + tl.arange(0, INPUTS // UNIT)[None, :]
            present = in_outputs & (unit * 16 < num_bytes)
            at = output * num_groups + unit // (SIZE // UNIT)
            step = tl.load(scale + at, mask=present, other=0.0).to(tl.float32)[:, :, None]
            byte = (output * num_bytes + unit * 16)[:, :, None] + tl.arange(0, 16)[None, None, :]
            q = tl.load(values + byte, mask=present[:, :, None], other=0)
            if KIND == 2:
                q = tl.reshape(tl.join(q & 15, q >> 4), (OUTPUTS, INPUTS // UNIT, UNIT))
            wide = q.to(tl.float32)
            if BASE == 2:
                wide = (wide - (8.0 if KIND == 2 else 128.0)) * step
            else:
                base = tl.load(minimum + at, mask=present, other=0.0).to(tl.float32)[:, :, None]
                wide = (wide - base) * step if BASE == 1 else wide * step + base
            weight = tl.reshape(wide.to(dtype), (OUTPUTS, INPUTS))
        total += multiply(part, tl.trans(weight), PRECISION)
    if KIND == 1:
        total *= tl.load(scale + tl.trans(output), mask=tl.trans(in_outputs), other=0.0)
    return total


@triton.jit
def prefetch_weight(values, output, start, num_bytes, KIND: tl.constexpr, INPUTS: tl.constexpr):
    """The first two tiles of rows `output` [OUTPUTS, 1], all of them there, on their way before anything is waited for:
    a weight is older than every launch."""
    line: tl.constexpr = 128 * 8 // values.dtype.element_ty.primitive_bitwidth
    number: tl.constexpr = max(1, 2 * (INPUTS // 2 if KIND == 2 else INPUTS) // line)
    first = start // 2 if KIND == 2 else start
    column = first + line * tl.arange(0, number)[None, :]
    prefetch(values + output * num_bytes + tl.minimum(column, num_bytes - 1))


@triton.jit
def arrive(parts, counters, tile, part, num_parts, total, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Leaves a part's sums [ROWS, OUTPUTS] of a tile; how many parts were there before."""
    size: tl.constexpr = ROWS * OUTPUTS
    place = tl.arange(0, ROWS)[:, None] * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    tl.store(parts + (tile * num_parts + part) * size + place, total)
    tl.debug_barrier()  # every thread of the program has stored
    return tl.atomic_add(counters + tile, 1, sem="acq_rel")


@triton.jit
def joined(parts, counters, tile, num_parts, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """The sums of all parts of a tile, in their order; its counter is 0 again."""
    tl.atomic_xchg(counters + tile, 0)
    size: tl.constexpr = ROWS * OUTPUTS
    place = tl.arange(0, ROWS)[:, None] * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for part in range(num_parts):
        # From L2, where all processors see the same.
        total += tl.load(parts + (tile * num_parts + part) * size + place, cache_modifier=".cg")
    return total


def kind_of(weight: Weight) -> int:
    """Its number in the kernels."""
    if isinstance(weight, Tensor):
        return PLAIN
    if isinstance(weight, Int8Weight):
        return INT8
    return INT4 if weight.groups.bits == 4 else GROUPED_INT8


def form_of(weight: Weight) -> str:
    """What a tuning key says of the format."""
    return str(weight.groups if isinstance(weight, GroupedWeight) else kind_of(weight))


def fitting(configs: tuple[Config, ...], x: Tensor, weight: Weight, rows: int) -> tuple[Config, ...]:
    """Those of `configs` whose tiles are likely to fit the shared memory of x's GPU, with so many rows of x in each."""
    bits = weight.element_size() * 8 if isinstance(weight, Tensor) else 4 if kind_of(weight) == INT4 else 8

    def num_bytes(config: Config) -> int:
        outputs, inputs = config["outputs"], config["inputs"]
        loaded = (rows * x.element_size() * 8 + outputs * bits) * inputs // 8 * (config["num_stages"] - 1)
        # A widened weight on its way from a thread's registers to those that multiply it.
        return loaded + (0 if isinstance(weight, Tensor) else outputs * inputs * x.element_size())

    limit = shared_memory(x.device)
    return tuple(config for config in configs if num_bytes(config) <= limit)


def operands(
    x: Tensor, norm: RowNorm | None, weight: Weight, config: Config
) -> tuple[tuple[Tensor, ...], tuple[int, int, int], dict[str, Any]]:
    """For `product`: x, norm weight, values, scale and minimum; num_inputs, num_bytes and num_groups; constants."""
    kind = kind_of(weight)
    if isinstance(weight, Tensor):
        values, scale, minimum = weight, x, None
    else:
        values, scale = weight.values, weight.scale
        minimum = weight.minimum if isinstance(weight, GroupedWeight) else None
    groups = weight.groups if isinstance(weight, GroupedWeight) else None
    norm_weight = None if norm is None else norm.weight
    check_contiguous(x=x, values=values, scale=scale, minimum=minimum, norm_weight=norm_weight)
    constants = {
        "NORMED": norm is not None,
        "HAS_NORM_WEIGHT": norm_weight is not None,
        "KIND": kind,
        "OUTPUTS": config["outputs"],
        "INPUTS": config["inputs"],
        "UNIT": _UNIT * 2 if kind == INT4 else _UNIT,
        "SIZE": groups.size if groups else GROUP,
        "BASE": _BASES.index(groups.base) if groups else 0,
        "PRECISION": dot_precision(x.dtype),
        **launch_options(config["num_warps"], config["num_stages"]),
    }
    tensors = tuple(each if each is not None else x for each in (x, norm_weight, values, scale, minimum))
    return tensors, (x.shape[1], values.shape[1], scale.shape[-1]), constants


def num_chunks(norm: RowNorm | None) -> int:
    """The constant of `row_factors`."""
    return 1 if norm is None else power_of_two(norm.moments.shape[1])


def choose_num_parts(num_programs: int, num_inputs: int, inputs: int, device: torch.device) -> int:
    """Parts of the inputs, a power of two: two programs a processor, each with four tiles or more."""
    wanted = 2 * num_processors(device) // max(1, num_programs)
    most = max(1, num_inputs // (4 * inputs))
    return 1 << (min(max(wanted, 1), most, _MAX_PARTS).bit_length() - 1)


def part_length(num_inputs: int, parts: int, inputs: int) -> int:
    """Inputs of a part: whole tiles."""
    return ceil_div(ceil_div(num_inputs, parts), inputs) * inputs

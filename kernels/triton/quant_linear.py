"""A linear layer over weights of 16, 8 or 4 bits, for few rows above all (Triton).

    y[m, n] = Σ_k x[m, k] · w[n, k] + bias[n]

A weight is widened to the dtype of x as it is read, as `sleb.kernels.quantization` says:

    int8    w = scale[n] · values[n, k]
    groups  w = scale[n, k // g] · q[n, k] + minimum[n, k // g], or scale · (q − zero);  q of 8 bits, or of 4, that of
            even k in the low ones of a byte

and products are summed in float32, so the result is that of `dequantize` followed by a matrix product. For few rows the
time is that of reading the weight once: each program takes a run of outputs, and where those are too few to fill the
GPU, a part of the inputs too; the parts' float32 sums are then added up in a fixed order. A range of rows is read on
the device, and a program that has none of it ends: what no row needs is a launch, and no weight is read.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.quantization import GROUP, GroupedWeight, Int8Weight, Weight
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    dot_precision,
    launch_options,
    multiply,
    num_processors,
    power_of_two,
    shared_memory,
)
from sleb.kernels.triton.tuning import Config, Launch, bucket, tuned

_PLAIN, _INT8, _INT4, _GROUPED_INT8 = range(4)
_BITS = {_INT8: 8, _INT4: 4, _GROUPED_INT8: 8}
_BASES = ("minimum", "zero", "middle")
_MAX_PARTS = 16
_FEW_ROWS = 64  # of a weight that is not quantised: with more, the vendor's library is at its best

# outputs × inputs of a tile; the first is what runs untuned.
CONFIGS = tuple(
    Config(outputs=outputs, inputs=inputs, num_warps=warps, num_stages=stages)
    for outputs, inputs, warps, stages in (
        (64, 128, 4, 4),
        (32, 128, 4, 4),
        (32, 256, 4, 3),
        (16, 256, 4, 4),
        (64, 64, 4, 5),
        (128, 64, 4, 4),
        (128, 128, 8, 3),
    )
)


def configs_for(x: Tensor, weight: Weight, rows: int) -> tuple[Config, ...]:
    """Those of CONFIGS whose tiles fit the GPU of x, with so many rows of x in each."""
    bits = weight.element_size() * 8 if isinstance(weight, Tensor) else _BITS[_kind(weight)]

    def num_bytes(config: Config) -> int:
        a_column = rows * x.element_size() * 8 + config["outputs"] * bits
        return a_column * config["inputs"] // 8 * (config["num_stages"] - 1)

    limit = shared_memory(x.device)
    return tuple(config for config in CONFIGS if num_bytes(config) <= limit)


LIBRARY = Config(library=1)  # the vendor's matrix product, for weights that are not quantised


@triton.jit
def product(
    x,
    values,
    scale,
    minimum,
    wide_row,
    in_rows,
    wide_output,
    in_outputs,
    start,
    stop,
    num_rows,
    num_inputs,
    num_bytes,
    num_groups,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows [ROWS, 1] of x times rows [OUTPUTS, 1] of the weight over the inputs from start to stop, in float32."""
    dtype: tl.constexpr = x.dtype.element_ty
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    # A part is whole tiles, so only the end of a row is masked; that the compiler knows num_inputs to be a multiple
    # of 16 lets it load 16 bytes at once.
    if KIND == 2:
        groups = tl.arange(0, INPUTS // 2 // GROUP_BYTES)[None, :]
        within = tl.arange(0, GROUP_BYTES)[None, None, :]
        for begin in range(start, stop, INPUTS):
            byte = begin // 2 + tl.arange(0, INPUTS // 2)[None, :]
            in_bytes = in_rows & (byte < num_bytes)
            even = tl.load(x + wide_row * num_bytes + byte, mask=in_bytes, other=0.0)
            odd = tl.load(x + (num_rows + wide_row) * num_bytes + byte, mask=in_bytes, other=0.0)
            group = begin // 2 // GROUP_BYTES + groups
            present = in_outputs & (group < num_bytes // GROUP_BYTES)
            at = wide_output * num_groups + group // (SIZE // 2 // GROUP_BYTES)
            step = tl.load(scale + at, mask=present, other=0.0).to(tl.float32)[:, :, None]
            if BASE == 2:
                offset = -8.0 * step
            else:
                offset = tl.load(minimum + at, mask=present, other=0.0).to(tl.float32)[:, :, None]
                if BASE == 1:
                    offset = -offset * step
            at = wide_output * (num_bytes // GROUP_BYTES) + group
            packed = tl.load(
                values + at[:, :, None] * GROUP_BYTES + within, mask=present[:, :, None], other=0
            )
            low = ((packed & 15).to(tl.float32) * step + offset).to(dtype)
            high = ((packed >> 4).to(tl.float32) * step + offset).to(dtype)
            low = tl.reshape(low, (OUTPUTS, INPUTS // 2))
            high = tl.reshape(high, (OUTPUTS, INPUTS // 2))
            total += multiply(even, tl.trans(low), PRECISION)
            total += multiply(odd, tl.trans(high), PRECISION)
    else:
        for begin in range(start, stop, INPUTS):
            column = begin + tl.arange(0, INPUTS)[None, :]
            in_columns = column < num_inputs
            part_x = tl.load(x + wide_row * num_inputs + column, mask=in_rows & in_columns, other=0.0)
            weight = tl.load(values + wide_output * num_bytes + column, mask=in_outputs & in_columns, other=0)
            if KIND == 1:
                step = tl.load(scale + wide_output, mask=in_outputs, other=0.0)
                weight = (weight.to(tl.float32) * step).to(dtype)
            if KIND == 3:
                at = wide_output * num_groups + column // SIZE
                present = in_outputs & in_columns
                step = tl.load(scale + at, mask=present, other=0.0).to(tl.float32)
                if BASE == 2:
                    weight = ((weight.to(tl.float32) - 128.0) * step).to(dtype)
                else:
                    offset = tl.load(minimum + at, mask=present, other=0.0).to(tl.float32)
                    if BASE == 1:
                        weight = ((weight.to(tl.float32) - offset) * step).to(dtype)
                    else:
                        weight = (weight.to(tl.float32) * step + offset).to(dtype)
            total += multiply(part_x, tl.trans(weight), PRECISION)
    return total


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["first_row", "end_row"])
def _linear(
    x,
    values,
    scale,
    minimum,
    bias,
    out,
    first_row,
    end_row,
    num_rows,
    num_outputs,
    num_inputs,
    num_bytes,
    num_groups,
    part_length,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANGED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    if RANGED:
        first = tl.maximum(tl.load(first_row), tl.program_id(1) * ROWS)
        if first >= tl.minimum(tl.load(end_row), (tl.program_id(1) + 1) * ROWS):
            return
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    start = part * part_length
    stop = tl.minimum(start + part_length, num_inputs)
    in_rows = (row < num_rows)[:, None]
    in_outputs = (output < num_outputs)[:, None]
    wide_row = row.to(tl.int64)[:, None]
    wide_output = output.to(tl.int64)[:, None]
    total = product(
        x, values, scale, minimum, wide_row, in_rows, wide_output, in_outputs, start, stop, num_rows, num_inputs,
        num_bytes, num_groups, KIND, ROWS, OUTPUTS, INPUTS, GROUP_BYTES, SIZE, BASE, PRECISION,
    )  # fmt: skip
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    inside = in_rows & (outputs < num_outputs)
    if not SPLIT:
        if HAS_BIAS:
            total += tl.load(bias + outputs, mask=outputs < num_outputs, other=0.0).to(tl.float32)
        tl.store(out + wide_row * num_outputs + outputs, total.to(out.dtype.element_ty), mask=inside)
    else:
        at = (part.to(tl.int64) * num_rows + wide_row) * num_outputs + outputs
        tl.store(out + at, total, mask=inside)


@triton.jit(
    do_not_specialize=["num_rows", "num_parts"], do_not_specialize_on_alignment=["first_row", "end_row"]
)
def _add_parts(
    parts,
    bias,
    out,
    first_row,
    end_row,
    num_rows,
    num_outputs,
    num_parts,
    HAS_BIAS: tl.constexpr,
    RANGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, end = 0, num_rows
    if RANGED:
        begin, end = tl.load(first_row), tl.load(end_row)
    if (row < begin) | (row >= end):
        return
    output = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = output < num_outputs
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + (part * num_rows + row) * num_outputs + output, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + output, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * num_outputs + output, total.to(out.dtype.element_ty), mask=inside)


def quant_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    rows: tuple[Tensor, Tensor] | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """x [M, in] times weight [out, in] transposed, plus bias; see `sleb.kernels.reference.device.linear`.

    config: one of CONFIGS, or LIBRARY for a weight that is not quantised; None: the one tuned for the shape. Many rows
    of a weight that is not quantised are the library's in any case, but for a range of rows, which it does not know.
    """
    kind = _kind(weight)
    by_library = kind == _PLAIN and rows is None
    if isinstance(weight, Tensor) and by_library and (x.shape[0] > _FEW_ROWS or config is LIBRARY):
        return F.linear(x, weight, bias)
    x = x.contiguous()
    num_rows = x.shape[0]
    num_outputs, num_inputs = weight.shape
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    # More would not fit a GPU's shared memory in float32.
    block = min(128 if x.element_size() == 2 else 64, power_of_two(num_rows, 16))

    def launch(chosen: Config) -> None:
        if chosen == LIBRARY:
            assert isinstance(weight, Tensor)
            torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
        else:
            _launch(x, weight, bias, out, rows, block, chosen)

    if config is not None:
        launch(config)
    else:
        form = weight.groups if isinstance(weight, GroupedWeight) else kind
        shape = ("quant_linear", str(form), str(x.dtype), num_outputs, num_inputs, block, bucket(num_rows))
        key = shape if rows is None else (*shape, "ranged")
        configs = configs_for(x, weight, block)
        tuned(key, (LIBRARY, *configs) if by_library else configs, Launch(launch))
    return out


def _kind(weight: Weight) -> int:
    if isinstance(weight, Tensor):
        return _PLAIN
    if isinstance(weight, Int8Weight):
        return _INT8
    return _INT4 if weight.groups.bits == 4 else _GROUPED_INT8


def _launch(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    block_rows: int,
    config: Config,
) -> None:
    num_rows, num_outputs = out.shape
    first_row, end_row = (x, x) if rows is None else rows
    check_contiguous(bias=bias)
    tensors, sizes, constants = operands(x, weight, config)
    num_inputs = sizes[0]
    blocks = ceil_div(num_outputs, config["outputs"])
    row_blocks = ceil_div(num_rows, block_rows)
    parts = choose_num_parts(blocks * row_blocks, num_inputs, config["inputs"], x.device)
    part_length = ceil_div(ceil_div(num_inputs, parts), config["inputs"]) * config["inputs"]
    target = out
    if parts > 1:
        target = torch.empty(parts, num_rows, num_outputs, dtype=torch.float32, device=x.device)
    _linear[(blocks, row_blocks, parts)](
        *tensors,
        bias if bias is not None else x,
        target,
        first_row,
        end_row,
        num_rows,
        num_outputs,
        *sizes,
        part_length,
        HAS_BIAS=bias is not None,
        RANGED=rows is not None,
        SPLIT=parts > 1,
        ROWS=block_rows,
        **constants,
    )
    if parts > 1:
        block = min(1024, power_of_two(num_outputs))
        _add_parts[(num_rows, ceil_div(num_outputs, block))](
            target,
            bias if bias is not None else x,
            out,
            first_row,
            end_row,
            num_rows,
            num_outputs,
            parts,
            HAS_BIAS=bias is not None,
            RANGED=rows is not None,
            BLOCK=block,
            **launch_options(),
        )


def operands(
    x: Tensor, weight: Weight, config: Config
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[int, int, int], dict[str, Any]]:
    """For `product`: x, values, scale and minimum; num_inputs, num_bytes and num_groups; and what is constant."""
    kind, (values, scale, minimum) = _kind(weight), _tensors(weight, x)
    num_inputs = values.shape[1] * 2 if kind == _INT4 else x.shape[1]
    groups = weight.groups if isinstance(weight, GroupedWeight) else None
    check_contiguous(x=x, values=values, scale=scale, minimum=minimum)
    constants = {
        "KIND": kind,
        "OUTPUTS": config["outputs"],
        "INPUTS": config["inputs"],
        "GROUP_BYTES": GROUP // 2,
        "SIZE": groups.size if groups else 0,
        "BASE": _BASES.index(groups.base) if groups else 0,
        "PRECISION": dot_precision(x.dtype),
        **launch_options(config["num_warps"], config["num_stages"]),
    }
    source = _pairs(x, num_inputs) if kind == _INT4 else x
    return (source, values, scale, minimum), (num_inputs, values.shape[1], scale.shape[-1]), constants


def _pairs(x: Tensor, num_inputs: int) -> Tensor:
    """x [M, K] as [2, M, num_inputs / 2]: the even inputs and the odd ones, with zeros where the weight is padded."""
    padded = x if x.shape[1] == num_inputs else F.pad(x, (0, num_inputs - x.shape[1]))
    return padded.view(x.shape[0], -1, 2).permute(2, 0, 1).contiguous()


def _tensors(weight: Weight, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """values, scale and minimum; x where the format has none."""
    if isinstance(weight, Tensor):
        return weight, x, x
    if isinstance(weight, Int8Weight):
        return weight.values, weight.scale, x
    return weight.values, weight.scale, x if weight.minimum is None else weight.minimum


def choose_num_parts(num_programs: int, num_inputs: int, inputs: int, device: torch.device) -> int:
    """Parts of the inputs, a power of two: two programs a processor, each with four tiles or more."""
    wanted = 2 * num_processors(device) // max(1, num_programs)
    most = max(1, num_inputs // (4 * inputs))
    return 1 << (min(max(wanted, 1), most, _MAX_PARTS).bit_length() - 1)

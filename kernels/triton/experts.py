"""A mixture of experts over tokens sorted by their experts (Triton).

A token t has k experts e with shares s, and each expert two matrices, which lie under one another in `up` and `down`:

    y[t] = Σ_j s[t, j] · down[e[t, j]](activation(up[e[t, j]](x[t])))

The (token, expert) pairs are sorted by expert, so the rows of one expert are neighbours. A program takes a block of one
expert's rows and a run of its outputs, with the tiles of
`product`: an expert's weight is read once a block of its
rows, and that of an expert without tokens not at all. How many rows an expert has is read on the device: there are as
many programs as any routing may need, and those that are too many end. The last launch adds up each token's k rows, in
float32 and in the order of its experts.

Tokens past num_rows, a number read on the device, belong to no expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.quantization import Weight
from sleb.kernels.triton.activation import activate, gated_activate
from sleb.kernels.triton.linear import CONFIGS
from sleb.kernels.triton.product import fitting, form_of, operands, product
from sleb.kernels.triton.runtime import (
    INTERPRETED,
    ceil_div,
    check_contiguous,
    launch_next,
    launch_options,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)
from sleb.kernels.triton.tuning import Config, Launch, bucket, tuned

_MAX_BLOCK = 1024
_MAX_ROWS = 64  # of an expert that a program takes: it has to hold their sums


@triton.jit(do_not_specialize_on_alignment=["starts"])
def _of_experts(
    x,
    norm_weight,
    values,
    scale,
    minimum,
    bias,
    tokens,
    starts,
    out,
    num_outputs,
    num_inputs,
    num_bytes,
    num_groups,
    num_experts,
    HAS_BIAS: tl.constexpr,
    GATHERS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    KIND: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    UNIT: tl.constexpr,
    SIZE: tl.constexpr,
    BASE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wait_for_previous()
    launch_next()
    # Which expert this block of rows is of: the first whose blocks and those before are more than come before this one.
    each = tl.arange(0, EXPERTS)
    is_expert = each < num_experts
    lengths = tl.load(starts + each + 1, mask=is_expert, other=0) - tl.load(
        starts + each, mask=is_expert, other=0
    )
    blocks = (lengths + ROWS - 1) // ROWS
    ends = tl.cumsum(blocks, axis=0)
    block = tl.program_id(1)
    expert = tl.sum((ends <= block).to(tl.int32), axis=0)
    if expert >= num_experts:
        return
    before = tl.sum(tl.where(each < expert, blocks, 0), axis=0)
    row = tl.load(starts + expert) + (block - before) * ROWS + tl.arange(0, ROWS)
    in_rows = (row < tl.load(starts + expert + 1))[:, None]
    wide_row = row.to(tl.int64)[:, None]
    source = wide_row
    if GATHERS:
        source = tl.load(tokens + wide_row, mask=in_rows, other=0).to(tl.int64)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_outputs = (output < num_outputs)[:, None]
    wide_output = (expert.to(tl.int64) * num_outputs + output)[:, None]
    total = product(
        x, 1.0, norm_weight, values, scale, minimum, source, in_rows, wide_output, in_outputs, 0, num_inputs,
        num_inputs, num_bytes, num_groups, NORMED, HAS_NORM_WEIGHT, KIND, ROWS, OUTPUTS, INPUTS, UNIT, SIZE, BASE,
        PRECISION,
    )  # fmt: skip
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    inside = in_rows & (outputs < num_outputs)
    if HAS_BIAS:
        at = expert.to(tl.int64) * num_outputs + outputs
        total += tl.load(bias + at, mask=outputs < num_outputs, other=0.0).to(tl.float32)
    tl.store(out + wide_row * num_outputs + outputs, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["num_rows"])
def _combine(updates, places, shares, out, num_rows, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_previous()
    launch_next()
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(num_rows):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        place = tl.load(places + token * TOP_K + choice).to(tl.int64)
        update = tl.load(updates + place * size + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(shares + token * TOP_K + choice) * update
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=inside)


def mix_experts(
    x: Tensor,
    up: Weight,
    up_bias: Tensor | None,
    down: Weight,
    down_bias: Tensor | None,
    chosen: Tensor,
    shares: Tensor,
    num_experts: int,
    activation: str,
    gated: bool,
    num_rows: Tensor,
) -> Tensor:
    """See `sleb.kernels.reference.device.mix_experts`."""
    num_tokens, top_k = chosen.shape
    out = torch.empty_like(x)
    if not num_tokens:
        return out
    row = torch.arange(num_tokens, device=x.device)[:, None]
    experts, order = torch.where(row < num_rows, chosen, num_experts).flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, device=x.device)
    starts = torch.searchsorted(experts, bounds, out_int32=True)
    pairs = torch.arange(num_tokens * top_k, dtype=torch.int32, device=x.device)
    places = torch.empty_like(pairs).scatter_(0, order, pairs)
    tokens = (order // top_k).int()
    count = starts[num_experts:]
    hidden = grouped_linear(x, up, up_bias, tokens, starts, num_experts)
    hidden = (gated_activate if gated else activate)(hidden, activation, count)
    updates = grouped_linear(hidden, down, down_bias, None, starts, num_experts)
    shares = shares.float().contiguous()
    size = x.shape[1]
    block = power_of_two(size) if INTERPRETED else min(power_of_two(size), _MAX_BLOCK)
    _combine[(num_tokens, ceil_div(size, block))](
        updates,
        places,
        shares,
        out,
        num_rows,
        size,
        TOP_K=top_k,
        BLOCK=block,
        **launch_options(),
        **pdl_launch(x.device),
    )
    return out


def grouped_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    tokens: Tensor | None,
    starts: Tensor,
    num_experts: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """Each expert's rows times its matrix, transposed, plus its bias.

    Args:
        x: [M, K]. weight: [experts · N, K], bias: [experts · N] or None, expert by expert.
        tokens: [P] int32, which row of x is the input of each result; None: its own.
        starts: [experts + 1] int32, the first result of each expert, and the end of all.

    Returns: [P, N]; results past the end of all are unspecified.
    """
    check_contiguous(x=x, bias=bias, tokens=tokens, starts=starts)
    num_pairs = x.shape[0] if tokens is None else tokens.shape[0]
    num_outputs, num_inputs = weight.shape[0] // num_experts, weight.shape[1]
    out = torch.empty(num_pairs, num_outputs, dtype=x.dtype, device=x.device)
    rows = min(_MAX_ROWS, power_of_two(ceil_div(num_pairs, num_experts), 16))
    # Every expert that has rows may have one more than whole blocks.
    most = (num_pairs + min(num_experts, num_pairs) * (rows - 1)) // rows

    def launch(chosen: Config) -> None:
        tensors, sizes, constants = operands(x, None, weight, chosen)
        _of_experts[(ceil_div(num_outputs, chosen["outputs"]), most)](
            *tensors,
            bias if bias is not None else x,
            tokens if tokens is not None else starts,
            starts,
            out,
            num_outputs,
            *sizes,
            num_experts,
            HAS_BIAS=bias is not None,
            GATHERS=tokens is not None,
            EXPERTS=power_of_two(num_experts),
            ROWS=rows,
            **constants,
            **pdl_launch(x.device),
        )

    if config is not None:
        launch(config)
    else:
        key = (
            "grouped_linear",
            form_of(weight),
            str(x.dtype),
            num_outputs,
            num_inputs,
            rows,
            bucket(num_pairs),
        )
        tuned(key, fitting(CONFIGS, x, weight, rows), Launch(launch))
    return out

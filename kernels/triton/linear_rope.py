"""The projections of queries, keys and values with all that attention wants of them, in one launch (Triton).

A program makes one head of a block of tokens: the product of `sleb.kernels.triton.linear` with the norm before it, and
then what `sleb.kernels.triton.rope_store` states: clip, norm, rotation, and the write of K and V into their pages. The
two features that are rotated together are neighbours in a tile, so both are in one thread's registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.quantization import Weight
from sleb.kernels.reference.device import HeadNorm, RowNorm
from sleb.kernels.triton.add_norm import row_factors
from sleb.kernels.triton.linear import COMPOSED, FEW_ROWS, block_rows, choose, key_of, linear
from sleb.kernels.triton.product import (
    arrive,
    choose_num_parts,
    fitting,
    joined,
    num_chunks,
    operands,
    part_length,
    prefetch_weight,
    product,
)
from sleb.kernels.triton.rope_store import clipped, head_moments, normed_heads, rope_store, store_heads
from sleb.kernels.triton.runtime import (
    check_contiguous,
    counters,
    launch_next,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)
from sleb.kernels.triton.tuning import Config

_LEAST_DIM, _MOST_DIM = 16, 256  # of a head that is a tile

# Inputs of a tile, whose outputs are a head, warps and stages. The first is what runs untuned: see `linear.CONFIGS`.
# With more than 16 rows it is the last, for four warps have too few registers for such a tile and its rotation.
_TILES = ((128, 4, 3), (128, 4, 4), (64, 4, 5), (256, 4, 3), (64, 4, 3), (128, 8, 3), (64, 8, 3))


@triton.jit(
    do_not_specialize=["num_rows", "num_parts"],
    do_not_specialize_on_alignment=["positions", "slots", "num_tokens"],
)
def _linear_rope(
    x,
    norm_weight,
    values,
    scale,
    minimum,
    bias,
    moments,
    cos,
    sin,
    positions,
    query_norm,
    key_norm,
    query_bias,
    key_bias,
    query_out,
    key_cache,
    value_cache,
    slots,
    parts,
    counters,
    num_tokens,
    eps,
    head_eps,
    clip,
    num_rows,
    num_inputs,
    num_bytes,
    num_groups,
    length,
    num_parts,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HALF: tl.constexpr,
    CLIPS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    AFTER: tl.constexpr,
    HAS_HEAD_WEIGHT: tl.constexpr,
    HAS_HEAD_BIAS: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
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
    head = tl.program_id(0)
    # Columns 2p and 2p + 1 of the tile are the features p and p + HALF; those that are not rotated, as they lie.
    column = tl.arange(0, OUTPUTS)
    feature = tl.where(column < 2 * HALF, column // 2 + column % 2 * HALF, column)
    output = head * OUTPUTS + feature
    part = tl.program_id(2)
    start = part * length
    if PRECISION != "widened" and tl.program_id(1) == 0:
        prefetch_weight(values, output.to(tl.int64)[:, None], start, num_bytes, KIND, INPUTS)
    wait_for_previous()
    end = tl.minimum(tl.load(num_tokens), num_rows)
    if tl.program_id(1) * ROWS >= end:
        return
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    in_rows = row < end
    stop = tl.minimum(start + length, num_inputs)
    factors = 1.0
    if NORMED:
        factors = row_factors(moments, row, in_rows, num_inputs, eps, CHUNKS)
    launch_next()
    total = product(
        x, factors, norm_weight, values, scale, minimum, row, in_rows, output.to(tl.int64)[:, None],
        (column >= 0)[:, None], start, stop, num_inputs, num_bytes, num_groups, NORMED, HAS_NORM_WEIGHT, KIND, ROWS,
        OUTPUTS, INPUTS, UNIT, SIZE, BASE, PRECISION,
    )  # fmt: skip
    if SPLIT:
        tile = tl.program_id(1) * tl.num_programs(0) + head
        if arrive(parts, counters, tile, part, num_parts, total, ROWS, OUTPUTS) != num_parts - 1:
            return
        total = joined(parts, counters, tile, num_parts, ROWS, OUTPUTS)
    if HAS_BIAS:
        total += tl.load(bias + output).to(tl.float32)[None, :]
    dtype: tl.constexpr = query_out.dtype.element_ty
    total = clipped(total.to(dtype).to(tl.float32), clip, CLIPS)
    first, second = tl.split(tl.reshape(total, (ROWS, OUTPUTS // 2, 2)))
    pair = tl.arange(0, OUTPUTS // 2)[None, :]
    in_half = pair < HALF
    of_first = tl.where(in_half, pair, 2 * pair)
    of_second = tl.where(in_half, HALF + pair, 2 * pair + 1)
    every = pair >= 0
    is_rotated = head < NUM_HEADS + NUM_KV
    # The second time after the rotation, and one of the two does nothing.
    for after in tl.static_range(2):
        if after == AFTER and HEAD_NORM != "none":
            nothing = tl.zeros([ROWS, 1], tl.float32)
            mean, inverse = head_moments(
                first, second, nothing, every, pair < 0, head_eps, HEAD_NORM, OUTPUTS
            )
            first = normed_heads(first, mean, inverse, query_norm, key_norm, query_bias, key_bias, head, of_first,
                                 every, dtype, HAS_HEAD_WEIGHT, HAS_HEAD_BIAS, STRIDE, NUM_HEADS, NUM_KV)  # fmt: skip
            second = normed_heads(second, mean, inverse, query_norm, key_norm, query_bias, key_bias, head, of_second,
                                  every, dtype, HAS_HEAD_WEIGHT, HAS_HEAD_BIAS, STRIDE, NUM_HEADS, NUM_KV)  # fmt: skip
        if after == 0 and HALF > 0:
            place = tl.load(positions + row, mask=in_rows, other=0).to(tl.int64)
            inside = in_rows & in_half & is_rotated
            c = tl.load(cos + place * HALF + pair, mask=inside, other=1.0)
            s = tl.load(sin + place * HALF + pair, mask=inside, other=0.0)
            turned = first * c - second * s
            second = second * c + first * s
            first = turned
    slot = tl.load(slots + row, mask=in_rows, other=0).to(tl.int64)
    store_heads(query_out, key_cache, value_cache, row, slot, head, of_first, first, in_rows,
                NUM_HEADS, NUM_KV, OUTPUTS)  # fmt: skip
    store_heads(query_out, key_cache, value_cache, row, slot, head, of_second, second, in_rows,
                NUM_HEADS, NUM_KV, OUTPUTS)  # fmt: skip


def configs_for(x: Tensor, weight: Weight, head_dim: int) -> tuple[Config, ...]:
    """What may run where a head is a tile, and is likely to fit the GPU of x."""
    rows = block_rows(x)
    configs = tuple(
        Config(outputs=head_dim, inputs=inputs, num_warps=warps, num_stages=stages)
        for inputs, warps, stages in (_TILES if rows == 16 else reversed(_TILES))
    )
    return fitting(configs, x, weight, rows)


def linear_rope_store(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    head_norm: HeadNorm | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    clip: float | None = None,
    *,
    norm: RowNorm | None = None,
    config: Config | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.linear_rope_store`; config: one of `configs_for`, or COMPOSED."""
    num_rows, head_dim = x.shape[0], key_cache.shape[-1]
    all_heads = weight.shape[0] // head_dim

    def run(chosen: Config) -> Tensor:
        if chosen == COMPOSED:
            heads = linear(x, weight, bias, norm=norm).view(num_rows, all_heads, head_dim)
            stored = (key_cache, value_cache, slots, num_tokens, clip)
            return rope_store(heads, num_heads, rotation, positions, head_norm, *stored)
        query = torch.empty(num_rows, num_heads, head_dim, dtype=x.dtype, device=x.device)
        caches = (key_cache, value_cache, slots)
        _fused(
            x, weight, bias, rotation, positions, head_norm, query, *caches, num_tokens, clip, norm, chosen
        )
        return query

    is_tile = head_dim == power_of_two(head_dim, _LEAST_DIM) and head_dim <= _MOST_DIM
    composes = (
        not is_tile or num_rows > FEW_ROWS or not num_rows or (head_norm is not None and head_norm.whole)
    )
    if config is not None or composes:
        return run(config or COMPOSED)
    normed = "none" if head_norm is None else head_norm.kind
    key = key_of("linear_rope_store", x, weight, norm is not None, head_dim, rotation is not None, normed)
    return choose(key, (*configs_for(x, weight, head_dim), COMPOSED), run)


def _fused(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    head_norm: HeadNorm | None,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    clip: float | None,
    norm: RowNorm | None,
    config: Config,
) -> None:
    """One launch into `query` and the caches."""
    check_contiguous(bias=bias, key_cache=key_cache, value_cache=value_cache)
    num_rows, num_heads, head_dim = query.shape
    blocks = weight.shape[0] // head_dim
    tensors, sizes, constants = operands(x, norm, weight, config)
    num_inputs, block = sizes[0], block_rows(x)
    row_blocks = -(-num_rows // block)
    num_parts = choose_num_parts(blocks * row_blocks, num_inputs, config["inputs"], x.device)
    parts = x
    if num_parts > 1:
        shape = (row_blocks * blocks * num_parts, block, head_dim)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    of_heads = (
        (None,) * 4
        if head_norm is None
        else (head_norm.query, head_norm.key, head_norm.query_bias, head_norm.key_bias)
    )
    _linear_rope[(blocks, row_blocks, num_parts)](
        *tensors,
        bias if bias is not None else x,
        x if norm is None else norm.moments,
        *(rotation or (x, x)),
        positions,
        *(x if each is None else each for each in of_heads),
        query,
        key_cache,
        value_cache,
        slots,
        parts,
        counters(x.device),
        num_tokens,
        0.0 if norm is None else norm.eps,
        0.0 if head_norm is None else head_norm.eps,
        clip or 0.0,
        num_rows,
        *sizes,
        part_length(num_inputs, num_parts, config["inputs"]),
        num_parts,
        NUM_HEADS=num_heads,
        NUM_KV=key_cache.shape[1],
        HALF=0 if rotation is None else rotation[0].shape[1],
        CLIPS=clip is not None,
        HEAD_NORM="none" if head_norm is None else head_norm.kind,
        AFTER=int(head_norm is not None and head_norm.after_rotation),
        HAS_HEAD_WEIGHT=of_heads[0] is not None,
        HAS_HEAD_BIAS=of_heads[2] is not None,
        STRIDE=head_dim if of_heads[0] is not None and of_heads[0].numel() > head_dim else 0,
        HAS_BIAS=bias is not None,
        SPLIT=num_parts > 1,
        CHUNKS=num_chunks(norm),
        ROWS=block,
        **constants,
        **pdl_launch(x.device),
    )

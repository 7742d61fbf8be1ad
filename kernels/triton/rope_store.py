"""Rotary embedding, optional q/k norm, and the write of K and V into their pages, in one launch (Triton).

A token's projections are `heads` [H + 2K, D]: queries, keys, values. With R the rotated features of a head, half = R/2,
and (cos, sin)[i] the token's angles,

    x            = max(−clip, min(x, clip))                       where the model clips
    x            = (x − mean) / sqrt(var + eps) · weight + bias   queries and keys, where the model norms them
    y[i]         = x[i] · cos[i] − x[i + half] · sin[i]           i < half; queries and keys
    y[i + half]  = x[i + half] · cos[i] + x[i] · sin[i]           Su et al. 2021, arXiv 2104.09864
    y[i]         = x[i]                                           i ≥ R

The norm, an RMSNorm (without the mean) or a LayerNorm, is of each head, or of all queries and of all keys together, and
before the rotation or after it. Queries go to a tensor of their own, keys and values to the token's slot in the caches.
Only the first num_tokens tokens, a number read on the device, are touched: nothing is written for the others, neither
query nor cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.reference.device import HeadNorm
from sleb.kernels.triton.e4m3 import to_e4m3
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

_MAX_TILE = 1024  # elements of heads that a program holds


@triton.jit
def clipped(x, clip, CLIPS: tl.constexpr):
    if CLIPS:
        x = tl.where(x > clip, clip, tl.where(x < -clip, -clip, x))  # a NaN stays one
    return x


@triton.jit
def head_moments(first, second, rest, in_half, in_rest, eps, KIND: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mean, or 0, and inverse deviation of each head."""
    mean = tl.zeros([first.shape[0]], tl.float32)
    if KIND == "layer":
        mean = (tl.sum(first, axis=1) + tl.sum(second, axis=1) + tl.sum(rest, axis=1)) / HEAD_DIM
        first = tl.where(in_half, first - mean[:, None], 0.0)
        second = tl.where(in_half, second - mean[:, None], 0.0)
        rest = tl.where(in_rest, rest - mean[:, None], 0.0)
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
    return mean[:, None], (1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps))[:, None]


@triton.jit
def _whole_moments(source, clip, eps,
                   CLIPS: tl.constexpr, KIND: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Mean, or 0, and inverse deviation of SIZE neighbours: what all heads of a token have in common."""
    mean = 0.0
    if KIND == "layer":
        sums = tl.zeros([BLOCK], tl.float32)
        for begin in range(0, SIZE, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            x = tl.load(source + at, mask=at < SIZE, other=0.0).to(tl.float32)
            sums += clipped(x, clip, CLIPS)
        mean = tl.sum(sums, axis=0) / SIZE
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, SIZE, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(source + at, mask=at < SIZE, other=0.0).to(tl.float32)
        x = tl.where(at < SIZE, clipped(x, clip, CLIPS) - mean, 0.0)
        squares += x * x
    return mean, 1.0 / tl.sqrt_rn(tl.sum(squares, axis=0) / SIZE + eps)


@triton.jit
def store_heads(query_out, key_cache, value_cache, token, slot, head, column, x, inside,
                NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """Each head of the tile to where it belongs."""
    x = x.to(query_out.dtype.element_ty)
    stored = x
    if key_cache.dtype.element_ty == tl.uint8:
        stored = to_e4m3(x)
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV)
    is_value = (head >= NUM_HEADS + NUM_KV) & (head < NUM_HEADS + 2 * NUM_KV)
    tl.store(query_out + (token * NUM_HEADS + head) * HEAD_DIM + column, x, mask=inside & is_query)
    at = (slot * NUM_KV + head - NUM_HEADS) * HEAD_DIM + column
    tl.store(key_cache + at, stored, mask=inside & is_key)
    tl.store(value_cache + at - NUM_KV * HEAD_DIM, stored, mask=inside & is_value)


@triton.jit
def _of_head(query_values, key_values, head, column, inside, NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr,
             STRIDE: tl.constexpr):  # fmt: skip
    """Weights or biases of the norm of each head; STRIDE 0: all heads have the same."""
    is_query = inside & (head < NUM_HEADS)
    is_key = inside & (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV)
    of_query = tl.load(query_values + head * STRIDE + column, mask=is_query, other=0.0)
    of_key = tl.load(key_values + (head - NUM_HEADS) * STRIDE + column, mask=is_key, other=0.0)
    return tl.where(head < NUM_HEADS, of_query, of_key).to(tl.float32)


@triton.jit
def normed_heads(x, mean, inverse, query_norm, key_norm, query_bias, key_bias, head, column, inside,
                 dtype: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, STRIDE: tl.constexpr,
                 NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr):  # fmt: skip
    """Rounded as when norm and rotation are done apart; values as they are."""
    y = (x - mean) * inverse
    if HAS_WEIGHT:
        y *= _of_head(query_norm, key_norm, head, column, inside, NUM_HEADS, NUM_KV, STRIDE)
    if HAS_BIAS:
        y += _of_head(query_bias, key_bias, head, column, inside, NUM_HEADS, NUM_KV, STRIDE)
    return tl.where(head < NUM_HEADS + NUM_KV, y.to(dtype).to(tl.float32), x)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots", "num_tokens"])
def _rope_store(
    heads,
    cos,
    sin,
    positions,
    query_norm,
    key_norm,
    query_bias,
    key_bias,
    eps,
    clip,
    query_out,
    key_cache,
    value_cache,
    slots,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    CLIPS: tl.constexpr,
    KIND: tl.constexpr,
    WHOLE: tl.constexpr,
    AFTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_WHOLE: tl.constexpr,
):
    wait_for_previous()
    launch_next()
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(num_tokens):
        return
    dtype: tl.constexpr = heads.dtype.element_ty
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    present = head < NUM_HEADS + 2 * NUM_KV
    of_token = heads + token * (NUM_HEADS + 2 * NUM_KV) * HEAD_DIM
    source = of_token + head * HEAD_DIM
    slot = tl.load(slots + token).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    in_half = present & (half < HALF)
    in_rest = present & (rest < HEAD_DIM)
    first = clipped(tl.load(source + half, mask=in_half, other=0.0).to(tl.float32), clip, CLIPS)
    second = clipped(tl.load(source + HALF + half, mask=in_half, other=0.0).to(tl.float32), clip, CLIPS)
    others = clipped(tl.load(source + rest, mask=in_rest, other=0.0).to(tl.float32), clip, CLIPS)
    is_value = head >= NUM_HEADS + NUM_KV
    # The second time after the rotation, and one of the two does nothing.
    for after in tl.static_range(2):
        if after == AFTER and KIND != "none":
            if WHOLE:
                mean, inverse = _whole_moments(
                    of_token, clip, eps, CLIPS, KIND, NUM_HEADS * HEAD_DIM, BLOCK_WHOLE
                )
                key_mean, key_inverse = _whole_moments(
                    of_token + NUM_HEADS * HEAD_DIM, clip, eps, CLIPS, KIND, NUM_KV * HEAD_DIM, BLOCK_WHOLE
                )
                mean = tl.where(head < NUM_HEADS, mean, key_mean)
                inverse = tl.where(head < NUM_HEADS, inverse, key_inverse)
            else:
                mean, inverse = head_moments(first, second, others, in_half, in_rest, eps, KIND, HEAD_DIM)
            first = normed_heads(first, mean, inverse, query_norm, key_norm, query_bias, key_bias, head, half, in_half,
                                 dtype, HAS_WEIGHT, HAS_BIAS, STRIDE, NUM_HEADS, NUM_KV)  # fmt: skip
            second = normed_heads(second, mean, inverse, query_norm, key_norm, query_bias, key_bias, head, HALF + half,
                                  in_half, dtype, HAS_WEIGHT, HAS_BIAS, STRIDE, NUM_HEADS, NUM_KV)  # fmt: skip
            others = normed_heads(others, mean, inverse, query_norm, key_norm, query_bias, key_bias, head, rest,
                                  in_rest, dtype, HAS_WEIGHT, HAS_BIAS, STRIDE, NUM_HEADS, NUM_KV)  # fmt: skip
        if after == 0 and HALF > 0:
            angle = tl.load(positions + token).to(tl.int64) * HALF + half
            c = tl.load(cos + angle, mask=half < HALF, other=1.0)
            s = tl.load(sin + angle, mask=half < HALF, other=0.0)
            turned = first * c - second * s
            other = second * c + first * s
            first = tl.where(is_value, first, turned)
            second = tl.where(is_value, second, other)
    if HALF > 0:
        store_heads(query_out, key_cache, value_cache, token, slot, head, half, first, in_half,
                    NUM_HEADS, NUM_KV, HEAD_DIM)  # fmt: skip
        store_heads(query_out, key_cache, value_cache, token, slot, head, HALF + half, second, in_half,
                    NUM_HEADS, NUM_KV, HEAD_DIM)  # fmt: skip
    if 2 * HALF < HEAD_DIM:
        store_heads(query_out, key_cache, value_cache, token, slot, head, rest, others, in_rest,
                    NUM_HEADS, NUM_KV, HEAD_DIM)  # fmt: skip


def rope_store(
    heads: Tensor,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    norm: HeadNorm | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
    clip: float | None = None,
) -> Tensor:
    """See `sleb.kernels.reference.device.rope_store`."""
    check_contiguous(heads=heads, key_cache=key_cache, value_cache=value_cache)
    tokens, all_heads, head_dim = heads.shape
    num_kv = (all_heads - num_heads) // 2
    query = torch.empty(tokens, num_heads, head_dim, dtype=heads.dtype, device=heads.device)
    if not tokens:
        return query
    half = 0 if rotation is None else rotation[0].shape[1]
    cos, sin = rotation or (heads, heads)
    weights = (None,) * 4 if norm is None else (norm.query, norm.key, norm.query_bias, norm.key_bias)
    assert norm is None or not (norm.whole and norm.after_rotation), "a whole norm stands before the rotation"
    most = power_of_two(all_heads)
    block_heads = most if INTERPRETED else min(most, max(1, _MAX_TILE // power_of_two(head_dim)))
    _rope_store[(tokens, ceil_div(all_heads, block_heads))](
        heads,
        cos,
        sin,
        positions,
        *(heads if each is None else each for each in weights),
        0.0 if norm is None else norm.eps,
        clip or 0.0,
        query,
        key_cache,
        value_cache,
        slots,
        num_tokens,
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        HEAD_DIM=head_dim,
        HALF=half,
        CLIPS=clip is not None,
        KIND="none" if norm is None else norm.kind,
        WHOLE=norm is not None and norm.whole,
        AFTER=int(norm is not None and norm.after_rotation),
        HAS_WEIGHT=weights[0] is not None,
        HAS_BIAS=weights[2] is not None,
        STRIDE=head_dim if weights[0] is not None and weights[0].numel() > head_dim else 0,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=power_of_two(half),
        BLOCK_REST=power_of_two(head_dim - 2 * half),
        BLOCK_WHOLE=min(_MAX_TILE, power_of_two(num_heads * head_dim)),
        **launch_options(4 if block_heads * head_dim > 512 else 2),
        **pdl_launch(heads.device),
    )
    return query

"""Rotary embedding, optional q/k norm, and the write of K and V into their pages, in one launch (Triton).

A token's projections are `heads` [H + 2K, D]: queries, keys, values. With R the rotated features of a head, half = R/2,
and (cos, sin)[i] the token's angles,

    x            = RMSNorm(x) · weight                            queries and keys, where the model norms them
    y[i]         = x[i] · cos[i] − x[i + half] · sin[i]           i < half; queries and keys
    y[i + half]  = x[i + half] · cos[i] + x[i] · sin[i]           Su et al. 2021, arXiv 2104.09864
    y[i]         = x[i]                                           i ≥ R

Queries go to a tensor of their own, keys and values to the token's slot in the caches. Only the first num_tokens
tokens, a number read on the device, are touched: nothing is written for the others, neither query nor cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.triton.runtime import INTERPRETED, ceil_div, check_contiguous, power_of_two

_MAX_TILE = 1024  # elements of heads that a program holds


@triton.jit
def _inverse_deviation(first, second, rest, eps, HEAD_DIM: tl.constexpr):
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1) + tl.sum(rest * rest, axis=1)
    return (1.0 / tl.sqrt_rn(squares / HEAD_DIM + eps))[:, None]


@triton.jit
def _store(query_out, key_cache, value_cache, token, slot, head, column, x, inside,
           NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr):  # fmt: skip
    """Each head of the tile to where it belongs."""
    x = x.to(query_out.dtype.element_ty)
    is_query = head < NUM_HEADS
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV)
    is_value = (head >= NUM_HEADS + NUM_KV) & (head < NUM_HEADS + 2 * NUM_KV)
    tl.store(query_out + (token * NUM_HEADS + head) * HEAD_DIM + column, x, mask=inside & is_query)
    at = (slot * NUM_KV + head - NUM_HEADS) * HEAD_DIM + column
    tl.store(key_cache + at, x, mask=inside & is_key)
    tl.store(value_cache + at - NUM_KV * HEAD_DIM, x, mask=inside & is_value)


@triton.jit
def _weights(query_norm, key_norm, head, column, inside, NUM_HEADS: tl.constexpr):
    query_weight = tl.load(query_norm + column, mask=inside & (head < NUM_HEADS), other=0.0)
    key_weight = tl.load(key_norm + column, mask=inside & (head >= NUM_HEADS), other=0.0)
    return tl.where(head < NUM_HEADS, query_weight, key_weight).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots", "num_tokens"])
def _rope_store(
    heads,
    cos,
    sin,
    positions,
    query_norm,
    key_norm,
    eps,
    query_out,
    key_cache,
    value_cache,
    slots,
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    if token >= tl.load(num_tokens):
        return
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    present = head < NUM_HEADS + 2 * NUM_KV
    source = heads + (token * (NUM_HEADS + 2 * NUM_KV) + head) * HEAD_DIM
    slot = tl.load(slots + token).to(tl.int64)
    half = tl.arange(0, BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    in_half = present & (half < HALF)
    in_rest = present & (rest < HEAD_DIM)
    first = tl.load(source + half, mask=in_half, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + half, mask=in_half, other=0.0).to(tl.float32)
    others = tl.load(source + rest, mask=in_rest, other=0.0).to(tl.float32)
    is_value = head >= NUM_HEADS + NUM_KV
    if HAS_NORM:
        inverse = tl.where(is_value, 1.0, _inverse_deviation(first, second, others, eps, HEAD_DIM))
        first_weight = _weights(query_norm, key_norm, head, half, in_half, NUM_HEADS)
        second_weight = _weights(query_norm, key_norm, head, HALF + half, in_half, NUM_HEADS)
        rest_weight = _weights(query_norm, key_norm, head, rest, in_rest, NUM_HEADS)
        # Rounded as when norm and rotation are done apart.
        dtype: tl.constexpr = heads.dtype.element_ty
        first = (first * inverse * tl.where(is_value, 1.0, first_weight)).to(dtype).to(tl.float32)
        second = (second * inverse * tl.where(is_value, 1.0, second_weight)).to(dtype).to(tl.float32)
        others = (others * inverse * tl.where(is_value, 1.0, rest_weight)).to(dtype).to(tl.float32)
    if HALF > 0:
        angle = tl.load(positions + token).to(tl.int64) * HALF + half
        c = tl.load(cos + angle, mask=half < HALF, other=1.0)
        s = tl.load(sin + angle, mask=half < HALF, other=0.0)
        turned = first * c - second * s
        other = second * c + first * s
        first = tl.where(is_value, first, turned)
        second = tl.where(is_value, second, other)
        _store(query_out, key_cache, value_cache, token, slot, head, half, first, in_half,
               NUM_HEADS, NUM_KV, HEAD_DIM)  # fmt: skip
        _store(query_out, key_cache, value_cache, token, slot, head, HALF + half, second, in_half,
               NUM_HEADS, NUM_KV, HEAD_DIM)  # fmt: skip
    if 2 * HALF < HEAD_DIM:
        _store(query_out, key_cache, value_cache, token, slot, head, rest, others, in_rest,
               NUM_HEADS, NUM_KV, HEAD_DIM)  # fmt: skip


def rope_store(
    heads: Tensor,
    num_heads: int,
    rotation: tuple[Tensor, Tensor] | None,
    positions: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    num_tokens: Tensor,
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
    most = power_of_two(all_heads)
    block_heads = most if INTERPRETED else min(most, max(1, _MAX_TILE // power_of_two(head_dim)))
    _rope_store[(tokens, ceil_div(all_heads, block_heads))](
        heads,
        cos,
        sin,
        positions,
        query_norm if query_norm is not None else heads,
        key_norm if key_norm is not None else heads,
        eps,
        query,
        key_cache,
        value_cache,
        slots,
        num_tokens,
        NUM_HEADS=num_heads,
        NUM_KV=num_kv,
        HEAD_DIM=head_dim,
        HALF=half,
        HAS_NORM=query_norm is not None,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=power_of_two(half),
        BLOCK_REST=power_of_two(head_dim - 2 * half),
        num_warps=4 if block_heads * head_dim > 512 else 2,
    )
    return query

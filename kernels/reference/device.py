"""Operators whose row counts live on the device, in plain torch: the specification of the Triton kernels.

The counts come as int32 tensors [1], because on a GPU they change between replays of a captured graph. Rows past a
count, and before a start where there is one, are not touched where an operator writes in place, and unspecified where
it returns a new tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.quantization import Weight
from sleb.kernels.reference import ops as reference


def add_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    kind: str,
    num_delta: Tensor | None,
    num_norm: Tensor,
    *,
    delta_start: Tensor | None = None,
    norm_start: Tensor | None = None,
    max_rows: int | None = None,
    post: bool = False,
) -> Tensor:
    """residual[r] += delta[r] for delta_start ≤ r < num_delta, in place; returns the norm of residual[r] for
    norm_start ≤ r < num_norm.

    Args:
        residual: [T, E]. delta: at least num_delta rows [E], or None for nothing to add.
        kind: "rms", "layer", or "none" for the sum itself. weight, bias: [E] or None.
        delta_start, norm_start: None: 0.
        max_rows: rows of the result, at least num_norm; None: T.
        post: the norm takes its row's place in `residual`, which is returned.

    Returns: [max_rows, E].
    """
    num_rows = residual.shape[0]
    if delta is not None:
        assert num_delta is not None
        added = delta.shape[0]
        residual[:added] += torch.where(_rows(added, num_delta, delta_start), delta, 0)
    if kind == "none":
        scaled = residual if weight is None else residual * weight
        normed = scaled if bias is None else scaled + bias
    elif kind == "rms":
        normed = reference.rms_norm(residual, weight, eps)
    else:
        normed = reference.layer_norm(residual, weight, bias, eps)
    if not post:
        return normed[:max_rows].clone() if normed is residual else normed[:max_rows]
    residual.copy_(torch.where(_rows(num_rows, num_norm, norm_start), normed, residual))
    return residual


def linear(
    x: Tensor, weight: Weight, bias: Tensor | None, rows: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """As `reference.linear`; of the rows from rows[0] to before rows[1] alone, where those are given."""
    return reference.linear(x, weight, bias)


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
    """Norms and rotates the queries and keys of the first num_tokens tokens, and stores their K and V.

    Args:
        heads: [T, H + 2K, D], queries, keys, values. num_heads: H.
        rotation: cos and sin of every position, [positions, R/2] float32; None: not rotated.
        positions, slots: [T] integers, the place in the sequence and in the caches [num_slots, K, D].
        query_norm, key_norm: weights [D] of an RMSNorm, or None.

    Returns: the queries, [T, H, D].
    """
    num_kv = (heads.shape[1] - num_heads) // 2
    query, key, value = heads.split([num_heads, num_kv, num_kv], dim=1)
    if query_norm is not None and key_norm is not None:
        query = reference.rms_norm(query, query_norm, eps)
        key = reference.rms_norm(key, key_norm, eps)
    if rotation is not None:
        cos, sin = (table[positions.long()] for table in rotation)
        query, key = reference.rope(query, cos, sin), reference.rope(key, cos, sin)
    written = _rows(heads.shape[0], num_tokens)[:, :, None]
    at = slots.long()
    # Those past the count write back what is there.
    key_cache.index_copy_(0, at, torch.where(written, key, key_cache[at]))
    value_cache.index_copy_(0, at, torch.where(written, value, value_cache[at]))
    queries: Tensor = query.contiguous()
    return queries


def gated_activate(gate_up: Tensor, activation: str, num_rows: Tensor) -> Tensor:
    """As `reference.gated_activate`, of the first num_rows rows."""
    return reference.gated_activate(gate_up, activation)


def activate(x: Tensor, activation: str, num_rows: Tensor) -> Tensor:
    """As `reference.activate`, of the first num_rows rows."""
    return reference.activate(x, activation)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: BatchTensors,
    scale: float,
    window: int | None,
) -> Tensor:
    """As `reference.paged_attention`, of the first num_rows sequences; query and result [T, H, D]."""
    on_host: PagedBatch = batch.to_host()
    out = torch.zeros_like(query)
    num_tokens = int(on_host.query_starts[-1])
    if num_tokens:
        out[:num_tokens] = reference.paged_attention(
            query[:num_tokens], key_cache, value_cache, on_host, scale, window
        )
    return out


def sample_packed(logits: Tensor, numbers: Tensor) -> Tensor:
    """As `reference.sample`; numbers [5, B] float64: temperature, top_k, top_p, min_p, points."""
    temperature, top_k, top_p, min_p, points = numbers
    return reference.sample(logits.float(), temperature, top_k, top_p, min_p, points)


def _rows(num_rows: int, count: Tensor, start: Tensor | None = None) -> Tensor:
    row = torch.arange(num_rows, device=count.device)
    return ((row < count) if start is None else (row >= start) & (row < count))[:, None]

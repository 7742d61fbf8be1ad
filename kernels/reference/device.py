"""Operators whose row counts live on the device, in plain torch: the specification of the Triton kernels.

The counts come as int32 tensors [1], because on a GPU they change between replays of a captured graph. Rows past a
count, and before a start where there is one, are not touched where an operator writes in place, and unspecified where
it returns a new tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sleb.kernels.batch import BatchTensors, PagedBatch
from sleb.kernels.quantization import Weight
from sleb.kernels.reference import experts as experts_reference
from sleb.kernels.reference import ops as reference

MOMENT_CHUNK = 64
"""Features of a row whose sum of squares is kept as one number: see `moments`."""


@dataclass(frozen=True)
class RowNorm:
    """An RMSNorm that a product applies to the rows of its x as it reads them.

    Attributes:
        weight: [E] or None.
        moments: of x, at least as many rows: see `moments`.
    """

    weight: Tensor | None
    eps: float
    moments: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The rows of x [M, E] normed, in its dtype: x / sqrt(Σ moments / E + eps) · weight, computed in float32."""
        mean = self.moments[: x.shape[0]].sum(dim=1, keepdim=True) / x.shape[1]
        normed = x.float() * torch.rsqrt(mean + self.eps)
        if self.weight is not None:
            normed = normed * self.weight.float()
        return normed.to(x.dtype)


def moments(residual: Tensor) -> Tensor:
    """Sums of squares of each MOMENT_CHUNK features of the rows [T, E]: [T, ⌈E / MOMENT_CHUNK⌉] float32."""
    squares = residual.float().square()
    padded = torch.nn.functional.pad(squares, (0, -residual.shape[1] % MOMENT_CHUNK))
    return padded.view(residual.shape[0], padded.shape[1] // MOMENT_CHUNK, MOMENT_CHUNK).sum(dim=2)


def embed(
    token_ids: Tensor,
    weight: Weight,
    out: Tensor,
    moments: Tensor | None,
    *,
    pending: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    learned: tuple[Tensor, Tensor] | None = None,
) -> None:
    """out[t] = scale · weight[token t] + table[place t], rounded to the dtype of `out` after each of the three.

    Args:
        token_ids: [T] int32. weight: [V, E]. out: [T, E], written. moments: of `out`, written; None: not wanted.
        pending: where tokens come from that the host does not know yet: of each token its place in what was sampled
            last, −1 for one that is known, [T] int32; and what was sampled, [B] int64. NO_TOKEN becomes some token: its
            request has ended.
        learned: of each token its place, [T] int32, and the table of places [P, E]; None: there are none.
    """
    tokens = token_ids.long()
    if pending is not None:
        sources, sampled = pending
        tokens = torch.where(sources >= 0, sampled[sources.clamp(min=0).long()].clamp(min=0), tokens)
    rows = reference.embedding(tokens, weight, out.dtype)
    if scale != 1.0:
        rows = rows * scale
    if learned is not None:
        places, table = learned
        rows = rows + table[places.long()]
    out.copy_(rows)
    if moments is not None:
        _keep_moments(out, moments, torch.ones(len(out), 1, dtype=torch.bool, device=out.device))


@dataclass(frozen=True)
class HeadNorm:
    """A norm of queries and keys.

    Attributes:
        kind: "rms" or "layer".
        query, key: weights [D], or [H · D] and [K · D] where each head has its own, or None for neither.
        query_bias, key_bias: of the same shapes, or None for neither.
        whole: mean and deviation are those of all heads together, rather than of each alone.
        after_rotation: the norm follows the rotation; not where it is `whole`.
    """

    kind: Literal["rms", "layer"]
    query: Tensor | None
    key: Tensor | None
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    eps: float = 1e-6
    whole: bool = False
    after_rotation: bool = False

    def __call__(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Of query [T, H, D] and key [T, K, D]."""
        return self._normed(query, self.query, self.query_bias), self._normed(key, self.key, self.key_bias)

    def _normed(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        rows = x.flatten(1) if self.whole else x
        if weight is not None and weight.numel() > rows.shape[-1]:  # each head's own
            normed = norm(rows, None, None, self.eps, self.kind) * weight.view(x.shape[1:])
            return (normed if bias is None else normed + bias.view(x.shape[1:])).to(x.dtype)
        return norm(rows, weight, bias, self.eps, self.kind).view(x.shape)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """kind: "rms", "layer", or "none" for weight and bias alone."""
    if kind == "rms":
        return reference.rms_norm(x, weight, eps)
    if kind == "layer":
        return reference.layer_norm(x, weight, bias, eps)
    scaled = x if weight is None else x * weight
    return scaled if bias is None else scaled + bias


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
    delta_kind: str = "none",
    delta_weight: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_scale: float = 1.0,
    moments: Tensor | None = None,
) -> Tensor:
    """residual[r] += delta_scale · norm(delta[r]) for delta_start ≤ r < num_delta, in place; returns the norm of
    residual[r] for norm_start ≤ r < num_norm.

    Args:
        residual: [T, E]. delta: at least num_delta rows [E], or None for nothing to add.
        kind: "rms", "layer", or "none" for the sum itself. weight, bias: [E] or None.
        delta_start, norm_start: None: 0.
        max_rows: rows of the result, at least num_norm; None: T.
        post: the norm takes its row's place in `residual`, which is returned.
        delta_kind: "rms", "layer", or "none" where the delta is added as it is. delta_weight, delta_bias: [E] or None.
        moments: those of the residual, kept so where it changes; None: not wanted.

    Returns: [max_rows, E].
    """
    num_rows = residual.shape[0]
    changed = torch.zeros(num_rows, 1, dtype=torch.bool, device=residual.device)
    if delta is not None:
        assert num_delta is not None
        added = delta.shape[0]
        if delta_kind != "none":
            delta = norm(delta, delta_weight, delta_bias, eps, delta_kind)
        if delta_scale != 1.0:
            delta = delta * delta_scale
        changed[:added] = _rows(added, num_delta, delta_start)
        residual[:added] += torch.where(changed[:added], delta, 0)
    normed = norm(residual, weight, bias, eps, kind)
    if post:
        replaced = _rows(num_rows, num_norm, norm_start)
        changed |= replaced
        residual.copy_(torch.where(replaced, normed, residual))
    if moments is not None:
        _keep_moments(residual, moments, changed)
    if post:
        return residual
    return normed[:max_rows].clone() if normed is residual else normed[:max_rows]


def _keep_moments(residual: Tensor, kept: Tensor, changed: Tensor) -> None:
    kept[: residual.shape[0]] = torch.where(changed, moments(residual), kept[: residual.shape[0]])


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    rows: tuple[Tensor, Tensor] | None = None,
    *,
    norm: RowNorm | None = None,
) -> Tensor:
    """As `reference.linear`, of x or of its norm; of the rows from rows[0] to before rows[1] alone, where those are
    given."""
    return reference.linear(x if norm is None else norm(x), weight, bias)


def linear_activate(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    num_rows: Tensor,
    *,
    norm: RowNorm | None = None,
) -> Tensor:
    """`linear` and then `activate`, or `gated_activate` of gates in the first half of the weight's rows: the first
    num_rows rows of [M, I]."""
    return (gated_activate if gated else activate)(linear(x, weight, bias, norm=norm), activation, num_rows)


def linear_add(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    moments: Tensor | None,
    num_rows: Tensor,
    *,
    start: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """residual[r] += scale · linear(x[r]) for start ≤ r < num_rows, in place.

    Args:
        x: [M, in], not of the residual's memory. residual: [T, E], T ≥ M. start: None: 0.
        moments: those of the residual, kept so; None: not wanted.
    """
    delta = linear(x, weight, bias)
    add_norm(
        *(residual, delta, None, None, 0.0, "none", num_rows, num_rows),
        delta_start=start,
        norm_start=start,
        post=True,
        delta_scale=scale,
        moments=moments,
    )


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
) -> Tensor:
    """`linear` to the heads of the caches' features, and then `rope_store`: the queries, [T, H, D]."""
    head_dim = key_cache.shape[-1]
    heads = linear(x, weight, bias, norm=norm).view(x.shape[0], weight.shape[0] // head_dim, head_dim)
    stored = (key_cache, value_cache, slots, num_tokens, clip)
    return rope_store(heads, num_heads, rotation, positions, head_norm, *stored)


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
    """Clips, norms and rotates the queries and keys of the first num_tokens tokens, and stores their K and V.

    Args:
        heads: [T, H + 2K, D], queries, keys, values. num_heads: H.
        rotation: cos and sin of every position, [positions, R/2] float32; None: not rotated.
        positions, slots: [T] integers, the place in the sequence and in the caches.
        key_cache, value_cache: [num_slots, K, D], in the dtype of heads, or uint8 for bytes of `reference.to_e4m3`.
        clip: queries, keys and values are clamped to ± this first.

    Returns: the queries, [T, H, D].
    """
    num_kv = (heads.shape[1] - num_heads) // 2
    if clip is not None:
        heads = heads.clamp(-clip, clip)
    query, key, value = heads.split([num_heads, num_kv, num_kv], dim=1)
    if norm is not None and not norm.after_rotation:
        query, key = norm(query, key)
    if rotation is not None:
        cos, sin = (table[positions.long()] for table in rotation)
        query, key = reference.rope(query, cos, sin), reference.rope(key, cos, sin)
    if norm is not None and norm.after_rotation:
        query, key = norm(query, key)
    queries: Tensor = query.contiguous()
    if key_cache.dtype == torch.uint8:
        key, value = reference.to_e4m3(key), reference.to_e4m3(value)
    written = _rows(heads.shape[0], num_tokens)[:, :, None]
    at = slots.long()
    # Those past the count write back what is there.
    key_cache.index_copy_(0, at, torch.where(written, key, key_cache[at]))
    value_cache.index_copy_(0, at, torch.where(written, value, value_cache[at]))
    return queries


def gated_activate(gate_up: Tensor, activation: str, num_rows: Tensor) -> Tensor:
    """As `reference.gated_activate`, of the first num_rows rows."""
    return reference.gated_activate(gate_up, activation)


def activate(x: Tensor, activation: str, num_rows: Tensor) -> Tensor:
    """As `reference.activate`, of the first num_rows rows."""
    return reference.activate(x, activation)


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
    """As `sleb.kernels.reference.experts.mix_experts`, of the first num_rows tokens; their experts are found by asking
    the device."""
    present, out = int(num_rows), torch.zeros_like(x)
    of_present = chosen[:present], shares[:present]
    out[:present] = experts_reference.mix_experts(
        *(x[:present], up, up_bias, down, down_bias, *of_present, num_experts, activation, gated)
    )
    return out


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """x becomes cap · tanh(x / cap), in place (Gemma 2, arXiv 2408.00118); returns x."""
    return x.copy_((x.float() / cap).tanh() * cap)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: BatchTensors,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `reference.paged_attention`, of the first num_rows sequences; query and result [T, H, D]; caches as those of
    `rope_store`."""
    if key_cache.dtype == torch.uint8:
        key_cache, value_cache = (
            reference.from_e4m3(cache, query.dtype) for cache in (key_cache, value_cache)
        )
    on_host: PagedBatch = batch.to_host()
    out = torch.zeros_like(query)
    num_tokens = int(on_host.query_starts[-1])
    if num_tokens:
        out[:num_tokens] = reference.paged_attention(
            query[:num_tokens], key_cache, value_cache, on_host, scale, window, softcap, sinks
        )
    return out


def sample_packed(logits: Tensor, numbers: Tensor) -> Tensor:
    """As `reference.sample`; numbers [5, B] float64: temperature, top_k, top_p, min_p, points."""
    temperature, top_k, top_p, min_p, points = numbers
    return reference.sample(logits.float(), temperature, top_k, top_p, min_p, points)


def _rows(num_rows: int, count: Tensor, start: Tensor | None = None) -> Tensor:
    row = torch.arange(num_rows, device=count.device)
    return ((row < count) if start is None else (row >= start) & (row < count))[:, None]

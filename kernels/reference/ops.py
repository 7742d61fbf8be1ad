"""Every operator of the engine in plain torch: the specification that other backends are tested against.

Shapes: T tokens of a step, E hidden size, H query heads, K key-value heads, D head dimension, S sequences.
All functions return new tensors except where they say that they write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sleb.kernels.batch import PagedBatch
from sleb.kernels.quantization import Weight

# Weights of a quantised matrix that `linear` widens at once: 16 Mi of them in float32 are 64 MiB.
_WIDENED = 1 << 24

NO_TOKEN: Final = -1
"""What stands for the token of a row whose logits give no distribution."""

Numbers: TypeAlias = Sequence[float] | Tensor
"""One number a row: a plain sequence, or a tensor of one dimension."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    if weight is not None and weight.dtype != x.dtype:
        return F.rms_norm(x.to(weight.dtype), (x.shape[-1],), weight, eps).to(x.dtype)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x − mean) / sqrt(var + eps) · weight + bias over the last dimension (Ba et al. 2016, arXiv 1607.06450)."""
    if weight is not None and weight.dtype != x.dtype:
        return F.layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, eps).to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x [T, in] times weight [out, in] transposed, plus bias [out]: [T, out].

    A quantised weight is widened to the dtype of x first, some of its rows at a time; x itself is not quantised.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    num_rows, num_columns = weight.shape
    step = max(1, _WIDENED // num_columns)
    parts = [
        F.linear(
            x,
            weight.row_slice(start, start + step).dequantize(x.dtype),
            None if bias is None else bias[start : start + step],
        )
        for start in range(0, num_rows, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def embedding(token_ids: Tensor, table: Weight, dtype: torch.dtype) -> Tensor:
    """Rows token_ids [T] of table [V, E]: [T, E]. dtype is that of the result where the table is quantised."""
    if isinstance(table, Tensor):
        return F.embedding(token_ids, table)
    return table.rows(token_ids, dtype)


def rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of heads [T, heads, D]; cos and sin [T, R/2] float32, R ≤ D the rotated part.

    The first R features are rotated in pairs (i, i + R/2), the rest pass (Su et al. 2021, arXiv 2104.09864, in
    the half-split order of Llama checkpoints). Computed in float32.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = heads[..., :half].float(), heads[..., half : 2 * half].float()
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    if 2 * half == heads.shape[-1]:
        return rotated
    return torch.cat((rotated, heads[..., 2 * half :]), dim=-1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


# Of gpt-oss (arXiv 2508.10925), whose configurations call it silu.
CLAMPED_SWIGLU, SWIGLU_ALPHA, SWIGLU_LIMIT = "clamped_swiglu", 1.702, 7.0


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation named in the checkpoint's config, elementwise."""
    return ACTIVATIONS[activation](x)


def gated_activate(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up, where gate_up [T, 2I] holds gate in its first half: [T, I] (arXiv 2002.05202).

    CLAMPED_SWIGLU: g · sigmoid(1.702 g) · (u + 1), with gate g clamped to at most 7, and up u to ± 7.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == CLAMPED_SWIGLU:
        gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


E4M3_MAX = 448.0


def to_e4m3(x: Tensor) -> Tensor:
    """Bytes of x as torch.float8_e4m3fn, clamped to ±E4M3_MAX: the form of keys and values of a KV cache in fp8."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """What bytes of `to_e4m3` stand for; exact in every dtype of activations."""
    return stored.view(torch.float8_e4m3fn).to(dtype)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """Writes key and value [T, K, D] into the flat caches [num_slots, K, D] at slots [T]."""
    key_cache.index_copy_(0, slots, key)
    value_cache.index_copy_(0, slots, value)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of new tokens over their sequences' cached context.

    Args:
        query: [T, H, D].
        key_cache, value_cache: [num_slots, K, D], this step's tokens already stored; H is a multiple of K.
        scale: factor on the scores.
        window: a token sees itself and the window − 1 tokens before it; None for all.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [H], a logit of each head that joins the softmax's denominator.

    Returns: [T, H, D].
    """
    output = torch.empty_like(query)
    if batch.decode_rows:
        tokens = batch.decode_tokens
        output[tokens] = _decode_attention(
            query[tokens], key_cache, value_cache, batch, scale, window, softcap, sinks
        )
    for row in batch.chunk_rows:
        start, end = batch.query_starts[row], batch.query_starts[row + 1]
        slots = batch.slots(row)
        output[start:end] = causal_attention(
            query[start:end], key_cache[slots], value_cache[slots], scale, window, softcap, sinks
        )
    return output


def _decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One new token a row, [D, H, head_dim]: the rows' contexts are gathered side by side and masked."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key_cache.shape[1]
    slots, lens = batch.decode_slots, batch.decode_lens
    positions = torch.arange(slots.shape[1], device=query.device)
    visible = positions < lens[:, None]
    if window is not None:
        visible &= positions >= lens[:, None] - window
    # The heads of a group share their keys, so they can stand in the place of the query's length.
    grouped = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys, values = key_cache[slots].transpose(1, 2), value_cache[slots].transpose(1, 2)
    visible = visible[:, None, None, :]
    if softcap is not None or sinks is not None:
        grouped_sinks = None if sinks is None else sinks.view(num_kv_heads, -1)
        attended = _capped_attention(grouped, keys, values, visible, scale, softcap, grouped_sinks)
    else:
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=scale)
    return attended.reshape(num_rows, num_heads, head_dim)


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [..., Q, D] over key and value [..., L, D], in float32; sinks broadcast against the scores' rows.

    Soft caps: Gemma 2 (arXiv 2408.00118); sinks: arXiv 2309.17453, learned ones as in gpt-oss.
    """
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    if sinks is None:
        shares = scores.softmax(dim=-1)
    else:
        column = sinks.float()[..., None].expand(*scores.shape[:-1], 1)
        shares = torch.cat((scores, column), dim=-1).softmax(dim=-1)[..., :-1]
    return (shares @ value.float()).to(query.dtype)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last Q of L positions: query [..., Q, H, D] over key and value [..., L, K, D].

    Query i sits at position L − Q + i. Leading dimensions are batched. softcap, sinks: as in `paged_attention`.
    Returns [..., Q, H, D].
    """
    num_queries, num_keys = query.shape[-3], key.shape[-3]
    mask: Tensor | None = None
    if num_queries != num_keys or (window is not None and window < num_keys):
        positions = torch.arange(num_keys, device=query.device)
        own = positions[num_keys - num_queries :, None]
        mask = positions <= own
        if window is not None:
            mask &= positions > own - window
    # Four dimensions and no more: other ranks miss the fused path.
    batched = query.dim() > 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
    query, key, value = (each.transpose(-3, -2) for each in (query, key, value))
    if softcap is not None or sinks is not None:
        key, value = (
            each.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3) for each in (key, value)
        )
        visible = (
            torch.ones(num_queries, num_keys, device=query.device).tril().bool() if mask is None else mask
        )
        own_sinks = None if sinks is None else sinks[:, None]
        attended = _capped_attention(query, key, value, visible, scale, softcap, own_sinks)
    else:
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=query.shape[-3] != key.shape[-3],
        )
    attended = attended.transpose(-3, -2)
    return attended if batched else attended[0]


def greedy(logits: Tensor) -> Tensor:
    """[B, V] to [B] int64: the most probable token; NO_TOKEN for a row whose highest logit is infinite or NaN."""
    tokens = logits.argmax(dim=-1)  # of a NaN, if there is one
    return torch.where(logits.gather(1, tokens[:, None]).squeeze(1).isfinite(), tokens, NO_TOKEN)


def log_softmax_gather(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of token_ids [B] or [B, N] under logits [B, V], float32, in the shape of token_ids.

    NaN in a row whose highest logit is infinite or NaN.
    """
    logits = logits.float()
    chosen = logits.gather(1, token_ids.view(logits.shape[0], -1))
    total = logits.logsumexp(dim=-1, keepdim=True)
    return (chosen - total.where(total.isfinite(), math.nan)).view(token_ids.shape)


def sample(
    logits: Tensor, temperature: Numbers, top_k: Numbers, top_p: Numbers, min_p: Numbers, points: Numbers
) -> Tensor:
    """One token a row: the first whose cumulative probability, in the vocabulary's order, exceeds the row's point.

    Probabilities are in float64. The filters act in this order, each on what the one before left; where equal logits
    compete for the last place, the lowest token stays.

    Args:
        logits: [B, V] float32.
        temperature: above 0; divides the logits.
        min_p: in [0, 1]; keeps what is at least so many times as probable as the best (arXiv 2407.01082).
        top_k: keeps so many of the most probable; 0 or less: all.
        top_p: in (0, 1]; keeps the most probable, as few as have that probability together (arXiv 1904.09751).
        points: in [0, 1).

    Returns: [B] int64. A row whose highest logit is infinite or NaN has no distribution: it gives NO_TOKEN.
    """
    highest = logits.amax(dim=-1, keepdim=True)
    # Relative to the highest, so that the smallest temperature divides 0 and no overflow meets another.
    scaled = (logits.double() - highest) / _column(temperature, logits)
    weights = scaled.exp().masked_fill(scaled < _column(min_p, logits).log(), 0.0)
    vocab_size = logits.shape[-1]
    counts = [min(int(count), vocab_size) if count > 0 else vocab_size for count in top_k]
    limits = [float(limit) for limit in top_p]
    cut = [row for row, count in enumerate(counts) if count < vocab_size or limits[row] < 1.0]
    if cut:
        weights[cut] = _keep_top(
            logits[cut], weights[cut], [counts[row] for row in cut], [limits[row] for row in cut]
        )
    cumulative = weights.cumsum(dim=-1)
    # Strictly greater, so that a token of probability 0 is never met; the rounded end is caught by the clamp.
    reached = _column(points, logits) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, reached, right=True).squeeze(1)
    last = vocab_size - 1 - (weights > 0).flip(-1).int().argmax(dim=-1)
    return torch.where(highest.squeeze(1).isfinite(), torch.minimum(chosen, last), NO_TOKEN)


def _keep_top(logits: Tensor, weights: Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> Tensor:
    """weights [B, V] float64 with 0 for what top-k, then top-p removes."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(logits.shape[-1], device=logits.device)
    ordered = weights.gather(-1, order).masked_fill(ranks >= _column(top_k, logits), 0.0)
    cumulative = ordered.cumsum(dim=-1)
    before = F.pad(cumulative[:, :-1], (1, 0))  # the token that crosses top_p stays, and always the first
    limits = [limit if limit < 1.0 else float("inf") for limit in top_p]  # 1 keeps even what rounding hides
    ordered = ordered.masked_fill((before >= _column(limits, logits) * cumulative[:, -1:]) & (ranks > 0), 0.0)
    return torch.zeros_like(weights).scatter(-1, order, ordered)


def _column(numbers: Numbers, beside: Tensor) -> Tensor:
    """One number a row as [B, 1] float64."""
    return torch.as_tensor(numbers, dtype=torch.float64, device=beside.device)[:, None]

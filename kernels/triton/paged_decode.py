"""Attention of one new token a sequence over its paged context, split over the context (Triton).

For query head h of KV head k, and the context's positions n in the window,

    out[h] = Σ_n softmax_n(s[h, n]) · V[n, k],      s[h, n] = scale · q[h] · K[n, k]

with s ← c · tanh(s / c) where scores are capped, and exp(sink[h]) in the softmax's denominator where heads have sinks.
A first launch gives each (sequence, KV head, split) a run of the context, which it walks with the running maximum and
sum of Milakov & Gimelshein 2018 (arXiv 1805.02867); a second one joins the splits by their log-sum-exps, as in
Flash-Decoding (Dao et al. 2023). The query heads of a group share one load of K and V. A read of the context costs its
bytes once, so the time at best is that of the bytes.

Sequences past num_rows, a number read on the device, and sequences with more than one new token are left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.batch import BatchTensors
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    dot_precision,
    launch_options,
    multiply,
    num_processors,
    power_of_two,
)
from sleb.kernels.triton.tuning import Config, Launch, bucket, tuned

_MIN_ROWS = 16  # rows that a matrix product has at least
_MAX_SPLITS = 64
_MIN_SPLIT = 256  # tokens: shorter ones are not worth the second launch
# Sections of one array, at any alignment, and single numbers: to specialise would compile once more for each case.
INTEGERS = ["page_table", "table_rows", "context_lens", "query_starts", "num_rows"]
_PROGRAMS_A_PROCESSOR = 4  # enough loads under way to fill the memory's pipeline
_LOG2_E = 1.4426950408889634

# The first is what runs untuned.
CONFIGS = tuple(
    Config(block=block, num_warps=warps, num_stages=stages)
    for block, warps, stages in ((64, 4, 3), (32, 4, 4), (64, 4, 2), (64, 2, 3), (128, 4, 2), (128, 8, 3))
)
# For heads of more than 512 bytes: others take more shared memory than the smallest GPUs have.
WIDE_CONFIGS = (Config(block=16, num_warps=4, num_stages=3), Config(block=32, num_warps=4, num_stages=3))


def configs_for(head_dim: int, itemsize: int) -> tuple[Config, ...]:
    """The configurations to choose from; the first is what runs untuned, on every GPU."""
    return WIDE_CONFIGS if head_dim * itemsize > 512 else CONFIGS


@triton.jit
def score(q, keys, scale, cap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """q · keys in units of log 2, of arguments that `score_scales` gives."""
    scores = multiply(q, tl.trans(keys), PRECISION) * scale
    if CAPPED:  # tanh(y) = 2 sigmoid(2y) − 1
        scores = (2.0 * tl.sigmoid(scores) - 1.0) * cap
    return scores


def score_scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """`scale` and `cap` of `score`."""
    return (scale * _LOG2_E, 0.0) if softcap is None else (2.0 * scale / softcap, softcap * _LOG2_E)


@triton.jit
def first_score(sinks, head, present, HAS_SINKS: tl.constexpr):
    """The running maximum and sum before any position: those of the heads' sinks, or of nothing."""
    highest = tl.full(head.shape, float("-inf"), tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + head, mask=present, other=float("-inf")).to(tl.float32) * 1.4426950408889634
        total = tl.where(present, 1.0, 0.0)
    return highest, total


@triton.jit(do_not_specialize=["table_stride", "num_splits"], do_not_specialize_on_alignment=INTEGERS)
def _decode(
    query,
    key_cache,
    value_cache,
    page_table,
    table_rows,
    context_lens,
    query_starts,
    num_rows,
    out,
    partial,
    lse,
    sinks,
    table_stride,
    scale,
    cap,
    num_splits,
    GROUP: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    if row >= tl.load(num_rows):
        return
    token = tl.load(query_starts + row).to(tl.int64)
    if tl.load(query_starts + row + 1) - token != 1:
        return
    context = tl.load(context_lens + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    span = tl.cdiv(tl.cdiv(context - first, num_splits), BLOCK) * BLOCK
    start = first + split * span
    stop = tl.minimum(start + span, context)
    if start >= context:
        return

    group = tl.arange(0, BLOCK_GROUP)
    column = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + group
    in_head = column < HEAD_DIM
    query_at = (token * NUM_KV * GROUP + head[:, None]) * HEAD_DIM + column[None, :]
    q = tl.load(query + query_at, mask=(group[:, None] < GROUP) & in_head[None, :], other=0.0)

    # A sink is counted once: with the first run of the context, which every sequence has.
    highest, total = first_score(sinks, head, (group < GROUP) & (split == 0), HAS_SINKS)
    attended = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    pages = page_table + tl.load(table_rows + row).to(tl.int64) * table_stride
    for begin in range(start, stop, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        visible = position < stop
        page = tl.load(pages + position // PAGE_SIZE, mask=visible, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        at = (slot * NUM_KV + kv_head)[:, None] * HEAD_DIM + column[None, :]
        inside = visible[:, None] & in_head[None, :]
        keys = tl.load(key_cache + at, mask=inside, other=0.0)
        scores = score(q, keys, scale, cap, CAPPED, PRECISION)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        fade = tl.exp2(highest - new_highest)
        values = tl.load(value_cache + at, mask=inside, other=0.0)
        attended = attended * fade[:, None]
        attended += multiply(weights.to(values.dtype), values, PRECISION)
        total = total * fade + tl.sum(weights, axis=1)
        highest = new_highest
    attended = attended / total[:, None]

    if not SPLIT:
        tl.store(
            out + query_at,
            attended.to(out.dtype.element_ty),
            mask=(group[:, None] < GROUP) & in_head[None, :],
        )
    else:
        of_split = (row.to(tl.int64) * NUM_KV * GROUP + head) * num_splits + split
        tl.store(lse + of_split, highest + tl.log2(total), mask=group < GROUP)
        tl.store(
            partial + of_split[:, None] * HEAD_DIM + column[None, :],
            attended,
            mask=(group[:, None] < GROUP) & in_head[None, :],
        )


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=INTEGERS)
def _join(
    partial,
    lse,
    context_lens,
    query_starts,
    num_rows,
    out,
    num_splits,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.program_id(1)
    if row >= tl.load(num_rows):
        return
    token = tl.load(query_starts + row).to(tl.int64)
    if tl.load(query_starts + row + 1) - token != 1:
        return
    visible = tl.load(context_lens + row)
    if WINDOW > 0:
        visible = tl.minimum(visible, WINDOW)
    span = tl.cdiv(tl.cdiv(visible, num_splits), BLOCK) * BLOCK
    split = tl.arange(0, BLOCK_SPLITS)
    used = split < tl.cdiv(visible, span)
    column = tl.arange(0, BLOCK_DIM)
    in_head = column < HEAD_DIM
    of_split = (row.to(tl.int64) * NUM_HEADS + head) * num_splits + split
    logs = tl.load(lse + of_split, mask=used, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, axis=0))
    parts = tl.load(
        partial + of_split[:, None] * HEAD_DIM + column[None, :],
        mask=used[:, None] & in_head[None, :],
        other=0.0,
    )
    joined = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    at = (token * NUM_HEADS + head) * HEAD_DIM + column
    tl.store(out + at, joined.to(out.dtype.element_ty), mask=in_head)


def choose_num_splits(num_rows: int, num_kv_heads: int, max_context_len: int, device: torch.device) -> int:
    """Splits of every context: enough programs to fill the GPU, each with a good part of the longest."""
    wanted = ceil_div(_PROGRAMS_A_PROCESSOR * num_processors(device), max(1, num_rows * num_kv_heads))
    return min(power_of_two(wanted), power_of_two(ceil_div(max_context_len, _MIN_SPLIT)), _MAX_SPLITS)


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: BatchTensors,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of the sequences with one new token; the others' rows of `out` stay as they are.

    query: [T, H, D]. key_cache, value_cache: [num_slots, K, D]. sinks: [H]. num_splits: chosen by `choose_num_splits`
    unless given. Returns out, [T, H, D]; see `sleb.kernels.reference.ops.paged_attention`.
    """
    check_contiguous(query=query, key_cache=key_cache, value_cache=value_cache, sinks=sinks)
    out = torch.empty_like(query) if out is None else out
    num_rows = batch.context_lens.shape[0]
    _, num_heads, head_dim = query.shape
    num_kv = key_cache.shape[1]
    if not num_rows:
        return out
    splits = num_splits or choose_num_splits(num_rows, num_kv, batch.max_context_len, query.device)
    shape = (head_dim, num_heads // num_kv, batch.page_size)
    key = ("paged_decode", str(query.dtype), *shape, bucket(num_rows), bucket(batch.max_context_len))

    def launch(config: Config) -> None:
        _launch(query, key_cache, value_cache, batch, scale, window or 0, softcap, sinks, out, splits, config)

    tuned(key, configs_for(head_dim, query.element_size()), Launch(launch))
    return out


def _launch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: BatchTensors,
    scale: float,
    window: int,
    softcap: float | None,
    sinks: Tensor | None,
    out: Tensor,
    splits: int,
    config: Config,
) -> None:
    num_rows = batch.context_lens.shape[0]
    _, num_heads, head_dim = query.shape
    num_kv = key_cache.shape[1]
    block_dim = power_of_two(head_dim, 16)
    shape = (num_rows, num_heads, splits)
    lse = torch.empty(shape if splits > 1 else 0, dtype=torch.float32, device=query.device)
    partial = torch.empty(
        *(shape if splits > 1 else (0,)), head_dim, dtype=torch.float32, device=query.device
    )
    _decode[(splits, num_kv, num_rows)](
        query,
        key_cache,
        value_cache,
        batch.page_table,
        batch.table_rows,
        batch.context_lens,
        batch.query_starts,
        batch.num_rows,
        out,
        partial,
        lse,
        query if sinks is None else sinks,
        batch.page_table.stride(0),
        *score_scales(scale, softcap),
        splits,
        GROUP=num_heads // num_kv,
        NUM_KV=num_kv,
        HEAD_DIM=head_dim,
        PAGE_SIZE=batch.page_size,
        WINDOW=window,
        SPLIT=splits > 1,
        CAPPED=softcap is not None,
        HAS_SINKS=sinks is not None,
        BLOCK_GROUP=power_of_two(num_heads // num_kv, _MIN_ROWS),
        BLOCK_DIM=block_dim,
        BLOCK=config["block"],
        PRECISION=dot_precision(query.dtype),
        **launch_options(config["num_warps"], config["num_stages"]),
    )
    if splits == 1:
        return
    _join[(num_heads, num_rows)](
        partial,
        lse,
        batch.context_lens,
        batch.query_starts,
        batch.num_rows,
        out,
        splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        WINDOW=window,
        BLOCK_SPLITS=_MAX_SPLITS,
        BLOCK_DIM=block_dim,
        BLOCK=config["block"],
        **launch_options(),
    )

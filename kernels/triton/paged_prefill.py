"""Causal attention of the new tokens of many sequences over their paged context (Triton): chunked prefill.

Query i of a sequence with Q new tokens and a context of L stands at position L − Q + i and sees the positions up to its
own, the last `window` of them where there is a window:

    out[i, h] = Σ_n softmax_n(scale · q[i, h] · K[n, k]) · V[n, k],     max(0, p − window + 1) ≤ n ≤ p = L − Q + i

with capped scores and sinks as in `paged_decode`.
A program takes a block of rows of one sequence and one KV head, where a row is a (query, head of the group) pair, so
grouped heads share each load of K and V (FlashAttention-2, Dao 2023, arXiv 2307.08691, over pages). What all its rows
see is computed without a mask, the rest with one. Sequences past num_rows, a number read on the device, and those with
one new token (`paged_decode`'s) are left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.batch import BatchTensors
from sleb.kernels.triton.paged_decode import first_score, score, score_scales
from sleb.kernels.triton.paged_items import INTEGERS
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    dot_precision,
    launch_options,
    multiply,
    power_of_two,
)
from sleb.kernels.triton.tuning import Config, Launch, bucket, tuned

CONFIGS = tuple(
    Config(rows=rows, block=block, num_warps=warps, num_stages=stages)
    for rows, block, warps, stages in (
        (64, 64, 4, 2),
        (128, 64, 8, 2),
        (128, 128, 8, 2),
        (64, 32, 4, 3),
    )
)

# For heads of more than 256 bytes, whose tiles fill registers and shared memory sooner, and of more than 512.
WIDE_CONFIGS = tuple(
    Config(rows=rows, block=block, num_warps=warps, num_stages=stages)
    for rows, block, warps, stages in ((64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2))
)
WIDEST_CONFIGS = (Config(rows=32, block=16, num_warps=8, num_stages=2),)


def configs_for(head_dim: int, itemsize: int) -> tuple[Config, ...]:
    """The configurations to choose from; the first is what runs untuned, on every GPU."""
    num_bytes = head_dim * itemsize
    if num_bytes > 512:
        return WIDEST_CONFIGS
    return WIDE_CONFIGS if num_bytes > 256 else CONFIGS


@triton.jit
def _walk(
    q,
    attended,
    highest,
    total,
    key_cache,
    value_cache,
    pages,
    kv_head,
    own,
    start,
    stop,
    context,
    scale,
    cap,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Blocks of positions from start to stop; unmasked ones must be whole and visible to every row."""
    column = tl.arange(0, BLOCK_DIM)[None, :]
    for begin in range(start, stop, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        present = position < context
        page = tl.load(pages + position // PAGE_SIZE, mask=present, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        at = (slot * NUM_KV + kv_head)[:, None] * HEAD_DIM + column
        inside = present[:, None] & (column < HEAD_DIM)
        keys = tl.load(key_cache + at, mask=inside, other=0.0)
        scores = score(q, keys, scale, cap, CAPPED, PRECISION)
        if MASKED:
            visible = position[None, :] <= own[:, None]
            if WINDOW > 0:
                visible = visible & (position[None, :] > own[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no highest score to subtract.
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(highest - shift)
        values = tl.load(value_cache + at, mask=inside, other=0.0)
        attended = attended * fade[:, None]
        attended += multiply(weights.to(values.dtype), values, PRECISION)
        total = total * fade + tl.sum(weights, axis=1)
        highest = new_highest
    return attended, highest, total


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=INTEGERS)
def _prefill(
    query,
    key_cache,
    value_cache,
    page_table,
    table_rows,
    context_lens,
    query_starts,
    num_rows,
    out,
    sinks,
    table_stride,
    scale,
    cap,
    GROUP: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head = tl.program_id(1)
    row = tl.program_id(2)
    if row >= tl.load(num_rows):
        return
    token = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - token
    # The last blocks see the most: they begin first.
    block = tl.cdiv(num_queries * GROUP, ROWS) - 1 - tl.program_id(0)
    if num_queries == 1 or block < 0:
        return
    context = tl.load(context_lens + row)
    line = block * ROWS + tl.arange(0, ROWS)
    index = line // GROUP
    head = kv_head * GROUP + line % GROUP
    column = tl.arange(0, BLOCK_DIM)
    inside = (index < num_queries)[:, None] & (column < HEAD_DIM)[None, :]
    at = ((token.to(tl.int64) + index) * NUM_KV * GROUP + head)[:, None] * HEAD_DIM + column[None, :]
    q = tl.load(query + at, mask=inside, other=0.0)

    own = context - num_queries + index  # positions of the rows
    lowest = context - num_queries + block * ROWS // GROUP
    last = tl.minimum(context - num_queries + (block * ROWS + ROWS - 1) // GROUP, context - 1)
    stop = last + 1
    start = 0
    whole_from = 0
    if WINDOW > 0:
        start = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK * BLOCK
        # From here on the window of the last row, and so of every row, holds what it sees.
        whole_from = tl.minimum(tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK) * BLOCK, stop)
    whole_to = tl.maximum((lowest + 1) // BLOCK * BLOCK, whole_from)

    highest, total = first_score(sinks, head, index < num_queries, HAS_SINKS)
    attended = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    pages = page_table + tl.load(table_rows + row).to(tl.int64) * table_stride
    if WINDOW > 0:
        attended, highest, total = _walk(
            q, attended, highest, total, key_cache, value_cache, pages, kv_head, own, start, whole_from,
            context, scale, cap, NUM_KV, HEAD_DIM, PAGE_SIZE, WINDOW, CAPPED, True, BLOCK_DIM, BLOCK, PRECISION,
        )  # fmt: skip
    attended, highest, total = _walk(
        q, attended, highest, total, key_cache, value_cache, pages, kv_head, own, whole_from, whole_to,
        context, scale, cap, NUM_KV, HEAD_DIM, PAGE_SIZE, WINDOW, CAPPED, False, BLOCK_DIM, BLOCK, PRECISION,
    )  # fmt: skip
    attended, highest, total = _walk(
        q, attended, highest, total, key_cache, value_cache, pages, kv_head, own, whole_to, stop,
        context, scale, cap, NUM_KV, HEAD_DIM, PAGE_SIZE, WINDOW, CAPPED, True, BLOCK_DIM, BLOCK, PRECISION,
    )  # fmt: skip
    attended = attended / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out + at, attended.to(out.dtype.element_ty), mask=inside)


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: BatchTensors,
    scale: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of the sequences with several new tokens; the others' rows of `out` stay as they are.

    query: [T, H, D]. key_cache, value_cache: [num_slots, K, D]. sinks: [H]. Returns out, [T, H, D]; see
    `sleb.kernels.reference.ops.paged_attention`.
    """
    check_contiguous(query=query, key_cache=key_cache, value_cache=value_cache, sinks=sinks)
    out = torch.empty_like(query) if out is None else out
    num_rows = batch.context_lens.shape[0]
    _, num_heads, head_dim = query.shape
    num_kv = key_cache.shape[1]
    if not num_rows:
        return out
    group = num_heads // num_kv

    def launch(config: Config) -> None:
        rows = config["rows"]
        _prefill[(ceil_div(batch.max_query_len * group, rows), num_kv, num_rows)](
            query,
            key_cache,
            value_cache,
            batch.page_table,
            batch.table_rows,
            batch.context_lens,
            batch.query_starts,
            batch.num_rows,
            out,
            query if sinks is None else sinks,
            batch.page_table.stride(0),
            *score_scales(scale, softcap),
            GROUP=group,
            NUM_KV=num_kv,
            HEAD_DIM=head_dim,
            PAGE_SIZE=batch.page_size,
            WINDOW=window or 0,
            CAPPED=softcap is not None,
            HAS_SINKS=sinks is not None,
            BLOCK_DIM=power_of_two(head_dim, 16),
            ROWS=rows,
            BLOCK=config["block"],
            PRECISION=dot_precision(query.dtype),
            **launch_options(config["num_warps"], config["num_stages"]),
        )

    configs = configs_for(head_dim, query.element_size())
    key = ("paged_prefill", str(query.dtype), head_dim, group, batch.page_size)
    tuned((*key, bucket(query.shape[0]), bucket(batch.max_context_len)), configs, Launch(launch))
    return out

"""Causal attention of the new tokens of many sequences over their paged context (Triton): chunked prefill.

Query i of a sequence with Q new tokens and a context of L stands at position L − Q + i and sees the positions up to its
own, the last `window` of them where there is a window:

    out[i, h] = Σ_n softmax_n(scale · q[i, h] · K[n, k]) · V[n, k],     max(0, p − window + 1) ≤ n ≤ p = L − Q + i

with capped scores and sinks as in `paged_decode`.
A unit is a block of rows of one sequence, one KV head and a part of the context (`paged_items`), where a row is a
(query, head of the group) pair, so grouped heads share each load of K and V (FlashAttention-2, Dao 2023, arXiv
2307.08691, over pages). The context is cut only where the blocks of a sequence alone would leave processors idle, as
those of a short turn over a long conversation do, and as evenly as tiles allow. What all rows of a block see is
computed without a mask, the rest with one. Sequences past num_rows, a number read on the device, and those with one new
token (`paged_decode`'s) are left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.batch import BatchTensors
from sleb.kernels.triton.paged_decode import first_score, score, score_scales
from sleb.kernels.triton.paged_items import (
    INTEGERS,
    arrives_last,
    find_row,
    load_tile,
    partial_bound,
    partial_results,
    read_rows,
    rows_to_count,
)
from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    counters,
    dot_precision,
    launch_next,
    launch_options,
    multiply,
    num_processors,
    pdl_launch,
    power_of_two,
    wait_for_previous,
)
from sleb.kernels.triton.tuning import Config, Launch, bucket, tuned

# Tokens of a part of a context, at least: each leaves results of all its rows, which are read once more.
SPAN = 1024
MOST_PARTS = 64  # of a context: one program adds their results up
_JOINED_VALUES = 2048  # that it takes at a time
_PROGRAMS_A_PROCESSOR = 2

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


def configs_for(head_dim: int, itemsize: int, widens: bool) -> tuple[Config, ...]:
    """The configurations to choose from; the first is what runs untuned, on every GPU. widens: as in `paged_decode`."""
    num_bytes = head_dim * itemsize
    if num_bytes > 512:
        return WIDEST_CONFIGS
    if num_bytes > 256:
        return WIDE_CONFIGS
    return tuple(config for config in CONFIGS if not widens or config["rows"] < 128)


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
    # From 0 on: of a loop from elsewhere Triton forgets which addresses are side by side.
    for begin in range(0, stop - start, BLOCK):
        position = start + begin + tl.arange(0, BLOCK)
        present = position < context
        page = tl.load(pages + position // PAGE_SIZE, mask=present, other=0).to(tl.int64)
        slot = page * PAGE_SIZE + position % PAGE_SIZE
        at = (slot * NUM_KV + kv_head)[:, None] * HEAD_DIM + column
        inside = present[:, None] & (column < HEAD_DIM)
        keys = load_tile(key_cache, at, inside, q.dtype)
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
        values = load_tile(value_cache, at, inside, q.dtype)
        attended = attended * fade[:, None]
        attended += multiply(weights.to(values.dtype), values, PRECISION)
        total = total * fade + tl.sum(weights, axis=1)
        highest = new_highest
    return attended, highest, total


@triton.jit
def _blocks(
    new,
    context,
    shift,
    most,
    enough,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Blocks of rows of a sequence, and parts of the context of each: of SPAN tokens or more, at most `most`, and no
    more than make `enough` items of all blocks."""
    blocks = tl.cdiv(new * GROUP, ROWS)
    visible = context
    if WINDOW > 0:
        visible = tl.minimum(context, WINDOW + (ROWS + GROUP - 1) // GROUP)
    wanted = tl.minimum(enough // tl.maximum(blocks, 1), most)
    return blocks, tl.maximum(tl.minimum(tl.cdiv(visible, SPAN << shift), wanted), 1)


@triton.jit
def _number(
    query_starts,
    context_lens,
    num_rows,
    most,
    enough,
    bound,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS_LAID: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Items of each sequence with several new tokens, those that are cut, and how often parts were doubled for that."""
    new, context = read_rows(query_starts, context_lens, num_rows, ROWS_LAID)
    new = tl.where(new > 1, new, 0)
    shift = 0
    blocks, parts = _blocks(new, context, shift, most, enough, GROUP, WINDOW, SPAN, ROWS)
    while tl.sum(tl.where(parts > 1, blocks * parts, 0)) > bound:
        shift += 1
        blocks, parts = _blocks(new, context, shift, most, enough, GROUP, WINDOW, SPAN, ROWS)
    return blocks * parts, tl.where(parts > 1, blocks * parts, 0), shift


@triton.jit
def _join(
    partial,
    lse,
    first,
    number,
    out,
    token,
    num_queries,
    block,
    kv_head,
    GROUP: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Adds up the results that the parts of a block's context have left, JOINED rows at a time."""
    column = tl.arange(0, BLOCK_DIM)
    for begin in range(0, ROWS, JOINED):
        row = begin + tl.arange(0, JOINED)
        line = block * ROWS + row
        inside = (line // GROUP < num_queries)[:, None] & (column < HEAD_DIM)[None, :]
        highest = tl.full([JOINED], float("-inf"), tl.float32)
        total = tl.zeros([JOINED], tl.float32)
        joined = tl.zeros([JOINED, BLOCK_DIM], tl.float32)
        for part in range(number):
            at = ((first + part) * NUM_KV + kv_head) * ROWS + row
            logs = tl.load(lse + at)
            results = tl.load(partial + at[:, None] * HEAD_DIM + column[None, :], mask=inside, other=0.0)
            new_highest = tl.maximum(highest, logs)
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            weights = tl.exp2(logs - shift)
            fade = tl.exp2(highest - shift)
            joined = joined * fade[:, None] + weights[:, None] * results
            total = total * fade + weights
            highest = new_highest
        joined = joined / tl.where(total > 0.0, total, 1.0)[:, None]
        head = kv_head * GROUP + line % GROUP
        at = ((token.to(tl.int64) + line // GROUP) * NUM_KV * GROUP + head)[:, None] * HEAD_DIM + column[
            None, :
        ]
        tl.store(out + at, joined.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride", "most", "enough", "bound"], do_not_specialize_on_alignment=INTEGERS
)
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
    partial,
    lse,
    counters,
    sinks,
    table_stride,
    most,
    enough,
    bound,
    scale,
    cap,
    GROUP: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ROWS_LAID: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    JOINED: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wait_for_previous()
    launch_next()
    items, kept, shift = _number(
        query_starts, context_lens, num_rows, most, enough, bound, GROUP, WINDOW, SPAN, ROWS_LAID, ROWS
    )
    ends = tl.cumsum(items, 0)
    # What does not change from unit to unit is not worth registers over a walk.
    for unit in tl.range(tl.program_id(0), tl.sum(items) * NUM_KV, tl.num_programs(0), disable_licm=True):
        item, kv_head = unit // NUM_KV, unit % NUM_KV
        row, before, kept_before = find_row(item, items, ends, kept)
        token = tl.load(query_starts + row)
        num_queries = tl.load(query_starts + row + 1) - token
        context = tl.load(context_lens + row)
        blocks, parts = _blocks(num_queries, context, shift, most, enough, GROUP, WINDOW, SPAN, ROWS)
        # The last blocks see the most: they begin first.
        block = blocks - 1 - (item - before) // parts
        part = (item - before) % parts

        line = block * ROWS + tl.arange(0, ROWS)
        index = line // GROUP
        head = kv_head * GROUP + line % GROUP
        column = tl.arange(0, BLOCK_DIM)
        inside = (index < num_queries)[:, None] & (column < HEAD_DIM)[None, :]
        at = ((token.to(tl.int64) + index) * NUM_KV * GROUP + head)[:, None] * HEAD_DIM + column[None, :]
        own = context - num_queries + index  # positions of the rows
        lowest = context - num_queries + block * ROWS // GROUP
        last = tl.minimum(context - num_queries + (block * ROWS + ROWS - 1) // GROUP, context - 1)
        start, stop = 0, last + 1
        whole_from = 0
        if WINDOW > 0:
            start = tl.maximum(lowest - WINDOW + 1, 0) // BLOCK * BLOCK
            # From here on the window of the last row, and so of every row, holds what it sees.
            whole_from = tl.minimum(tl.cdiv(tl.maximum(last - WINDOW + 1, 0), BLOCK) * BLOCK, stop)
        whole_to = tl.maximum((lowest + 1) // BLOCK * BLOCK, whole_from)
        span = tl.cdiv(tl.cdiv(stop - start, parts), BLOCK) * BLOCK
        number = tl.cdiv(stop - start, span)  # of parts that hold something
        start += part * span
        if part < number:
            stop = tl.minimum(start + span, stop)
            whole_from = tl.minimum(tl.maximum(whole_from, start), stop)
            whole_to = tl.minimum(tl.maximum(whole_to, start), stop)
            q = tl.load(query + at, mask=inside, other=0.0)
            # A sink is counted once: with the first part, which every block has.
            highest, total = first_score(sinks, head, (index < num_queries) & (part == 0), HAS_SINKS)
            attended = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
            pages = page_table + tl.load(table_rows + row).to(tl.int64) * table_stride
            if WINDOW > 0:
                attended, highest, total = _walk(
                    q, attended, highest, total, key_cache, value_cache, pages, kv_head, own, start, whole_from,
                    context, scale, cap,
                    NUM_KV, HEAD_DIM, PAGE_SIZE, WINDOW, CAPPED, True, BLOCK_DIM, BLOCK, PRECISION,
                )  # fmt: skip
            attended, highest, total = _walk(
                q, attended, highest, total, key_cache, value_cache, pages, kv_head, own, whole_from, whole_to,
                context, scale, cap,
                NUM_KV, HEAD_DIM, PAGE_SIZE, WINDOW, CAPPED, False, BLOCK_DIM, BLOCK, PRECISION,
            )  # fmt: skip
            attended, highest, total = _walk(
                q, attended, highest, total, key_cache, value_cache, pages, kv_head, own, whole_to, stop,
                context, scale, cap,
                NUM_KV, HEAD_DIM, PAGE_SIZE, WINDOW, CAPPED, True, BLOCK_DIM, BLOCK, PRECISION,
            )  # fmt: skip
            attended = attended / tl.where(total > 0.0, total, 1.0)[:, None]
            if number == 1:
                tl.store(out + at, attended.to(out.dtype.element_ty), mask=inside)
            else:
                first = kept_before + item - before - part
                place = ((first + part) * NUM_KV + kv_head) * ROWS + tl.arange(0, ROWS)
                tl.store(lse + place, highest + tl.log2(total))
                tl.store(
                    partial + place[:, None] * HEAD_DIM + column[None, :],
                    attended,
                    mask=(column < HEAD_DIM)[None, :],
                )
                if arrives_last(counters + first * NUM_KV + kv_head, number):
                    _join(
                        partial, lse, first, number, out, token, num_queries, block, kv_head,
                        GROUP, NUM_KV, HEAD_DIM, BLOCK_DIM, ROWS, JOINED,
                    )  # fmt: skip


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

    query: [T, H, D]. key_cache, value_cache: [num_slots, K, D], in the dtype of query or as bytes of e4m3. sinks: [H].
    Returns out, [T, H, D]; see `sleb.kernels.reference.ops.paged_attention`.
    """
    check_contiguous(query=query, key_cache=key_cache, value_cache=value_cache, sinks=sinks)
    out = torch.empty_like(query) if out is None else out
    num_tokens, num_heads, head_dim = query.shape
    if not batch.context_lens.shape[0] or num_tokens < 2:
        return out
    configs = configs_for(head_dim, query.element_size(), key_cache.dtype == torch.uint8)
    dtypes, group = (str(query.dtype), str(key_cache.dtype)), num_heads // key_cache.shape[1]
    key = ("paged_prefill", *dtypes, head_dim, group, batch.page_size)

    def launch(config: Config) -> None:
        _launch(query, key_cache, value_cache, batch, scale, window or 0, softcap, sinks, out, config)

    tuned((*key, bucket(num_tokens), bucket(batch.max_context_len)), configs, Launch(launch))
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
    config: Config,
) -> None:
    num_rows, device, rows = batch.context_lens.shape[0], query.device, config["rows"]
    num_tokens, num_heads, head_dim = query.shape
    num_kv = key_cache.shape[1]
    group = num_heads // num_kv
    programs = _PROGRAMS_A_PROCESSOR * num_processors(device)
    # Bounds of what lengths may make: of sequences, blocks, parts of a block and items of blocks that are cut.
    sequences = min(num_rows, num_tokens // 2)
    blocks = min(
        ceil_div(num_tokens * group, rows) + sequences,
        sequences * ceil_div(batch.max_query_len * group, rows),
    )
    longest = batch.max_context_len
    if window:
        longest = min(longest, window + ceil_div(rows, group))
    parts = min(ceil_div(longest, SPAN), MOST_PARTS)
    enough = programs // num_kv
    cut = min(blocks * parts, sequences * enough) if parts > 1 else 0
    bound = partial_bound(cut, num_kv, rows * head_dim)
    _prefill[(min(programs, (blocks + cut) * num_kv),)](
        query,
        key_cache,
        value_cache,
        batch.page_table,
        batch.table_rows,
        batch.context_lens,
        batch.query_starts,
        batch.num_rows,
        out,
        *partial_results(bound, num_kv, rows, head_dim, device),
        counters(device),
        query if sinks is None else sinks,
        batch.page_table.stride(0),
        MOST_PARTS,
        enough,
        bound,
        *score_scales(scale, softcap),
        GROUP=group,
        NUM_KV=num_kv,
        HEAD_DIM=head_dim,
        PAGE_SIZE=batch.page_size,
        WINDOW=window,
        SPAN=SPAN,
        CAPPED=softcap is not None,
        HAS_SINKS=sinks is not None,
        ROWS_LAID=rows_to_count(batch),
        BLOCK_DIM=power_of_two(head_dim, 16),
        ROWS=rows,
        JOINED=min(rows, max(1, _JOINED_VALUES // power_of_two(head_dim, 16))),
        BLOCK=config["block"],
        PRECISION=dot_precision(query.dtype),
        **launch_options(config["num_warps"], config["num_stages"]),
        **pdl_launch(device),
    )

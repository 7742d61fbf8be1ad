"""Attention of one new token a sequence over its paged context, in items of the context (Triton).

For query head h of KV head k, and the context's positions n in the window,

    out[h] = Σ_n softmax_n(s[h, n]) · V[n, k],      s[h, n] = scale · q[h] · K[n, k]

with s ← c · tanh(s / c) where scores are capped, and exp(sink[h]) in the softmax's denominator where heads have sinks.
One launch walks the items of all sequences (`paged_items`), each with the running maximum and sum of Milakov &
Gimelshein 2018 (arXiv 1805.02867). The query heads of a group share one load of K and V. A read of the context costs
its bytes once, so the time at best is that of the bytes.

Sequences past num_rows, a number read on the device, and sequences with more than one new token are left alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.batch import BatchTensors
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

_MIN_ROWS = 16  # rows that a matrix product has at least
# Tokens of an item. A longer one leaves processors idle in small batches (8 KV heads over 1,000 tokens are 32 units);
# of a shorter one the result, which is written and read once more, is no longer small beside K and V.
SPAN = 256
MOST_ITEMS = 128  # of a sequence: one program adds their results up
_JOINED_VALUES = 2048  # that it takes at a time, with as many on their way
_PROGRAMS_A_PROCESSOR = 4  # enough loads under way to fill the memory's pipeline
_LOG2_E = 1.4426950408889634

# The first is what runs untuned.
CONFIGS = tuple(
    Config(block=block, num_warps=warps, num_stages=stages)
    for block, warps, stages in ((64, 4, 3), (32, 4, 4), (64, 4, 2), (64, 2, 3), (128, 4, 2), (128, 8, 3))
)
# For heads of more than 512 bytes: others take more shared memory than the smallest GPUs have.
WIDE_CONFIGS = (Config(block=16, num_warps=4, num_stages=3), Config(block=32, num_warps=4, num_stages=3))


def configs_for(head_dim: int, itemsize: int, widens: bool) -> tuple[Config, ...]:
    """The configurations to choose from; the first is what runs untuned, on every GPU.

    widens: the caches hold bytes. Of large tiles their numbers take more registers than a thread has.
    """
    if head_dim * itemsize > 512:
        return WIDE_CONFIGS
    return tuple(config for config in CONFIGS if not widens or config["block"] < 128)


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


@triton.jit
def _items(context, shift, most, WINDOW: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of an item of a sequence, and its items: of SPAN tokens, or of more so that they are at most `most`."""
    visible = context
    if WINDOW > 0:
        visible = tl.minimum(context, WINDOW)
    span = tl.maximum(tl.cdiv(tl.cdiv(visible, most), BLOCK) * BLOCK, SPAN) << shift
    return span, tl.cdiv(visible, span)


@triton.jit
def _number(
    query_starts,
    context_lens,
    num_rows,
    most,
    bound,
    WINDOW: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS_LAID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Items of each sequence with one new token, those that are cut, and how often items were doubled for that."""
    new, context = read_rows(query_starts, context_lens, num_rows, ROWS_LAID)
    context = tl.where(new == 1, context, 0)
    shift = 0
    _, items = _items(context, shift, most, WINDOW, SPAN, BLOCK)
    while tl.sum(tl.where(items > 1, items, 0)) > bound:
        shift += 1
        _, items = _items(context, shift, most, WINDOW, SPAN, BLOCK)
    return items, tl.where(items > 1, items, 0), shift


@triton.jit
def _join(
    partial,
    lse,
    first,
    number,
    out,
    kv_head,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    LINE: tl.constexpr,
):
    """Adds up the results that the items of a sequence have left for the heads of a group, side by side in a line."""
    column = tl.arange(0, LINE)
    in_line = column < GROUP * HEAD_DIM
    highest = tl.full([LINE], float("-inf"), tl.float32)
    total = tl.zeros([LINE], tl.float32)
    joined = tl.zeros([LINE], tl.float32)
    for begin in tl.range(0, number, PARTS, num_stages=3):
        part = begin + tl.arange(0, PARTS)
        at = (first + part) * NUM_KV + kv_head
        inside = (part < number)[:, None] & in_line[None, :]
        logs = tl.load(
            lse + at[:, None] * GROUP + (column // HEAD_DIM)[None, :], mask=inside, other=float("-inf")
        )
        results = tl.load(
            partial + at[:, None] * (GROUP * HEAD_DIM) + column[None, :], mask=inside, other=0.0
        )
        new_highest = tl.maximum(highest, tl.max(logs, axis=0))
        shift = tl.where(in_line, new_highest, 0.0)
        weights = tl.exp2(logs - shift[None, :])
        fade = tl.exp2(highest - shift)
        joined = joined * fade + tl.sum(weights * results, axis=0)
        total = total * fade + tl.sum(weights, axis=0)
        highest = new_highest
    joined = joined / tl.where(in_line, total, 1.0)
    tl.store(out + column, joined.to(out.dtype.element_ty), mask=in_line)


@triton.jit(do_not_specialize=["table_stride", "most", "bound"], do_not_specialize_on_alignment=INTEGERS)
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
    counters,
    sinks,
    table_stride,
    most,
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
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    LINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    wait_for_previous()
    launch_next()
    items, kept, shift = _number(
        query_starts, context_lens, num_rows, most, bound, WINDOW, SPAN, ROWS_LAID, BLOCK
    )
    ends = tl.cumsum(items, 0)
    group = tl.arange(0, BLOCK_GROUP)
    column = tl.arange(0, BLOCK_DIM)
    in_head = column < HEAD_DIM
    in_group = (group < GROUP)[:, None] & in_head[None, :]
    # What does not change from unit to unit is not worth registers over a walk.
    for unit in tl.range(tl.program_id(0), tl.sum(items) * NUM_KV, tl.num_programs(0), disable_licm=True):
        item, kv_head = unit // NUM_KV, unit % NUM_KV
        row, before, kept_before = find_row(item, items, ends, kept)
        part = item - before
        context = tl.load(context_lens + row)
        span, number = _items(context, shift, most, WINDOW, SPAN, BLOCK)
        start = part * span
        if WINDOW > 0:
            start += tl.maximum(context - WINDOW, 0)
        stop = tl.minimum(start + span, context)

        token = tl.load(query_starts + row).to(tl.int64)
        head = kv_head * GROUP + group
        line = (token * NUM_KV + kv_head) * GROUP * HEAD_DIM
        of_group = group[:, None] * HEAD_DIM + column[None, :]
        q = tl.load(query + line + of_group, mask=in_group, other=0.0)
        # A sink is counted once: with the first item, which every sequence has.
        highest, total = first_score(sinks, head, (group < GROUP) & (part == 0), HAS_SINKS)
        attended = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
        pages = page_table + tl.load(table_rows + row).to(tl.int64) * table_stride
        # From 0 on: of a loop from elsewhere Triton forgets which addresses are side by side.
        for begin in range(0, stop - start, BLOCK):
            position = start + begin + tl.arange(0, BLOCK)
            visible = position < stop
            page = tl.load(pages + position // PAGE_SIZE, mask=visible, other=0).to(tl.int64)
            slot = page * PAGE_SIZE + position % PAGE_SIZE
            at = (slot * NUM_KV + kv_head)[:, None] * HEAD_DIM + column[None, :]
            inside = visible[:, None] & in_head[None, :]
            keys = load_tile(key_cache, at, inside, q.dtype)
            scores = score(q, keys, scale, cap, CAPPED, PRECISION)
            scores = tl.where(visible[None, :], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_highest[:, None])
            fade = tl.exp2(highest - new_highest)
            values = load_tile(value_cache, at, inside, q.dtype)
            attended = attended * fade[:, None]
            attended += multiply(weights.to(values.dtype), values, PRECISION)
            total = total * fade + tl.sum(weights, axis=1)
            highest = new_highest
        attended = attended / total[:, None]
        if number == 1:
            tl.store(out + line + of_group, attended.to(out.dtype.element_ty), mask=in_group)
        else:
            place = (kept_before + part) * NUM_KV + kv_head
            tl.store(lse + place * GROUP + group, highest + tl.log2(total), mask=group < GROUP)
            tl.store(partial + place * (GROUP * HEAD_DIM) + of_group, attended, mask=in_group)
            if arrives_last(counters + kept_before * NUM_KV + kv_head, number):
                _join(
                    partial, lse, kept_before, number, out + line, kv_head,
                    NUM_KV, GROUP, HEAD_DIM, PARTS, LINE,
                )  # fmt: skip


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
) -> Tensor:
    """Attention of the sequences with one new token; the others' rows of `out` stay as they are.

    query: [T, H, D]. key_cache, value_cache: [num_slots, K, D], in the dtype of query or as bytes of e4m3. sinks: [H].
    Returns out, [T, H, D]; see `sleb.kernels.reference.ops.paged_attention`.
    """
    check_contiguous(query=query, key_cache=key_cache, value_cache=value_cache, sinks=sinks)
    out = torch.empty_like(query) if out is None else out
    num_rows = batch.context_lens.shape[0]
    _, num_heads, head_dim = query.shape
    if not num_rows:
        return out
    shape = (head_dim, num_heads // key_cache.shape[1], batch.page_size)
    key = ("paged_decode", str(query.dtype), str(key_cache.dtype), *shape)

    def launch(config: Config) -> None:
        _launch(query, key_cache, value_cache, batch, scale, window or 0, softcap, sinks, out, config)

    tuned(
        (*key, bucket(num_rows), bucket(batch.max_context_len)),
        configs_for(head_dim, query.element_size(), key_cache.dtype == torch.uint8),
        Launch(launch),
    )
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
    num_rows, device = batch.context_lens.shape[0], query.device
    _, num_heads, head_dim = query.shape
    num_kv = key_cache.shape[1]
    group = num_heads // num_kv
    programs = _PROGRAMS_A_PROCESSOR * num_processors(device)
    most = max(1, min(programs // num_kv, MOST_ITEMS))
    longest = min(batch.max_context_len, window or batch.max_context_len)
    items = min(most, ceil_div(longest, SPAN))
    bound = partial_bound(num_rows * items if items > 1 else 0, num_kv, group * head_dim)
    line = power_of_two(group * head_dim)
    _decode[(min(programs, num_rows * max(1, items) * num_kv),)](
        query,
        key_cache,
        value_cache,
        batch.page_table,
        batch.table_rows,
        batch.context_lens,
        batch.query_starts,
        batch.num_rows,
        out,
        *partial_results(bound, num_kv, group, head_dim, device),
        counters(device),
        query if sinks is None else sinks,
        batch.page_table.stride(0),
        most,
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
        BLOCK_GROUP=power_of_two(group, _MIN_ROWS),
        BLOCK_DIM=power_of_two(head_dim, 16),
        BLOCK=config["block"],
        PARTS=max(1, _JOINED_VALUES // line),
        LINE=line,
        PRECISION=dot_precision(query.dtype),
        **launch_options(config["num_warps"], config["num_stages"]),
        **pdl_launch(device),
    )

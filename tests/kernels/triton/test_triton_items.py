"""How work items of attention are numbered: on numbers alone, by a model that the kernels' own numbering is held to."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl

from sleb.kernels.triton import paged_decode, paged_prefill
from sleb.kernels.triton.paged_decode import _items as decode_items
from sleb.kernels.triton.paged_decode import _number as number_decodes
from sleb.kernels.triton.paged_items import find_row, partial_bound
from sleb.kernels.triton.paged_prefill import _blocks as chunk_blocks
from sleb.kernels.triton.paged_prefill import _number as number_chunks

PROCESSORS = 132  # of an H100 or H200
BLOCK = 64
LAID = 16


def ceil_div(number, divisor):
    return -(-number // divisor)


def decode_model(lens, window, span, most, bound):
    """(sequence, tokens) of each item, in order; doubled until those that are cut are at most `bound`."""
    shift = 0
    while True:
        items = []
        for row, (new, context) in enumerate(lens):
            visible = min(context, window or context) if new == 1 else 0
            size = max(span, ceil_div(ceil_div(visible, most), BLOCK) * BLOCK) << shift
            items.append([(row, min(size, visible - at)) for at in range(0, visible, size)])
        if sum(len(each) for each in items if len(each) > 1) <= bound:
            return [item for each in items for item in each]
        shift += 1


def chunk_model(lens, group, rows, span, most, enough, bound):
    """(sequence, block, tokens) of each item of sequences with several new tokens, without a window."""
    shift = 0
    while True:
        items, cut = [], 0
        for row, (new, context) in enumerate(lens):
            blocks = ceil_div(new * group, rows) if new > 1 else 0
            parts = max(1, min(enough // max(blocks, 1), most, ceil_div(context, span << shift)))
            cut += blocks * parts if parts > 1 else 0
            for block in reversed(range(blocks)):
                stop = min(context - new + (block * rows + rows - 1) // group + 1, context)
                size = ceil_div(ceil_div(stop, parts), BLOCK) * BLOCK
                items += [(row, block, max(0, min(size, stop - part * size))) for part in range(parts)]
        if cut <= bound:
            return items
        shift += 1


def longest_walk(items, num_kv, programs):
    """Of all programs: unit u = item · K + KV head is program u mod P's."""
    walks = [0] * programs
    for number, (*_, tokens) in enumerate(items):
        for head in range(num_kv):
            walks[(number * num_kv + head) % programs] += tokens
    return max(walks), sum(walks) / programs


def decode_limits(num_kv, num_rows, values):
    programs = paged_decode._PROGRAMS_A_PROCESSOR * PROCESSORS
    most = max(1, min(programs // num_kv, paged_decode.MOST_ITEMS))
    return programs, most, partial_bound(num_rows * most, num_kv, values)


@pytest.mark.parametrize(
    ("num_kv", "contexts"),
    [
        (8, [100_000] + [1000] * 63),
        (8, [1000] * 63 + [100_000]),
        (8, [100_000] + [1000] * 7),
        (8, [100_000]),
        (32, [4000] + [200] * 63),
        (8, [20_000 + 1500 * row for row in range(64)]),
    ],
)
def test_no_program_of_a_decode_step_walks_twice_its_share(num_kv, contexts):
    programs, most, bound = decode_limits(num_kv, len(contexts), 4 * 128)
    items = decode_model([(1, context) for context in contexts], None, paged_decode.SPAN, most, bound)
    longest, share = longest_walk(items, num_kv, programs)
    assert sum(tokens for _, tokens in items) == sum(contexts)
    assert longest <= 2 * share, (longest, share)


@pytest.mark.parametrize("config", paged_prefill.CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("num_kv", "group", "lens"),
    [
        (8, 4, [(30, 100_030)]),
        (32, 1, [(30, 100_030)]),
        (8, 4, [(30, 100_030), (500, 500), (2, 50_000), (7, 4000)]),
        (8, 4, [(512, 100_512)]),
        (8, 4, [(8192, 8192)]),
    ],
)
def test_no_program_of_a_prompt_walks_twice_its_share(num_kv, group, lens, config):
    programs = paged_prefill._PROGRAMS_A_PROCESSOR * PROCESSORS
    enough, most = programs // num_kv, paged_prefill.MOST_PARTS
    bound = partial_bound(len(lens) * enough, num_kv, config["rows"] * 128)
    items = chunk_model(lens, group, config["rows"], paged_prefill.SPAN, most, enough, bound)
    longest, share = longest_walk(items, num_kv, programs)
    assert longest <= 2 * share, (longest, share)


@triton.jit
def _list_decodes(
    starts, contexts, num_rows, out, most, bound,
    WINDOW: tl.constexpr, SPAN: tl.constexpr, LAID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    items, kept, shift = number_decodes(starts, contexts, num_rows, most, bound, WINDOW, SPAN, LAID, BLOCK)
    ends = tl.cumsum(items, 0)
    for item in range(tl.program_id(0), tl.sum(items), tl.num_programs(0)):
        row, before, kept_before = find_row(item, items, ends, kept)
        visible = tl.load(contexts + row)
        if WINDOW > 0:
            visible = tl.minimum(visible, WINDOW)
        span, number = decode_items(tl.load(contexts + row), shift, most, WINDOW, SPAN, BLOCK)
        tl.store(out + 3 * item, row)
        tl.store(out + 3 * item + 1, tl.minimum(span, visible - (item - before) * span))
        tl.store(out + 3 * item + 2, tl.where(number > 1, kept_before + item - before, -1))


@triton.jit
def _list_chunks(
    starts, contexts, num_rows, out, most, enough, bound,
    GROUP: tl.constexpr, SPAN: tl.constexpr, LAID: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    items, kept, shift = number_chunks(
        starts, contexts, num_rows, most, enough, bound, GROUP, 0, SPAN, LAID, ROWS
    )
    ends = tl.cumsum(items, 0)
    for item in range(tl.program_id(0), tl.sum(items), tl.num_programs(0)):
        row, before, kept_before = find_row(item, items, ends, kept)
        new = tl.load(starts + row + 1) - tl.load(starts + row)
        blocks, parts = chunk_blocks(new, tl.load(contexts + row), shift, most, enough, GROUP, 0, SPAN, ROWS)
        tl.store(out + 3 * item, row)
        tl.store(out + 3 * item + 1, blocks - 1 - (item - before) // parts)
        tl.store(out + 3 * item + 2, tl.where(parts > 1, kept_before + item - before, -1))


def listed(kernel, device, lens, present, number, *arguments):
    def integers(values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts = [sum(new for new, _ in lens[:row]) for row in range(len(lens) + 1)]
    out = torch.full((number + 2, 3), -7, dtype=torch.int32, device=device)
    kernel[(3,)](
        integers(starts), integers([context for _, context in lens]), integers([present]), out, *arguments
    )
    assert (out[number:] == -7).all()
    return out[:number].tolist()


def drawn_lens(seed):
    """Sequences, of which the last one laid out is not there."""
    rng = random.Random(seed)
    lens = []
    for _ in range(rng.randint(1, 9)):
        new = rng.choice((1, 1, 2, 9, 70))
        lens.append((new, new + rng.choice((0, 3, 63, 64, 300, 1000, 9000))))
    return lens


@pytest.mark.parametrize("seed", range(6))
def test_kernels_number_decodes_as_the_model_does(device, seed):
    lens, bound = drawn_lens(seed), (0, 5, 40, 1000)[seed % 4]
    for window in (None, 100):
        items = decode_model(lens[:-1], window, 128, 16, bound)
        found = listed(
            _list_decodes, device, lens, len(lens) - 1, len(items), 16, bound, window or 0, 128, LAID, BLOCK
        )
        assert [(row, tokens) for row, tokens, _ in found] == items
        places = [place for *_, place in found if place >= 0]
        assert places == list(range(len(places))) and len(places) <= bound


@pytest.mark.parametrize("seed", range(6))
def test_kernels_number_chunks_as_the_model_does(device, seed):
    lens, bound = drawn_lens(seed + 10), (0, 5, 40, 1000)[seed % 4]
    items = chunk_model(lens[:-1], 3, 32, 128, 16, 33, bound)
    limits = (16, 33, bound, 3, 128, LAID, 32)
    found = listed(_list_chunks, device, lens, len(lens) - 1, len(items), *limits)
    assert [(row, block) for row, block, _ in found] == [(row, block) for row, block, _ in items]
    places = [place for *_, place in found if place >= 0]
    assert places == list(range(len(places))) and len(places) <= bound

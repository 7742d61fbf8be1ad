"""Attention as a list of work items that the device numbers from the lengths that lie there (Triton).

A walk over a context that is cut in as many parts for every sequence leaves most of a GPU idle when one sequence is
long: the parts of that one are walked while the others have ended. Here a context is cut into items of a fixed number
of tokens, so sequences have as many as they are long, and a grid whose size does not depend on lengths shares the items
of all sequences out. That is Stream-K's idea (Osama et al. 2023, arXiv 2301.03598), with items where it has shares of
equal size: what an item computes then does not depend on the other sequences. FlashInfer (Ye et al. 2025, arXiv
2501.01005) lists such items on the host; here every program counts them itself, from the cumulative sum over the
sequences, so that a captured launch follows the lengths from step to step.

The items of a sequence are numbered one after another, sequence after sequence; with the KV head as the fastest digit
that gives the units, of which program p takes p, p + P, p + 2P, ... A sequence is cut into at most P units, so its
longest item is at most twice its share of all programs and no program has two of its items; so is the longest walk over
all sequences, but for items that are as short as items get. A unit of an item that is not alone leaves its result and
its log-sum-exp, and the one that arrives last adds them up in their own order (Flash-Decoding, Dao et al. 2023, in one
launch), so results do not depend on which that is.

Memory bounds the results that may be left: where lengths would make more, all items become two, four, ... times as
long. Only then a result depends, in its last bits, on the other sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sleb.kernels.batch import BatchTensors
from sleb.kernels.triton.e4m3 import from_e4m3
from sleb.kernels.triton.runtime import NUM_COUNTERS, power_of_two
from sleb.kernels.triton.tuning import bucket

# Sections of one array, at any alignment, and single numbers: to specialise would compile once more for each case.
INTEGERS = ["page_table", "table_rows", "context_lens", "query_starts", "num_rows"]
_PARTIAL_BYTES = 32 << 20  # of results that units leave
_LEAST_ROWS = 16  # that programs count at once


def rows_to_count(batch: BatchTensors) -> int:
    """A block that holds the batch's rows, one of a few sizes: each is compiled for itself."""
    return power_of_two(bucket(max(batch.context_lens.shape[0], _LEAST_ROWS)))


def partial_bound(items: int, num_kv_heads: int, values: int) -> int:
    """How many of at most `items` cut items there is memory for; values: of an item's result for one KV head."""
    return min(items, _PARTIAL_BYTES // (4 * values * num_kv_heads), NUM_COUNTERS // num_kv_heads)


def partial_results(
    bound: int, num_kv_heads: int, lines: int, size: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Room for the results [bound · K, lines, size] of cut items and their log-sum-exps, float32."""
    shape = (max(1, bound) * num_kv_heads, lines)
    return tuple(torch.empty(*each, dtype=torch.float32, device=device) for each in ((*shape, size), shape))


@triton.jit
def read_rows(query_starts, context_lens, num_rows, ROWS_LAID: tl.constexpr):
    """New tokens and context of each sequence; 0 where none is there."""
    row = tl.arange(0, ROWS_LAID)
    present = row < tl.load(num_rows)
    start = tl.load(query_starts + row, mask=present, other=0)
    end = tl.load(query_starts + row + 1, mask=present, other=0)
    return end - start, tl.load(context_lens + row, mask=present, other=0)


@triton.jit
def find_row(item, items, ends, kept):
    """The sequence that an item is of, the items before its first one, and the cut ones among them.

    items: of each sequence. ends: their cumulative sum. kept: where they are cut, how many they are, else 0.
    """
    row = tl.sum(tl.where(ends <= item, 1, 0))
    earlier = tl.arange(0, items.shape[0]) < row
    return row, tl.sum(tl.where(earlier, items, 0)), tl.sum(tl.where(earlier, kept, 0))


@triton.jit
def arrives_last(counter, number):
    """Whether `number` − 1 programs came here before with this counter, which begins at 0 and ends there; if so, what
    they stored can be read."""
    tl.debug_barrier()  # what all threads have stored comes before the one atomic operation
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == number - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")
    return last


@triton.jit
def load_tile(cache, at, inside, dtype: tl.constexpr):
    """Keys or values of a tile of slots, in the queries' dtype."""
    if cache.dtype.element_ty == tl.uint8:
        return from_e4m3(tl.load(cache + at, mask=inside, other=0), dtype)
    else:
        return tl.load(cache + at, mask=inside, other=0.0)

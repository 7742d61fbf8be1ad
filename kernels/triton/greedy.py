"""The most probable token and log-probabilities over a vocabulary, without sorting or copying it (Triton).

    greedy                argmax_v logits[b, v], the lowest v of equals; −1 where the highest is infinite or NaN
    log_softmax_gather    logits[b, id] − log Σ_v exp(logits[b, v]), for some ids a row

One read of the logits: each program takes a run of a row's vocabulary and leaves its maximum, where it is and the sum
of exponentials relative to it; a second launch joins a row's runs (Milakov & Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.triton.runtime import (
    ceil_div,
    check_contiguous,
    launch_options,
    num_processors,
    power_of_two,
)

_BLOCK = 4096
_MAX_RUNS = 128
_USUAL_IDS = 32  # a block for so many ids at least: one compilation serves what requests usually ask for
_PROGRAMS_A_PROCESSOR = 2


@triton.jit(do_not_specialize=["num_runs", "num_blocks"])
def _scan(logits, highest_out, index_out, sum_out, vocab_size, num_runs, num_blocks, BLOCK: tl.constexpr):
    run = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    # Whole blocks, so that the compiler knows where loads of 16 bytes are aligned.
    start = run * num_blocks * BLOCK
    stop = tl.minimum(start + num_blocks * BLOCK, vocab_size)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    index = tl.full([BLOCK], 2147483647, tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(start, stop, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        there = token < vocab_size
        x = tl.load(logits + row * vocab_size + token, mask=there, other=float("-inf")).to(tl.float32)
        # Strictly greater, so that the first of equals stays; the first NaN stays whatever follows.
        better = there & ((x > highest) | (index == 2147483647) | ((x != x) & (highest == highest)))
        shift = tl.where(better, x, highest)
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        total = total * tl.exp(highest - shift) + tl.exp(x - shift)
        highest = tl.where(better, x, highest)
        index = tl.where(better, token, index)
    _finish(highest, index, total, highest_out, index_out, sum_out, row * num_runs + run)


@triton.jit
def _finish(highest, index, total, highest_out, index_out, sum_out, at):
    """Joins the lanes: the highest, the lowest index that has it, the sum relative to it."""
    is_nan = (highest != highest).to(tl.int32)
    any_nan = tl.max(is_nan, axis=0)
    top = tl.max(tl.where(is_nan == 1, float("-inf"), highest), axis=0)
    winner = tl.where(any_nan == 1, is_nan == 1, highest == top)
    tl.store(index_out + at, tl.min(tl.where(winner, index, 2147483647), axis=0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.sum(tl.where(total > 0.0, total * tl.exp(highest - shift), total), axis=0)
    tl.store(sum_out + at, sums)
    tl.store(highest_out + at, tl.where(any_nan == 1, float("nan"), top))


@triton.jit(do_not_specialize=["num_runs", "num_ids"])
def _join(
    highest_in,
    index_in,
    sum_in,
    logits,
    token_ids,
    tokens_out,
    logprobs_out,
    vocab_size,
    num_runs,
    num_ids,
    GATHER: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_IDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, BLOCK_RUNS)
    used = run < num_runs
    at = row * num_runs + run
    highest = tl.load(highest_in + at, mask=used, other=float("-inf"))
    is_nan = (highest != highest).to(tl.int32)
    any_nan = tl.max(is_nan, axis=0)
    top = tl.max(tl.where(is_nan == 1, float("-inf"), highest), axis=0)
    if GATHER:
        shift = tl.where(top == float("-inf"), 0.0, top)
        sums = tl.load(sum_in + at, mask=used, other=0.0)
        total = tl.sum(tl.where(used, sums * tl.exp(highest - shift), 0.0), axis=0)
        which = tl.arange(0, BLOCK_IDS)
        wanted = which < num_ids
        ids = tl.load(token_ids + row * num_ids + which, mask=wanted, other=0)
        chosen = tl.load(logits + row * vocab_size + ids, mask=wanted, other=0.0).to(tl.float32)
        tl.store(logprobs_out + row * num_ids + which, chosen - (tl.log(total) + shift), mask=wanted)
    else:
        index = tl.load(index_in + at, mask=used, other=2147483647)
        winner = used & tl.where(any_nan == 1, is_nan == 1, highest == top)
        token = tl.min(tl.where(winner, index, 2147483647), axis=0)
        is_number = (any_nan == 0) & (tl.abs(top) < float("inf"))
        tl.store(tokens_out + row, tl.where(is_number, token, -1).to(tl.int64))


def greedy(logits: Tensor) -> Tensor:
    """Logits [B, V] of any float dtype to [B] int64; see `sleb.kernels.reference.ops.greedy`."""
    return _run(logits, None)


def log_softmax_gather(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probabilities of token_ids [B] or [B, N] int64; see `sleb.kernels.reference.ops.log_softmax_gather`."""
    return _run(logits, token_ids)


def _run(logits: Tensor, token_ids: Tensor | None) -> Tensor:
    check_contiguous(logits=logits, token_ids=token_ids)
    num_rows, vocab_size = logits.shape
    device = logits.device
    if token_ids is None:
        result = torch.empty(num_rows, dtype=torch.int64, device=device)
    else:
        result = torch.empty(token_ids.shape, dtype=torch.float32, device=device)
    if not result.numel():
        return result
    num_ids = result.numel() // num_rows
    wanted = ceil_div(_PROGRAMS_A_PROCESSOR * num_processors(device), num_rows)
    num_runs = min(_MAX_RUNS, wanted, ceil_div(vocab_size, _BLOCK))
    block = min(power_of_two(ceil_div(vocab_size, num_runs)), _BLOCK)
    num_blocks = ceil_div(vocab_size, num_runs * block)
    num_runs = ceil_div(vocab_size, num_blocks * block)
    shape = (num_rows, num_runs)
    highest, sums = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    index = torch.empty(shape, dtype=torch.int32, device=device)
    _scan[(num_runs, num_rows)](
        logits, highest, index, sums, vocab_size, num_runs, num_blocks, BLOCK=block, **launch_options(8)
    )
    _join[(num_rows,)](
        highest,
        index,
        sums,
        logits,
        token_ids if token_ids is not None else index,
        result,
        result,
        vocab_size,
        num_runs,
        num_ids,
        GATHER=token_ids is not None,
        BLOCK_RUNS=_MAX_RUNS,
        BLOCK_IDS=power_of_two(num_ids, _USUAL_IDS),
        **launch_options(1),
    )
    return result

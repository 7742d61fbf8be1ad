"""One random token a row after top-k, top-p and min-p, without sorting the vocabulary (Triton).

What a sort would give is found by halving. With F(t) the number, or the probability, of the tokens whose logit is at
least t, the token at which a filter cuts has the highest logit t with F(t) ≥ goal. Every pass over the row evaluates F
in the middle of what is left and moves the lower end to a logit that occurs, so some dozen passes are usual. Of
equal logits at the cut, the lowest tokens stay.

The token is then the first whose cumulative probability, in the vocabulary's order, exceeds point · total. Weights
exp((logit − highest) / temperature) are float32, their sums float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.triton.greedy import greedy
from sleb.kernels.triton.runtime import check_contiguous, launch_options, power_of_two

_BLOCK = 4096


@triton.jit
def _weigh(x, highest, inverse_temperature, least):
    """Probability of logits relative to the highest; 0 under `least`, the logarithm of min-p, and for −inf."""
    scaled = (x - highest) * inverse_temperature
    return tl.where(scaled >= least, tl.exp(scaled), 0.0)


@triton.jit
def _load(row_logits, begin, vocab_size, BLOCK: tl.constexpr):
    token = begin + tl.arange(0, BLOCK)
    return tl.load(row_logits + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit
def _cut(
    row_logits,
    vocab_size,
    lowest,
    highest,
    goal,
    inverse_temperature,
    least,
    BY_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest logit t that occurs with F(t) ≥ goal, and F of what lies above it; F(lowest) ≥ goal must hold.

    By count, F counts tokens; else it sums their weights.
    """
    reached = tl.zeros([], tl.float64)
    for begin in range(0, vocab_size, BLOCK):
        x = _load(row_logits, begin, vocab_size, BLOCK)
        reached += tl.sum(tl.where(x >= highest, 1.0, 0.0).to(tl.float64), axis=0)
    done = reached >= goal  # the weight of the highest is 1
    low = tl.where(done, highest, lowest)
    above = tl.where(done, 0.0, reached)
    bound = highest  # F(low) ≥ goal > F(bound)
    middle = low * 0.5 + bound * 0.5
    while (not done) & (middle > low):
        mass = tl.zeros([], tl.float64)
        up = highest
        down = low
        for begin in range(0, vocab_size, BLOCK):
            x = _load(row_logits, begin, vocab_size, BLOCK)
            if BY_COUNT:
                part = tl.where(x >= middle, 1.0, 0.0)
            else:
                part = tl.where(x >= middle, _weigh(x, highest, inverse_temperature, least), 0.0)
            mass += tl.sum(part.to(tl.float64), axis=0)
            up = tl.minimum(up, tl.min(tl.where(x >= middle, x, highest), axis=0))
            down = tl.maximum(down, tl.max(tl.where(x < middle, x, low), axis=0))
        if mass >= goal:
            low = up
        else:
            bound = middle
            above = mass
            done = down == low
        middle = low * 0.5 + bound * 0.5
    return low, above


@triton.jit(do_not_specialize=["num_rows"])
def _sample(logits, best, numbers, out, num_rows, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * vocab_size
    best_token = tl.load(best + row)
    if best_token < 0:  # the highest is infinite or NaN: there is no distribution
        tl.store(out + row, best_token)
        return
    highest = tl.load(row_logits + best_token).to(tl.float32)
    # At most near the largest float32: infinity times the highest's distance of 0 would be no number.
    inverse_temperature = tl.minimum(1.0 / tl.load(numbers + row), 3.0e38).to(tl.float32)
    top_k = tl.load(numbers + num_rows + row)
    top_p = tl.load(numbers + 2 * num_rows + row)
    min_p = tl.load(numbers + 3 * num_rows + row)
    point = tl.load(numbers + 4 * num_rows + row)
    least = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), float("-inf")).to(tl.float32)

    lowest = highest  # the lowest finite logit
    count = tl.zeros([], tl.float64)
    total = tl.zeros([], tl.float64)
    for begin in range(0, vocab_size, BLOCK):
        x = _load(row_logits, begin, vocab_size, BLOCK)
        finite = x > float("-inf")
        lowest = tl.minimum(lowest, tl.min(tl.where(finite, x, highest), axis=0))
        count += tl.sum(tl.where(finite, 1.0, 0.0).to(tl.float64), axis=0)
        total += tl.sum(_weigh(x, highest, inverse_temperature, least).to(tl.float64), axis=0)

    # Tokens above `edge` are kept, and of those at it the first `ties`.
    edge = lowest
    ties = count
    if (top_k > 0.0) & (top_k < count):
        edge, above = _cut(
            row_logits, vocab_size, lowest, highest, top_k, inverse_temperature, least, True, BLOCK
        )
        ties = top_k - above
        total = ties * _weigh(edge, highest, inverse_temperature, least).to(tl.float64)
        for begin in range(0, vocab_size, BLOCK):
            x = _load(row_logits, begin, vocab_size, BLOCK)
            weight = tl.where(x > edge, _weigh(x, highest, inverse_temperature, least), 0.0)
            total += tl.sum(weight.to(tl.float64), axis=0)
    if top_p < 1.0:
        goal = top_p * total
        seen = tl.zeros([], tl.float64)
        for begin in range(0, vocab_size, BLOCK):
            x = _load(row_logits, begin, vocab_size, BLOCK)
            seen += tl.sum(tl.where(x == edge, 1.0, 0.0).to(tl.float64), axis=0)
        ties = tl.minimum(ties, seen)
        at_edge = ties * _weigh(edge, highest, inverse_temperature, least).to(tl.float64)
        new_edge = edge
        above = total - at_edge
        if above >= goal:
            new_edge, above = _cut(
                row_logits, vocab_size, edge, highest, goal, inverse_temperature, least, False, BLOCK
            )
        unit = _weigh(new_edge, highest, inverse_temperature, least).to(tl.float64)
        wanted = tl.where(unit > 0.0, tl.ceil((goal - above) / tl.where(unit > 0.0, unit, 1.0)), 1.0)
        ties = tl.minimum(tl.maximum(wanted, 1.0), tl.where(new_edge == edge, ties, count))
        edge = new_edge

    edge_weight = _weigh(edge, highest, inverse_temperature, least).to(tl.float64)
    kept = tl.zeros([], tl.float64)
    seen = tl.zeros([], tl.float64)  # tokens at the edge so far
    for begin in range(0, vocab_size, BLOCK):
        x = _load(row_logits, begin, vocab_size, BLOCK)
        weight = tl.where(x > edge, _weigh(x, highest, inverse_temperature, least), 0.0)
        kept += tl.sum(weight.to(tl.float64), axis=0)
        seen += tl.sum(tl.where(x == edge, 1.0, 0.0).to(tl.float64), axis=0)
    kept += tl.minimum(seen, ties) * edge_weight

    goal = point * kept
    running = tl.zeros([], tl.float64)
    seen = tl.zeros([], tl.float64)
    # The block in which the sum passes the goal, and what came before it; else the last that holds anything.
    block = 0
    before = tl.zeros([], tl.float64)
    seen_before = tl.zeros([], tl.float64)
    begin = 0
    while (begin < vocab_size) & (running <= goal):
        x = _load(row_logits, begin, vocab_size, BLOCK)
        weight = tl.where(x > edge, _weigh(x, highest, inverse_temperature, least), 0.0)
        at_edge = tl.sum(tl.where(x == edge, 1.0, 0.0).to(tl.float64), axis=0)
        allowed = tl.minimum(at_edge, tl.maximum(ties - seen, 0.0))
        mass = tl.sum(weight.to(tl.float64), axis=0) + allowed * edge_weight
        if mass > 0.0:
            block = begin
            before = running
            seen_before = seen
        running += mass
        seen += at_edge
        begin += BLOCK
    token = block + tl.arange(0, BLOCK)
    x = _load(row_logits, block, vocab_size, BLOCK)
    is_edge = tl.where(x == edge, 1.0, 0.0).to(tl.float64)
    rank = seen_before + tl.cumsum(is_edge, axis=0)
    weight = _weigh(x, highest, inverse_temperature, least).to(tl.float64)
    weight = tl.where((x > edge) | ((x == edge) & (rank <= ties)), weight, 0.0)
    cumulative = before + tl.cumsum(weight, axis=0)
    first = tl.min(tl.where(cumulative > goal, token, 2147483647), axis=0)
    last = tl.max(tl.where(weight > 0.0, token, -1), axis=0)
    tl.store(out + row, tl.minimum(first, last).to(tl.int64))


def sample_packed(logits: Tensor, numbers: Tensor) -> Tensor:
    """See `sleb.kernels.reference.device.sample_packed`; logits [B, V] of any float dtype."""
    check_contiguous(logits=logits, numbers=numbers)
    num_rows, vocab_size = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        block = min(_BLOCK, power_of_two(vocab_size))
        _sample[(num_rows,)](
            logits, greedy(logits), numbers, out, num_rows, vocab_size, BLOCK=block, **launch_options(8)
        )
    return out

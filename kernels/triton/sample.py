"""One random token a row after top-k, top-p and min-p, by little more than one read of the vocabulary (Triton).

Two launches. In the first, programs of a tile of the vocabulary each leave the highest logit of every group of some
neighbouring tokens, and the tile's highest and its sum of exponentials. In the second, one program a row finds a
threshold at which the groups' highest alone reach what a filter asks for, the number of top-k or the probability of
top-p, so that the token at which the filter cuts lies at or above it; what follows reads the groups that reach it, some
dozens to thousands of tokens. No filter asks for more than the tile in which the point falls. Where groups' highest do
not suffice, as where top-p meets a nearly uniform distribution, all groups are read.

What a sort would give is found by quartering (as Qrita, arXiv 2602.01518). With F(t) the number, or the probability, of
the tokens whose logit is at least t, the token at which a filter cuts has the highest logit t with F(t) ≥ goal. Every
pass evaluates F at three points of what is left and moves the lower end up to a logit that occurs, so some ten passes
are usual. Of equal logits at the cut, the lowest tokens stay. The token is then the first whose cumulative probability,
in the vocabulary's order, exceeds point · total.

Loops over logits keep numbers in lanes, and are reduced once, after them: no loop that loads waits at a barrier.
Weights exp((logit − highest) / temperature) and their sums within a lane are float32, sums of lanes float64; all sums
are in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sleb.kernels.triton.runtime import ceil_div, check_contiguous, launch_options, power_of_two

_BLOCK = 4096  # tokens of a tile
_GROUP = 8  # tokens of a group at least: 16 or 32 bytes
_MAX_GROUPS = 16384  # the second launch holds the groups' highest in registers
_LANES = 256  # groups that it reads at once: four tokens a thread


@triton.jit
def _weigh(x, highest, inverse_temperature, least):
    """Probability of logits relative to the highest; 0 under `least`, the logarithm of min-p, and for −inf."""
    scaled = (x - highest) * inverse_temperature
    return tl.where(scaled >= least, tl.exp(scaled), 0.0)


@triton.jit
def _invert(temperature):
    """At most near the largest float32: infinity times the highest's distance of 0 would be no number."""
    return tl.minimum(1.0 / temperature, 3.0e38).to(tl.float32)


@triton.jit
def _scan(
    logits, numbers, heads, tops, sums, vocab_size, num_groups, GROUP: tl.constexpr, TILE: tl.constexpr
):
    """The highest of each group and of the tile, NaN if there is one, and the tile's sum of weights relative to it."""
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    group = tile * (TILE // GROUP) + tl.arange(0, TILE // GROUP)
    token = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + row * vocab_size + token, mask=token < vocab_size, other=float("-inf")).to(
        tl.float32
    )
    head = tl.max(x, axis=1)
    tl.store(heads + row * num_groups + group, head, mask=group < num_groups)
    top = tl.max(head, axis=0)
    any_nan = tl.max(tl.max((x != x).to(tl.int32), axis=1), axis=0)
    weight = _weigh(
        x, tl.where(top == float("-inf"), 0.0, top), _invert(tl.load(numbers + row)), float("-inf")
    )
    at = row * tl.num_programs(0) + tile
    tl.store(tops + at, tl.where(any_nan == 1, float("nan"), top))
    tl.store(sums + at, tl.sum(tl.sum(weight, axis=1).to(tl.float64), axis=0))


@triton.jit
def _reach(weight, goal, by_count):
    """A bit pattern, which orders as its number, at or above which weights number or sum to the goal.

    If they never do, that of the lowest above 0.
    """
    key = weight.to(tl.int32, bitcast=True)
    low = tl.min(tl.where(key > 0, key, 0x3F800000), axis=0)
    bound = tl.where(_count_or_sum(weight, key >= low, by_count) < goal, low, 0x3F800001)  # above 1
    while bound - low > 0x10000:  # a 128th of a weight: what is read then decides
        middle = (low + bound) // 2
        enough = _count_or_sum(weight, key >= middle, by_count) >= goal
        low = tl.where(enough, middle, low)
        bound = tl.where(enough, bound, middle)
    return key >= low


@triton.jit
def _count_or_sum(weight, chosen, by_count):
    return tl.sum(tl.where(chosen, tl.where(by_count, 1.0, weight), 0.0), axis=0)


@triton.jit
def _members(
    row_logits, row_listed, num_listed, step, each, vocab_size, GROUP: tl.constexpr, LANES: tl.constexpr
):
    """The logits [LANES, GROUP] of each lane's group number `step`, of `each` that follow each other in the list.

    −inf past the list's end.
    """
    member = tl.arange(0, GROUP)[None, :]
    # Read once a token, not once a group, so that threads need not exchange it.
    place = tl.arange(0, LANES)[:, None] * each + step + member * 0
    group = tl.load(row_listed + place, mask=place < num_listed, other=0)
    token = group * GROUP + member
    there = (place < num_listed) & (token < vocab_size)
    return tl.load(row_logits + token, mask=there, other=float("-inf")).to(tl.float32)


@triton.jit
def _total(lanes):
    """The sum of lanes [N, GROUP], float64."""
    return tl.sum(tl.sum(lanes, axis=1).to(tl.float64), axis=0)


@triton.jit
def _narrow(low, bound, above, pivot, mass, goal):
    """One end moves to the pivot, whose F is `mass`."""
    enough = mass >= goal
    return tl.where(enough, pivot, low), tl.where(enough, bound, pivot), tl.where(enough, above, mass)


@triton.jit
def _cut(
    row_logits,
    row_listed,
    num_listed,
    vocab_size,
    lowest,
    highest,
    at_highest,
    goal,
    inverse_temperature,
    least,
    BY_COUNT: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
):
    """The highest logit t that occurs with F(t) ≥ goal, and F of what lies above it; F(lowest) ≥ goal must hold.

    By count, F counts tokens; else it sums their weights. at_highest: the tokens of weight 1.
    """
    each = tl.cdiv(num_listed, LANES)
    done = at_highest >= goal
    low = tl.where(done, highest, lowest)
    above = tl.where(done, 0.0, at_highest)
    bound = highest  # F(low) ≥ goal > F(bound) = above
    quarter = bound * 0.25 - low * 0.25
    while (not done) & (low + quarter * 3.0 > low):
        first = low + quarter
        second = first + quarter
        third = second + quarter
        firsts = tl.zeros([LANES, GROUP], tl.float32)
        seconds = tl.zeros([LANES, GROUP], tl.float32)
        thirds = tl.zeros([LANES, GROUP], tl.float32)
        ups = tl.zeros([LANES, GROUP], tl.float32) + bound
        downs = tl.zeros([LANES, GROUP], tl.float32) + low
        for step in range(each):
            x = _members(row_logits, row_listed, num_listed, step, each, vocab_size, GROUP, LANES)
            if BY_COUNT:
                weight = tl.where(x >= low, 1.0, 0.0)
            else:
                weight = _weigh(x, highest, inverse_temperature, least)
            firsts += tl.where(x >= first, weight, 0.0)
            seconds += tl.where(x >= second, weight, 0.0)
            thirds += tl.where(x >= third, weight, 0.0)
            ups = tl.minimum(ups, tl.where(x >= low, x, bound))
            downs = tl.maximum(downs, tl.where(x < bound, x, low))
        up = tl.min(tl.min(ups, axis=1), axis=0)
        done = up == tl.max(tl.max(downs, axis=1), axis=0)  # nothing else is in between
        if done:
            low = up
        else:
            mass = _total(seconds)
            pivot = tl.where(mass >= goal, third, first)
            rest = _total(tl.where(mass >= goal, thirds, firsts))
            low, bound, above = _narrow(low, bound, above, second, mass, goal)
            low, bound, above = _narrow(low, bound, above, pivot, rest, goal)
            low = tl.maximum(low, up)
        quarter = bound * 0.25 - low * 0.25
    return low, above


@triton.jit(do_not_specialize=["num_rows"])
def _sample(
    logits,
    numbers,
    heads,
    tops,
    sums,
    listed,
    out,
    num_rows,
    vocab_size,
    num_groups,
    num_tiles,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    LANES: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    top = tl.load(tops + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    any_nan = tl.max((top != top).to(tl.int32), axis=0)
    highest = tl.max(top, axis=0)
    if (any_nan == 1) | (tl.abs(highest) == float("inf")):  # there is no distribution
        tl.store(out + row, -1)
        return
    inverse_temperature = _invert(tl.load(numbers + row))
    top_k = tl.load(numbers + num_rows + row)
    top_p = tl.load(numbers + 2 * num_rows + row)
    min_p = tl.load(numbers + 3 * num_rows + row)
    point = tl.load(numbers + 4 * num_rows + row)
    least = tl.where(min_p > 0.0, tl.log(tl.where(min_p > 0.0, min_p, 1.0)), float("-inf")).to(tl.float32)
    by_count = (top_k > 0.0) & (top_k < vocab_size)
    filtered = by_count | (top_p < 1.0) | (min_p > 0.0)

    mass = tl.load(sums + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    mass *= _weigh(top, highest, inverse_temperature, float("-inf")).to(tl.float64)
    until = tl.cumsum(mass, axis=0)
    total = tl.max(until, axis=0)

    # The groups that are read: those that may hold a token that is kept, or those of the point's tile.
    group = tl.arange(0, GROUPS)
    if filtered:
        head = tl.load(heads + row * num_groups + group, mask=group < num_groups, other=float("-inf"))
        # More than the probability by what sums are off. Of min-p alone, all that it keeps.
        goal = tl.where(by_count, top_k, tl.where(min_p > 0.0, float("inf"), top_p * total * 1.0001))
        weight = _weigh(head, highest, inverse_temperature, least)
        wanted = _reach(weight, goal.to(tl.float32), by_count)
        before = total * 0.0
    else:
        goal_tile = tl.min(tl.where((until > point * total) & (mass > 0.0), tile, TILES), axis=0)
        goal_tile = tl.minimum(goal_tile, tl.max(tl.where(mass > 0.0, tile, -1), axis=0))
        wanted = (group // (TILE // GROUP) == goal_tile) & (group < num_groups)
        before = tl.sum(tl.where(tile == goal_tile, until - mass, 0.0), axis=0)
    row_logits = logits + row * vocab_size
    row_listed = listed + row * num_groups
    tl.store(row_listed + tl.cumsum(wanted.to(tl.int32), axis=0) - 1, group, mask=wanted)
    num_listed = tl.sum(wanted.to(tl.int32), axis=0)
    tl.debug_barrier()  # other threads of the program read the list
    each = tl.cdiv(num_listed, LANES)  # a lane's groups follow each other

    # Tokens above `edge` are kept, and of those at it the first `ties`.
    edge = highest * 0.0 + float("-inf")
    ties = total * 0.0
    if filtered:
        lows = tl.zeros([LANES, GROUP], tl.float32) + highest
        counts = tl.zeros([LANES, GROUP], tl.float32)
        bests = tl.zeros([LANES, GROUP], tl.float32)
        masses = tl.zeros([LANES, GROUP], tl.float32)
        for step in range(each):
            x = _members(row_logits, row_listed, num_listed, step, each, vocab_size, GROUP, LANES)
            weight = _weigh(x, highest, inverse_temperature, least)
            lows = tl.minimum(lows, tl.where(weight > 0.0, x, highest))
            counts += tl.where(weight > 0.0, 1.0, 0.0)
            bests += tl.where(x >= highest, 1.0, 0.0)
            masses += weight
        lowest = tl.min(tl.min(lows, axis=1), axis=0)  # of those with a weight
        count = _total(counts)
        best = _total(bests)
        at_most = _total(masses)
        if by_count | (min_p > 0.0):
            total = at_most
        if by_count & (top_k < count):
            edge, above = _cut(
                row_logits,
                row_listed,
                num_listed,
                vocab_size,
                lowest,
                highest,
                best,
                top_k,
                inverse_temperature,
                least,
                True,
                GROUP,
                LANES,
            )
            ties = top_k - above
            masses = tl.zeros([LANES, GROUP], tl.float32)
            for step in range(each):
                x = _members(row_logits, row_listed, num_listed, step, each, vocab_size, GROUP, LANES)
                masses += tl.where(x > edge, _weigh(x, highest, inverse_temperature, least), 0.0)
            above = _total(masses)
            total = above + ties * _weigh(edge, highest, inverse_temperature, least).to(tl.float64)
            lowest = edge
        else:
            above = total
        if top_p < 1.0:
            goal = tl.minimum(top_p * total, at_most)
            new_edge = edge
            if above >= goal:
                new_edge, above = _cut(
                    row_logits,
                    row_listed,
                    num_listed,
                    vocab_size,
                    lowest,
                    highest,
                    best,
                    goal,
                    inverse_temperature,
                    least,
                    False,
                    GROUP,
                    LANES,
                )
            unit = _weigh(new_edge, highest, inverse_temperature, least).to(tl.float64)
            needed = tl.where(unit > 0.0, tl.ceil((goal - above) / tl.where(unit > 0.0, unit, 1.0)), 1.0)
            ties = tl.minimum(tl.maximum(needed, 1.0), tl.where(new_edge == edge, ties, count))
            edge = new_edge

    edge_weight = _weigh(edge, highest, inverse_temperature, least).to(tl.float64)
    masses = tl.zeros([LANES, GROUP], tl.float32)
    equals = tl.zeros([LANES, GROUP], tl.float32)
    for step in range(each):
        x = _members(row_logits, row_listed, num_listed, step, each, vocab_size, GROUP, LANES)
        masses += tl.where(x > edge, _weigh(x, highest, inverse_temperature, least), 0.0)
        equals += tl.where(x == edge, 1.0, 0.0)
    # The lane in which the sum passes the goal, and what came before it; else the last that holds anything.
    equal = tl.sum(equals, axis=1).to(tl.float64)
    seen = tl.cumsum(equal, axis=0) - equal  # tokens at the edge before the lane
    lane_mass = tl.sum(masses, axis=1).to(tl.float64)
    lane_mass += tl.minimum(equal, tl.maximum(ties - seen, 0.0)) * edge_weight
    until = tl.cumsum(lane_mass, axis=0)
    kept = tl.max(until, axis=0)
    goal = tl.where(filtered, point * kept, point * total - before)
    lane = tl.arange(0, LANES)
    chosen = tl.min(tl.where((until > goal) & (lane_mass > 0.0), lane, LANES), axis=0)
    chosen = tl.minimum(chosen, tl.max(tl.where(lane_mass > 0.0, lane, -1), axis=0))
    before = tl.sum(tl.where(lane == chosen, until - lane_mass, 0.0), axis=0)
    seen_before = tl.sum(tl.where(lane == chosen, seen, 0.0), axis=0)

    member = tl.arange(0, SPAN)
    place = chosen * each + member // GROUP
    there = (member < each * GROUP) & (place < num_listed)
    token = tl.load(row_listed + place, mask=there, other=0) * GROUP + member % GROUP
    there &= token < vocab_size
    x = tl.load(row_logits + token, mask=there, other=float("-inf")).to(tl.float32)
    rank = seen_before + tl.cumsum(tl.where(x == edge, 1.0, 0.0), axis=0)
    weight = _weigh(x, highest, inverse_temperature, least).to(tl.float64)
    weight = tl.where((x > edge) | ((x == edge) & (rank <= ties)), weight, 0.0)
    cumulative = before + tl.cumsum(weight, axis=0)
    first = tl.min(tl.where((cumulative > goal) & (weight > 0.0), token, 2147483647), axis=0)
    last = tl.max(tl.where(weight > 0.0, token, -1), axis=0)
    tl.store(out + row, tl.minimum(first, last).to(tl.int64))


def sample_packed(logits: Tensor, numbers: Tensor) -> Tensor:
    """See `sleb.kernels.reference.device.sample_packed`; logits [B, V] of any float dtype."""
    check_contiguous(logits=logits, numbers=numbers)
    num_rows, vocab_size = logits.shape
    device = logits.device
    out = torch.empty(num_rows, dtype=torch.int64, device=device)
    if not num_rows:
        return out
    group = power_of_two(ceil_div(vocab_size, _MAX_GROUPS), _GROUP)
    tile = max(group, min(_BLOCK, power_of_two(vocab_size)))
    num_groups, num_tiles = ceil_div(vocab_size, group), ceil_div(vocab_size, tile)
    groups = power_of_two(num_groups)
    lanes = min(_LANES * _GROUP // group, groups)
    heads = torch.empty((num_rows, num_groups), dtype=torch.float32, device=device)
    listed = torch.empty((num_rows, num_groups), dtype=torch.int32, device=device)
    tops = torch.empty((num_rows, num_tiles), dtype=torch.float32, device=device)
    sums = torch.empty((num_rows, num_tiles), dtype=torch.float64, device=device)
    _scan[(num_tiles, num_rows)](
        logits,
        numbers,
        heads,
        tops,
        sums,
        vocab_size,
        num_groups,
        GROUP=group,
        TILE=tile,
        **launch_options(8),
    )
    _sample[(num_rows,)](
        logits,
        numbers,
        heads,
        tops,
        sums,
        listed,
        out,
        num_rows,
        vocab_size,
        num_groups,
        num_tiles,
        GROUP=group,
        GROUPS=groups,
        TILE=tile,
        TILES=power_of_two(num_tiles),
        LANES=lanes,
        SPAN=groups // lanes * group,
        **launch_options(8),
    )
    return out

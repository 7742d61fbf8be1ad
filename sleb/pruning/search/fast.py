"""Rounds that look at fewer candidates: a race, and a first-order screen. What wins is computed on all windows.

race      Windows come one after the other. After each, a candidate goes whose loss is above the leader's by more than
          `RACE_Z` standard errors of their paired differences over stretches of text: on the same text candidates
          differ far less than texts do. (Maron & Moore 1994, "Hoeffding races"; paired as in Moore & Lee 1994.)
gradient  A factor g, 1, on what each unit adds to the hidden states: dL/dg of one forward and backward pass says by
          how much the loss rises when g falls, to the first order. The best `SCREEN_KEPT` of a fifth go on to an exact
          round. (Michel, Levy & Neubig 2019, arXiv:1905.10650, score heads like this.)

Neither bounds anything: a unit's removal can lower the loss, and no loss bounds that of the next round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sleb.layer_map.units import Unit
from sleb.pruning.search.criterion import Criterion
from sleb.pruning.search.rounds import Evidence, Round, SearchState, paired

RACE_Z = 3.0
_MIN_STRETCHES = 8  # before which a standard error means little
_NUM_CHECKED = 2  # candidates that are computed on all windows, whatever the race says
_SCREEN_BATCHES = 2
_SCREEN_KEPT = 5
_SCREEN_SHARE = 0.2


def race(this_round: Round, current: Evidence | None) -> None:
    """Leaves the candidates that are still racing when all windows have been seen: two at least.

    current: the losses of the model as it stands, on all windows; None when candidates save equal amounts.
    """
    state, evidence, racing = this_round.state, this_round.evidence, this_round.candidates
    num_batches, done = sum(map(len, state.groups)), 0
    for group, batches in enumerate(state.groups):
        for index in range(len(batches)):
            for position, unit in enumerate(racing):
                state.evaluate(unit, group, index, evidence[unit])
                this_round.on_progress(unit, evidence, (done + (position + 1) / len(racing)) / num_batches)
            done += 1
            racing = _still_racing(racing, evidence, this_round.criterion, current)
    this_round.candidates = racing


def _still_racing(
    racing: list[Unit], evidence: dict[Unit, Evidence], criterion: Criterion, current: Evidence | None
) -> list[Unit]:
    """Those that may still win, the leader first."""
    finite = [unit for unit in racing if math.isfinite(evidence[unit].total)] or list(racing)

    def score(unit: Unit) -> tuple[float, Unit]:
        total = evidence[unit].total
        if current is None:
            return total, unit
        so_far = math.fsum(current.windows[: len(evidence[unit].windows)])
        return criterion.weigh(unit, total - so_far), unit

    ranked = sorted(finite, key=score)
    leader = ranked[0]
    if sum(map(len, evidence[leader].stretches)) < _MIN_STRETCHES:
        return ranked
    kept = [unit for unit in ranked if _is_near(unit, leader, evidence, criterion, current)]
    return kept if len(kept) >= _NUM_CHECKED else ranked[:_NUM_CHECKED]


def _is_near(
    unit: Unit,
    leader: Unit,
    evidence: dict[Unit, Evidence],
    criterion: Criterion,
    current: Evidence | None,
) -> bool:
    one, other = evidence[unit], evidence[leader]
    if current is None:
        mean, error = paired(one, other)
    else:
        mean, error = paired(_added(one, current, unit, criterion), _added(other, current, leader, criterion))
    return mean <= RACE_Z * error


def _added(evidence: Evidence, current: Evidence, unit: Unit, criterion: Criterion) -> Evidence:
    """What `unit`'s removal adds, weighed as its sum is: dividing or multiplying by the saving is linear."""
    seen = len(evidence.windows)
    difference = evidence.total - math.fsum(current.windows[:seen])
    weight = 1 / criterion.saving(unit) if difference > 0 else criterion.saving(unit)
    pairs = zip(evidence.stretches, current.stretches, strict=False)
    return Evidence(stretches=[(with_it - without) * weight for with_it, without in pairs])


def screen(this_round: Round) -> None:
    """Leaves the candidates that a first-order estimate puts first, the best of them first."""
    candidates, weigh = this_round.candidates, this_round.criterion.weigh
    estimates = gate_gradients(this_round.state, candidates)
    num_kept = min(len(candidates), max(_SCREEN_KEPT, math.ceil(_SCREEN_SHARE * len(candidates))))
    this_round.candidates.sort(key=lambda unit: (weigh(unit, estimates[unit]), unit))
    this_round.leave_out(candidates[num_kept:])


def gate_gradients(state: SearchState, candidates: Sequence[Unit]) -> dict[Unit, float]:
    """The first-order estimate of what removing each candidate adds to the loss, over the first batches.

    With out = h + g · (unit(h) − h), the estimate is −dL/dg at g = 1. One unit's graph is alive at a time: its
    output is computed again from the trunk, and the gradient goes back through it.
    """
    wanted = set(candidates)
    totals = dict.fromkeys(candidates, 0.0)
    trunk = state.trunk(0)
    for index in range(min(_SCREEN_BATCHES, len(trunk.batches))):
        gradient = _loss_gradient(state, trunk.at(len(state.alive), index), trunk.batches[index])
        for position in range(len(state.alive) - 1, 0, -1):
            unit = state.alive[position]
            before = trunk.at(position, index).detach().clone().requires_grad_()
            with torch.enable_grad():
                after = trunk.run(unit, before)
            if unit in wanted:
                totals[unit] -= float(((after.detach() - before.detach()) * gradient).double().sum())
            [gradient] = torch.autograd.grad(after, before, gradient)
            state.num_passes += len(before) * len(unit.sublayers) / 2  # the backward pass
    return totals


def _loss_gradient(state: SearchState, hidden: Tensor, tokens: Tensor) -> Tensor:
    leaf = hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        losses = state.losses(leaf, tokens)
        total = losses.mean(1).sum() * tokens.shape[1]
    state.num_evaluations += len(tokens)  # the backward pass
    [gradient] = torch.autograd.grad(total, leaf)
    return gradient

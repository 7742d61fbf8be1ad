"""One search under way: its batches, trunk, losses and costs; and the exact round.

A round over the units alive tries every candidate: the loss of the model without it, over all calibration windows.
The best goes; of equal ones, the shallowest. Exact all the same:

* the trunk, what runs before a candidate, is computed once for all of them and kept between rounds (`trunk`);
* cross-entropy is never negative, so a candidate whose sum over some windows is past the best whole sum is abandoned;
* candidates are tried in the order of the round before, so that a good one is whole early.

Windows are cut into as few groups as keep the trunk within a memory bound; between groups nothing is kept, and
candidates are abandoned within the last one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sleb.errors import SlebError
from sleb.layer_map.units import Unit
from sleb.pruning.search.criterion import Criterion
from sleb.pruning.search.model import Margin, ScoringModel
from sleb.pruning.search.trunk import Trunk, fitting_stride, state_bytes

# The trunk, and the input and output of the unit that runs: hidden states of a batch alive at once.
_LIVE_COPIES = 3
# Tokens that are one sample of a paired difference: neighbouring tokens are not independent, stretches nearly so.
_STRETCH = 64


@dataclass
class Evidence:
    """Losses of one model variant: a sum for each window seen, and sums over stretches of text, in float64.

    Windows come in the same order for every variant, so that two can be compared pairwise.
    """

    windows: list[float] = field(default_factory=list)
    stretches: list[Tensor] = field(default_factory=list)

    def add(self, token_losses: Tensor) -> None:
        """token_losses [W, L-1]; a window's loss is their mean × L, as in the reference implementation."""
        losses = token_losses.double().cpu()
        length = losses.shape[1] + 1
        self.windows += (losses.mean(1) * length).tolist()
        self.stretches += [
            torch.stack([part.sum() for part in window.split(_STRETCH)]) * (length / (length - 1))
            for window in losses
        ]

    @property
    def total(self) -> float:
        """The sum over the windows seen, inf (disqualified) unless all of it is finite."""
        if not all(map(math.isfinite, self.windows)):
            return math.inf
        try:
            return math.fsum(self.windows)
        except OverflowError:
            return math.inf

    def mean(self) -> float:
        """The loss a window so far."""
        return self.total / len(self.windows)


def paired(one: Evidence, other: Evidence, weights: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
    """Mean and standard error of `one` less `other` over the stretches that both have seen, each times its weight."""
    count = min(len(one.stretches), len(other.stretches))
    first, second = (torch.cat(each.stretches[:count]) for each in (one, other))
    difference = first * weights[0] - second * weights[1]
    if len(difference) < 2:
        return float(difference.mean()), math.inf
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


class SearchState:
    """The model, the windows in groups of batches, the trunk of each group, and what was spent."""

    def __init__(
        self,
        model: ScoringModel,
        windows: Tensor,
        alive: Sequence[Unit],
        batch_windows: int | None,
        most_windows: int,
        memory_bound: int,
        trunk_bound: int,
    ) -> None:
        self.model = model
        self.alive = list(alive)
        self.num_windows, self.length = windows.shape
        window_bytes = state_bytes(model, windows)
        if batch_windows is None:
            batch_windows = max(1, min(most_windows, memory_bound // (_LIVE_COPIES * window_bytes)))
        batches = torch.split(windows, batch_windows)
        batch_bytes = window_bytes * batch_windows
        per_group = max(1, min(len(batches), trunk_bound // (batch_bytes * len(alive))))
        self.stride = fitting_stride(batch_bytes * per_group, len(alive), trunk_bound)
        self.groups = [batches[start : start + per_group] for start in range(0, len(batches), per_group)]
        self._trunks: dict[int, Trunk] = {}
        self.num_passes = 0.0
        self.num_evaluations = 0
        self.on_progress: Callable[[Unit, dict[Unit, Evidence], float], None] = lambda *facts: None

    def trunk(self, group: int) -> Trunk:
        """The trunk of a group; one group's is kept until another is asked for."""
        if group not in self._trunks:
            self._trunks.clear()
            self._trunks[group] = Trunk(self.model, self.groups[group], self.alive, self.stride, self._count)
        return self._trunks[group]

    def _count(self, unit: Unit, num_windows: int) -> None:
        self.num_passes += num_windows * len(unit.sublayers) / 2

    def losses(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Token losses of hidden states at the end."""
        self.num_evaluations += len(tokens)
        return self.model.token_losses(hidden, tokens)

    def remove(self, unit: Unit) -> None:
        """Takes a unit out for good."""
        position = self.alive.index(unit)
        self.alive.remove(unit)
        for trunk in self._trunks.values():
            trunk.remove(position)

    def evaluate(self, unit: Unit, group: int, index: int, evidence: Evidence) -> None:
        """Adds to `evidence` the losses of one batch without `unit`."""
        trunk = self.trunk(group)
        hidden = trunk.after(self.alive.index(unit), index)
        evidence.add(self.losses(hidden, trunk.batches[index]))

    def dense(self) -> Evidence:
        """The losses of the model as it stands, over all windows."""
        evidence = Evidence()
        for group, batches in enumerate(self.groups):
            for index, tokens in enumerate(batches):
                evidence.add(self.losses(self.trunk(group).at(len(self.alive), index), tokens))
        return evidence

    def suffix(self, unit: Unit) -> float:
        """Passes a window after `unit`."""
        after = self.alive[self.alive.index(unit) + 1 :]
        return sum(len(each.sublayers) for each in after) / 2


@dataclass(frozen=True)
class RoundResult:
    """The unit that goes, the evidence of what was computed on all windows, and how clear it was."""

    best: Unit
    exact: dict[Unit, Evidence]
    margin: Margin
    order: list[Unit]  # all candidates, the best first, for the next round


def exact_round(
    state: SearchState, candidates: Sequence[Unit], criterion: Criterion, number: int, num_candidates: int
) -> RoundResult:
    """The best of `candidates`, each computed on all windows unless it cannot win any more."""
    evidence = {unit: Evidence() for unit in candidates}
    abandoned: set[Unit] = set()
    best_score = math.inf
    last = len(state.groups) - 1
    for group, batches in enumerate(state.groups):
        for position, unit in enumerate(candidates):
            bound = math.inf if group < last else criterion.bound(unit, best_score)
            for index in range(len(batches)):
                if sum(evidence[unit].windows) > bound:
                    abandoned.add(unit)
                    break
                state.evaluate(unit, group, index, evidence[unit])
                done = (group + (position + (index + 1) / len(batches)) / len(candidates)) / len(state.groups)
                state.on_progress(unit, evidence, done)
            else:
                if group == last:
                    best_score = min(best_score, criterion.score(unit, evidence[unit].total))
    exact = {unit: each for unit, each in evidence.items() if unit not in abandoned}
    return decide(evidence, exact, criterion, number, num_candidates)


def decide(
    evidence: dict[Unit, Evidence],
    exact: dict[Unit, Evidence],
    criterion: Criterion,
    number: int,
    num_candidates: int,
) -> RoundResult:
    """The winner among `exact`, and its margin over what came next, whole or abandoned.

    Raises SlebError when no candidate has a finite loss.
    """
    ranked = sorted(exact, key=lambda unit: criterion.key(unit, exact[unit].total))
    best = ranked[0]
    if not math.isfinite(exact[best].total):
        raise SlebError(
            f"round {number}: without any one of the {num_candidates} candidates the loss is "
            "not a finite number, so none can be removed: search with --dtype float32, or remove fewer"
        )
    order = sorted(evidence, key=lambda unit: (_estimate(evidence[unit]), unit))
    order.remove(best)
    return RoundResult(best, exact, _margin(ranked, evidence, num_candidates), [best, *order])


def _estimate(evidence: Evidence) -> float:
    return evidence.mean() if evidence.windows else math.inf


def _margin(ranked: Sequence[Unit], evidence: dict[Unit, Evidence], num_candidates: int) -> Margin:
    best = ranked[0]
    counts = {"num_exact": len(ranked), "num_candidates": num_candidates}
    if len(ranked) > 1 and math.isfinite(evidence[ranked[1]].total):
        other = ranked[1]
        mean, error = paired(evidence[other], evidence[best])
        difference = evidence[other].total - evidence[best].total
        z = mean / error if error > 0 and math.isfinite(error) else None
        return Margin(other, difference, at_least=False, z=z, **counts)
    # The others were abandoned when their sums over some windows had passed the winner's whole sum.
    others = {
        unit: each.total for unit, each in evidence.items() if unit != best and math.isfinite(each.total)
    }
    if not others:
        return Margin(None, math.inf, at_least=False, z=None, **counts)
    other = min(others, key=lambda unit: (_estimate(evidence[unit]), unit))
    return Margin(other, others[other] - evidence[best].total, at_least=True, z=None, **counts)

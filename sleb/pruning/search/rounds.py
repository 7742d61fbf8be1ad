"""What makes Algorithm 1 fast: one search's batches, trunk, losses and costs; and one round of it.

A round over the units alive tries every candidate: the loss of the model without it, over all calibration windows.
The best goes; of equal ones, the shallowest. Exact all the same:

* the trunk, what runs before a candidate, is computed once for all of them and kept between rounds (`trunk`);
* neither cross-entropy nor a divergence is negative, so a candidate whose sum over some windows is past the best whole
  sum is abandoned;
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

from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Unit
from sleb.pruning.search.criterion import Criterion
from sleb.pruning.search.model import Margin, ScoringModel
from sleb.pruning.search.patches import Fit, Patching, Variant, in_order
from sleb.pruning.search.trunk import Item, Trunk, fitting_batch, fitting_stride, state_bytes

# Tokens that are one sample of a paired difference: neighbouring tokens are not independent, stretches nearly so.
_STRETCH = 64


@dataclass
class Evidence:
    """The objective of one model variant: a sum for each window seen, and sums over stretches of text, in float64.

    Windows come in the same order for every variant, so that two can be compared pairwise. `losses` are the windows'
    losses where the objective is something else.
    """

    windows: list[float] = field(default_factory=list)
    stretches: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, values: Tensor, token_losses: Tensor | None = None) -> None:
        """Of tokens [W, L-1]; a window's value is their mean × L, as in the reference implementation."""
        losses = values.double().cpu()
        length = losses.shape[1] + 1
        self.windows += (losses.mean(1) * length).tolist()
        if token_losses is not None:
            self.losses += (token_losses.double().cpu().mean(1) * length).tolist()
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

    @property
    def loss(self) -> float:
        """The sum of the losses, whatever the objective."""
        return math.fsum(self.losses) if self.losses else self.total

    def mean(self) -> float:
        """The objective a window so far."""
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
    """The model, the windows that judge in groups of batches, the trunk of each group, and what was spent.

    Attributes:
        alive: the units that run. items: they and the patches, in order.
        num_windows: that judge. num_passes, num_evaluations: over these and those that patches are fitted on.
    """

    def __init__(
        self,
        model: ScoringModel,
        windows: Tensor,
        alive: Sequence[Unit],
        batch_windows: int | None,
        most_windows: int,
        memory_bound: int,
        trunk_bound: int,
        *,
        objective: str = "loss",
        dense: Sequence[Unit] | None = None,
    ) -> None:
        self.model = model
        self.alive = list(alive)
        self.items: list[Item] = list(alive)
        self.patching: Patching | None = None
        self.num_windows, self.length = windows.shape
        self._objective, self._dense = objective, list(alive if dense is None else dense)
        self._window_bytes, self._trunk_bound = state_bytes(model, windows), trunk_bound
        self.batch_windows = batch_windows or fitting_batch(model, windows, most_windows, memory_bound)
        batches = torch.split(windows, self.batch_windows)
        batch_bytes = self._window_bytes * self.batch_windows
        per_group = max(1, min(len(batches), trunk_bound // (batch_bytes * len(alive))))
        self.stride = fitting_stride(batch_bytes * per_group, len(alive), trunk_bound)
        self.groups = [batches[start : start + per_group] for start in range(0, len(batches), per_group)]
        self._trunks: dict[int, Trunk] = {}
        self._expected: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.num_passes = 0.0
        self.num_evaluations = 0

    def patch(self, fit: Fit, windows: Tensor, patches: Sequence[Patch], depth: int) -> None:
        """From now on patches stand where units were: `patches` now, at `depth`, and more fitted on `windows`."""
        self.items = in_order(self.alive, [patch for patch in patches if patch.serves(depth)])
        self.patching = Patching(
            self.model, windows.split(self.batch_windows), fit, self._dense, self.items, patches, depth,
            (self._window_bytes * len(windows), self._trunk_bound), self._count,
        )  # fmt: skip

    def trunk(self, group: int) -> Trunk:
        """The trunk of a group; one group's is kept until another is asked for."""
        if group not in self._trunks:
            self._trunks.clear()
            self._trunks[group] = Trunk(self.model, self.groups[group], self.items, self.stride, self._count)
        return self._trunks[group]

    def _count(self, unit: Unit, num_windows: int) -> None:
        self.num_passes += num_windows * len(unit.sublayers) / 2

    def losses(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Token losses of hidden states at the end."""
        self.num_evaluations += len(tokens)
        return self.model.token_losses(hidden, tokens)

    def without(self, unit: Unit) -> Variant:
        """The model without a unit."""
        if self.patching is not None:
            return self.patching.without(self.items, unit)
        position = self.items.index(unit)
        return Variant(position, tuple(self.items[position + 1 :]))

    def remove(self, unit: Unit) -> None:
        """Takes a unit out for good."""
        variant = self.without(unit) if self.patching is None else self.patching.remove(self.items, unit)
        self.alive.remove(unit)
        self.items[variant.position :] = variant.rest
        for trunk in self._trunks.values():
            trunk.replace(variant.position, variant.rest)

    def evaluate(self, unit: Unit, group: int, index: int, evidence: Evidence) -> None:
        """Adds to `evidence` what one batch says of the model without `unit`."""
        variant = self.without(unit)
        hidden = self.trunk(group).after(variant.position, variant.rest, index)
        self._judge(hidden, group, index, evidence)

    def present(self) -> Evidence:
        """Of the model as it stands, over all windows."""
        evidence = Evidence()
        for group, batches in enumerate(self.groups):
            for index in range(len(batches)):
                self._judge(self.trunk(group).at(len(self.items), index), group, index, evidence)
        return evidence

    def _judge(self, hidden: Tensor, group: int, index: int, evidence: Evidence) -> None:
        tokens = self.groups[group][index]
        if self._objective == "loss":
            evidence.add(self.losses(hidden, tokens))
        else:
            expected = self._expectations(group)[index]
            self.num_evaluations += len(tokens)
            evidence.add(*self.model.divergences(hidden, tokens, expected))

    def _expectations(self, group: int) -> list[tuple[Tensor, Tensor]]:
        """What is to be known of the dense model's distributions; of one group until another is asked for."""
        if group not in self._expected:
            self._expected = {group: []}
            for index, tokens in enumerate(self.groups[group]):
                if len(self.alive) == len(self._dense):  # the trunk is the dense model
                    hidden = self.trunk(group).at(len(self.items), index)
                else:
                    hidden = Trunk(self.model, [tokens], self._dense, len(self._dense), self._count).at(
                        len(self._dense), 0
                    )
                self.num_evaluations += 2 * len(tokens)  # each row of the head is multiplied twice
                self._expected[group].append(self.model.expected_rows(hidden))
        return self._expected[group]


class Round:
    """One round: the units that may go, and what is known of the loss without each.

    Attributes:
        number: from 1. num_candidates: how many units may go.
        candidates: those to be computed on all windows, in the order in which they are tried; `fast` leaves some out.
        evidence: the losses without a unit, on the windows that it has been computed on.
        exact: of that, what was computed on all windows.
        on_progress: told of a unit, the evidence, and how much of the round is done.
    """

    def __init__(
        self,
        state: SearchState,
        candidates: Sequence[Unit],
        criterion: Criterion,
        number: int,
        on_progress: Callable[[Unit, dict[Unit, Evidence], float], None] = lambda *facts: None,
    ) -> None:
        self.state, self.criterion, self.number, self.on_progress = state, criterion, number, on_progress
        self.num_candidates = len(candidates)
        self.candidates = list(candidates)
        self.evidence = {unit: Evidence() for unit in candidates}
        self.exact: dict[Unit, Evidence] = {}
        self._left_out: list[Unit] = []
        self._best_score = math.inf

    def leave_out(self, units: Sequence[Unit]) -> None:
        """Units of which nothing is known, and which are not tried."""
        self._left_out = list(units)
        self.candidates = [unit for unit in self.candidates if unit not in units]
        self.evidence = {unit: Evidence() for unit in self.candidates}

    def loss_without(self, unit: Unit) -> float:
        """The loss over all windows of the model without `unit`; inf as soon as another candidate must be better."""
        evidence, last = self.evidence[unit], len(self.state.groups) - 1
        bound = self.criterion.bound(unit, self._best_score)
        if len(evidence.windows) < self.state.num_windows:  # a race has seen them all
            for index in range(len(self.state.groups[last])):
                if sum(evidence.windows) > bound:
                    return math.inf
                self._evaluate(unit, last, index)
        self.exact[unit] = evidence
        self._best_score = min(self._best_score, self.criterion.score(unit, evidence.total))
        return evidence.total

    def pass_all_but_the_last_group(self) -> None:
        """The losses on the groups whose trunk is not kept, of which each is passed once for all candidates."""
        for group, batches in enumerate(self.state.groups[:-1]):
            for unit in self.candidates:
                for index in range(len(batches)):
                    self._evaluate(unit, group, index)

    def _evaluate(self, unit: Unit, group: int, index: int) -> None:
        groups = self.state.groups
        self.state.evaluate(unit, group, index, self.evidence[unit])
        in_group = (self.candidates.index(unit) + (index + 1) / len(groups[group])) / len(self.candidates)
        self.on_progress(unit, self.evidence, (group + in_group) / len(groups))

    def order(self) -> list[Unit]:
        """The candidates by their losses so far, for the next round."""
        return [*sorted(self.evidence, key=lambda unit: (self._estimate(unit), unit)), *self._left_out]

    def _estimate(self, unit: Unit) -> float:
        evidence = self.evidence[unit]
        return evidence.mean() if evidence.windows else math.inf

    def margin(self, best: Unit) -> Margin:
        """How much better `best` is than what came next, whole or abandoned."""
        evidence, found = self.evidence, self.evidence[best]
        counts = {"num_exact": len(self.exact), "num_candidates": self.num_candidates}
        whole = [unit for unit in self.exact if unit != best]
        other = min(whole, key=lambda unit: self.criterion.key(unit, evidence[unit].total), default=None)
        if other is not None and math.isfinite(evidence[other].total):
            mean, error = paired(evidence[other], found)
            z = mean / error if error > 0 and math.isfinite(error) else None
            return Margin(other, evidence[other].total - found.total, at_least=False, z=z, **counts)
        # The others were abandoned when their sums over some windows had passed the winner's whole sum.
        others = [unit for unit, each in evidence.items() if unit != best and math.isfinite(each.total)]
        other = min(others, key=lambda unit: (self._estimate(unit), unit), default=None)
        if other is None:
            return Margin(None, math.inf, at_least=False, z=None, **counts)
        return Margin(other, evidence[other].total - found.total, at_least=True, z=None, **counts)

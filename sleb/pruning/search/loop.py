"""Algorithm 1 of SLEB (Song et al., ICML 2024, arXiv:2402.09025), exact or fast, over blocks or finer units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sleb.errors import ConfigError, SlebError
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Unit
from sleb.pruning.search.criterion import (
    Criterion,
    alive_units,
    check_num_remove,
    is_candidate,
    model_units,
)
from sleb.pruning.search.fast import race, screen
from sleb.pruning.search.model import (
    EXACT,
    ScoringModel,
    SearchCost,
    SearchProgress,
    SearchResult,
    SearchSettings,
)
from sleb.pruning.search.patches import in_order
from sleb.pruning.search.rounds import Evidence, Round, SearchState
from sleb.pruning.search.trunk import Trunk

# Where batch_windows is left out, windows are seen in so many steps at least: a candidate is abandoned between them.
_MIN_STEPS = 16


@torch.no_grad()
def search_rounds(
    model: ScoringModel,
    windows: Tensor,
    *,
    num_remove: int,
    settings: SearchSettings = EXACT,
    resume: SearchResult | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
) -> Iterator[SearchResult]:
    """Algorithm 1, a round at each step: what is decided so far. Arguments and errors are those of `search`."""
    running = _Search(model, windows, num_remove, settings, resume, progress)
    while len(running.result.removed) < num_remove:
        this_round = running.begin_round()
        losses: dict[Unit, float] = {}
        # The candidates are all units left but the first and the last, unless a fast mode has left some out. A loss is
        # inf as soon as it can no longer be the least.
        for candidate in this_round.candidates:
            losses[candidate] = this_round.loss_without(candidate)
        best = min(losses, key=lambda unit: this_round.criterion.key(unit, losses[unit]))
        yield running.remove(best)


def search(
    model: ScoringModel,
    windows: Tensor,
    *,
    num_remove: int,
    settings: SearchSettings = EXACT,
    resume: SearchResult | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
    on_round: Callable[[SearchResult], None] | None = None,
    until: Callable[[SearchResult], bool] | None = None,
) -> SearchResult:
    """The order in which `num_remove` units go, over `windows` [W, L] int64.

    `resume` is an earlier result over the same model and windows, to be continued up to `num_remove` in all; `on_round`
    gets the result after each round, and `until`, true of one, ends the search early.

    Raises ConfigError when `num_remove`, `windows` or `settings` are out of range, SlebError when the loss of the dense
    model or of every candidate of a round is not finite.
    """
    result = _continued(resume)
    for result in search_rounds(
        model, windows, num_remove=num_remove, settings=settings, resume=resume, progress=progress
    ):
        if on_round is not None:
            on_round(result)
        if until is not None and until(result):
            break
    return result


class _Search:
    """A search between two rounds: `result` is what is decided."""

    def __init__(
        self,
        model: ScoringModel,
        windows: Tensor,
        num_remove: int,
        settings: SearchSettings,
        resume: SearchResult | None,
        progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        settings.check()
        self.result = _continued(resume)
        self.settings = settings
        self.num_blocks = model.num_blocks
        self._progress = progress
        self._num_remove = num_remove
        self._first = len(self.result.removed)
        self._round: Round | None = None
        self._current: Evidence | None = None  # of the model as it stands
        _check_arguments(model.num_blocks, windows, num_remove, settings, self.result)
        alive = alive_units(settings.units, model.num_blocks, self.result.removed)
        self._num_windows = len(windows)
        # Every second window fits: each part of a mix of texts has its share of both.
        fitted, windows = (windows[::2], windows[1::2]) if settings.fit is not None else (windows, windows)
        if settings.mode != "exact":
            # Neighbouring windows are often one article. Sums do not depend on the order, being rounded once.
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        most = max(1, len(windows) // _MIN_STEPS)
        self.state = SearchState(
            model, windows, alive, settings.batch_windows, most, settings.memory_bound, settings.trunk_bound,
            objective=settings.objective, dense=model_units(settings.units, model.num_blocks),
        )  # fmt: skip
        if settings.fit is not None:
            self.state.patch(settings.fit, fitted, self.result.patches, len(self.result.removed))
        self._scale = self._num_windows / len(windows)

    def begin_round(self) -> Round:
        """The next round, its candidates in the order in which they came out of the last one."""
        state, settings, number = self.state, self.settings, len(self.result.removed) + 1
        candidates = self._candidates()
        order = [] if self._round is None else self._round.order()
        ahead = {unit: position for position, unit in enumerate(order)}
        candidates.sort(key=lambda unit: ahead.get(unit, len(ahead)))
        if not self.result.losses:
            self.result = replace(self.result, losses=(self._dense(),))
        if self._current is None and settings.savings is not None:
            self._current = state.present()
        criterion = Criterion(0.0 if self._current is None else self._current.total, settings.savings)
        report = self._report(number, len(candidates))
        self._round = Round(state, candidates, criterion, number, report)
        if settings.mode == "race":
            race(self._round, None if settings.savings is None else self._current)
        elif settings.mode == "gradient":
            screen(self._round)
        self._round.pass_all_but_the_last_group()
        return self._round

    def remove(self, best: Unit) -> SearchResult:
        """Takes `best` out, for good. Raises SlebError where its loss is not finite: then no candidate's is."""
        state, found, earlier = self.state, self._round, self.result
        assert found is not None
        if not math.isfinite(found.exact[best].total):
            raise SlebError(
                f"round {found.number}: without any one of the {found.num_candidates} candidates the loss is "
                "not a finite number, so none can be removed: search with --dtype float32, or remove fewer"
            )
        whole = sum(len(unit.sublayers) for unit in state.alive) / 2
        reference = sum(whole - len(unit.sublayers) / 2 for unit in self._candidates())
        state.remove(best)
        self._current = found.exact[best]
        margin, scale = found.margin(best), self._scale
        self.result = replace(
            earlier,
            removed=(*earlier.removed, best),
            losses=(*earlier.losses, self._current.loss * scale),
            candidate_losses=(
                *earlier.candidate_losses,
                {unit: found.exact[unit].total * scale for unit in sorted(found.exact)},
            ),
            patches=() if state.patching is None else tuple(state.patching.patches),
            margins=(*earlier.margins, replace(margin, difference=margin.difference * scale)),
            cost=SearchCost(
                state.num_passes / self._num_windows,
                state.num_evaluations / self._num_windows,
                earlier.cost.reference_passes + reference,
                earlier.cost.reference_evaluations + found.num_candidates,
            ),
        )  # fmt: skip
        return self.result

    def _candidates(self) -> list[Unit]:
        units = self.settings.units
        return [unit for unit in self.state.alive if is_candidate(unit, units, self.num_blocks)]

    def _dense(self) -> float:
        self._current = self.state.present()
        loss = self._current.loss * self._scale
        if not math.isfinite(loss):
            raise SlebError(
                "the loss of the whole model over the calibration windows is not a finite number: "
                "search with --dtype float32, and check that the checkpoint is intact"
            )
        return loss

    def _report(
        self, number: int, num_candidates: int
    ) -> Callable[[Unit, dict[Unit, Evidence], float], None]:
        num_rounds, before = self._num_remove - self._first, number - 1 - self._first

        def report(unit: Unit, evidence: dict[Unit, Evidence], done: float) -> None:
            if self._progress is None:
                return
            seen = {each: found.mean() for each, found in evidence.items() if found.windows}
            best = min(seen, key=lambda each: seen[each])
            self._progress(
                SearchProgress(
                    round=number,
                    num_rounds=self._num_remove,
                    candidate=unit,
                    candidate_index=list(evidence).index(unit) + 1,
                    num_candidates=num_candidates,
                    share=(before + done) / num_rounds,
                    best=best if math.isfinite(seen[best]) else None,
                    best_loss=seen[best] / self.state.length,
                )
            )

        return report


def _continued(resume: SearchResult | None) -> SearchResult:
    return replace(resume or SearchResult(), margins=(), cost=SearchCost())


def total_loss(
    model: ScoringModel,
    windows: Tensor,
    units: str,
    removed: Iterable[Unit],
    patches: Iterable[Patch] = (),
) -> float:
    """The loss over `windows` [W, L] int64 without the units in `removed`, with the `patches` of that depth: the sum of
    mean cross-entropy × L."""
    items = in_order(alive_units(units, model.num_blocks, removed), patches)
    evidence = Evidence()
    with torch.no_grad():
        for window in windows.split(1):
            hidden = Trunk(model, [window], items, len(items), lambda *facts: None).at(len(items), 0)
            evidence.add(model.token_losses(hidden, window))
    return evidence.total


def _check_arguments(
    num_blocks: int, windows: Tensor, num_remove: int, settings: SearchSettings, resume: SearchResult
) -> None:
    check_num_remove(num_remove, num_blocks, settings.units)
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        found = f"{windows.dtype} of shape {tuple(windows.shape)}"
        raise ConfigError(
            f"calibration windows are {found}; they must be int64 of shape [1 or more, 2 or more]"
        )
    if settings.fit is not None and len(windows) < 2:
        raise ConfigError(
            "patches are fitted on every second window and judged on the others: give 2 windows or more"
        )
    if len(resume.losses) != len(resume.removed) + bool(resume.removed):
        raise ConfigError("cannot continue an order without a loss for the dense model and for each removal")

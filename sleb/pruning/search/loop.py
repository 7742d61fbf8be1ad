"""The search: rounds until enough is removed, exact or fast, over blocks or finer units."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sleb.errors import ConfigError, SlebError
from sleb.layer_map.units import Unit
from sleb.pruning.search.criterion import Criterion, alive_units, check_num_remove, check_units, is_candidate
from sleb.pruning.search.fast import gradient_round, race_round
from sleb.pruning.search.model import ScoringModel, SearchCost, SearchProgress, SearchResult
from sleb.pruning.search.rounds import Evidence, RoundResult, SearchState, exact_round

Mode = Literal["exact", "race", "gradient"]
MODES: tuple[str, ...] = get_args(Mode)
DEFAULT_MEMORY_BOUND = 64 * 2**20
DEFAULT_TRUNK_BOUND = 2 * 2**30
# Where batch_windows is left out, windows are seen in so many steps at least: a candidate is abandoned between them.
_MIN_STEPS = 16


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        units: "blocks"; "sublayers": attention and MLP of a block apart; "attention": attention alone.
        mode: "exact" is Algorithm 1 of the paper; "race" and "gradient" look at fewer candidates (`search.fast`).
        savings: what removing each unit saves, in any measure; None: all the same.
        batch_windows: windows that run at once; None: few enough for `memory_bound` bytes of hidden states.
        trunk_bound: bytes of hidden states that are kept for all candidates of a round.
    """

    units: str = "blocks"
    mode: str = "exact"
    savings: Mapping[Unit, float] | None = None
    batch_windows: int | None = None
    memory_bound: int = DEFAULT_MEMORY_BOUND
    trunk_bound: int = DEFAULT_TRUNK_BOUND

    def check(self) -> None:
        """ConfigError for a kind of units or a mode that does not exist, and for savings that save nothing."""
        check_units(self.units)
        if self.mode not in MODES:
            raise ConfigError(f"search mode {self.mode!r} does not exist: choose {', '.join(MODES)}")
        for unit, saving in (self.savings or {}).items():
            if not (math.isfinite(saving) and saving > 0):
                raise ConfigError(f"unit {unit} saves {saving}; a saving must be a positive number")


def search(
    model: ScoringModel,
    windows: Tensor,
    *,
    num_remove: int,
    settings: SearchSettings = SearchSettings(),
    resume: SearchResult | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
    on_round: Callable[[SearchResult], None] | None = None,
    until: Callable[[SearchResult], bool] | None = None,
) -> SearchResult:
    """The order in which `num_remove` units go, over `windows` [W, L] int64 (Algorithm 1 of arXiv:2402.09025).

    `resume` is an earlier result over the same model and windows, to be continued up to `num_remove` in all; `on_round`
    gets the result after each round, and `until`, true of one, ends the search early.

    Raises ConfigError when `num_remove`, `windows` or `settings` are out of range, SlebError when the loss of the dense
    model or of every candidate of a round is not finite.
    """
    running = Search(model, windows, num_remove, settings, resume, progress)
    while running.num_left:
        result = running.next_round()
        if on_round is not None:
            on_round(result)
        if until is not None and until(result):
            break
    return running.result


class Search:
    """A search that goes round by round; `result` is what is decided. Arguments and errors are those of `search`."""

    def __init__(
        self,
        model: ScoringModel,
        windows: Tensor,
        num_remove: int,
        settings: SearchSettings = SearchSettings(),
        resume: SearchResult | None = None,
        progress: Callable[[SearchProgress], None] | None = None,
    ) -> None:
        settings.check()
        self.result = replace(resume or SearchResult(), margins=(), cost=SearchCost())
        self.settings = settings
        self.num_blocks = model.num_blocks
        self._progress = progress
        self._num_remove = num_remove
        self._first = len(self.result.removed)
        self._order: list[Unit] = []
        self._current: Evidence | None = None
        _check_arguments(model.num_blocks, windows, num_remove, settings.units, self.result)
        alive = alive_units(settings.units, model.num_blocks, self.result.removed)
        if settings.mode != "exact":
            # Neighbouring windows are often one article. Sums do not depend on the order, being rounded once.
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        most = max(1, len(windows) // _MIN_STEPS)
        self.state = SearchState(
            model, windows, alive, settings.batch_windows, most, settings.memory_bound, settings.trunk_bound
        )

    @property
    def num_left(self) -> int:
        """How many rounds there are to come."""
        return max(0, self._num_remove - len(self.result.removed))

    @torch.no_grad()
    def next_round(self) -> SearchResult:
        """Removes one more unit."""
        state, earlier = self.state, self.result
        candidates = [
            unit for unit in state.alive if is_candidate(unit, self.settings.units, self.num_blocks)
        ]
        reference = len(candidates) * (sum(len(unit.sublayers) for unit in state.alive) / 2)
        reference -= sum(len(unit.sublayers) for unit in candidates) / 2
        losses = earlier.losses or (self._dense(),)
        if self._current is None and self.settings.savings is not None:
            self._current = state.dense()
        ahead = {unit: position for position, unit in enumerate(self._order)}
        candidates.sort(key=lambda unit: ahead.get(unit, len(ahead)))
        state.on_progress = self._report(len(earlier.removed) + 1, len(candidates))
        found = self._decide(candidates, Criterion(losses[-1], self.settings.savings))
        state.remove(found.best)
        self._order, self._current = found.order, found.exact[found.best]
        self.result = replace(
            earlier,
            removed=(*earlier.removed, found.best),
            losses=(*losses, self._current.total),
            candidate_losses=(
                *earlier.candidate_losses, {unit: found.exact[unit].total for unit in sorted(found.exact)},
            ),
            margins=(*earlier.margins, found.margin),
            cost=SearchCost(
                state.num_passes / state.num_windows,
                state.num_evaluations / state.num_windows,
                earlier.cost.reference_passes + reference,
                earlier.cost.reference_evaluations + len(candidates),
            ),
        )  # fmt: skip
        return self.result

    def _decide(self, candidates: Sequence[Unit], criterion: Criterion) -> RoundResult:
        number = len(self.result.removed) + 1
        if self.settings.mode == "race":
            current = None if self.settings.savings is None else self._current
            return race_round(self.state, candidates, criterion, current, number)
        if self.settings.mode == "gradient":
            return gradient_round(self.state, candidates, criterion, number)
        return exact_round(self.state, candidates, criterion, number, len(candidates))

    def _dense(self) -> float:
        self._current = self.state.dense()
        loss = self._current.total
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


def total_loss(model: ScoringModel, windows: Tensor, units: str, removed: Iterable[Unit]) -> float:
    """The loss over `windows` [W, L] int64 without the units in `removed`: the sum of mean cross-entropy × L."""
    alive = alive_units(units, model.num_blocks, removed)
    evidence = Evidence()
    with torch.no_grad():
        for window in windows.split(1):
            hidden = model.embed(window)
            for unit in alive:
                hidden = model.run(unit, hidden)
            evidence.add(model.token_losses(hidden, window))
    return evidence.total


def _check_arguments(
    num_blocks: int, windows: Tensor, num_remove: int, units: str, resume: SearchResult
) -> None:
    check_num_remove(num_remove, num_blocks, units)
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        found = f"{windows.dtype} of shape {tuple(windows.shape)}"
        raise ConfigError(
            f"calibration windows are {found}; they must be int64 of shape [1 or more, 2 or more]"
        )
    if len(resume.losses) != len(resume.removed) + bool(resume.removed):
        raise ConfigError("cannot continue an order without a loss for the dense model and for each removal")

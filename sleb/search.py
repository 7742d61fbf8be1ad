"""Algorithm 1 of SLEB (Song et al., ICML 2024, arXiv:2402.09025): remove the block missed least, repeat.

A round over the a blocks still alive tries every one but the first and the last: the loss of the model
without it, over all calibration windows. The one with the smallest loss goes; of equal ones, the shallowest.

All candidates of a round share what runs before them, so that is computed once, the *trunk*:

    hidden = embed(tokens) through alive[0]
    for j in 1 .. a-2:
        loss[j] = loss(hidden through alive[j+1] .. alive[a-1])      # a-1-j passes
        hidden  = hidden through alive[j]                            # 1 pass, not needed at the last j

Block passes a window: (a-1)(a-2)/2 for the candidates and a-2 for the trunk. The first round takes two more,
to the end of the trunk, for the loss of the dense model; later rounds have that from the round before. The
reference implementation runs the a-1 other blocks for each of the a-2 candidates, (a-2)(a-1) passes.

Windows are the outer loop, so that few hidden states are alive, whatever the number of windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sleb.errors import ConfigError, SlebError
from sleb.units import Unit

# The trunk, and the input and output of the block that runs: hidden states of a batch alive at once.
_LIVE_COPIES = 3
DEFAULT_MEMORY_BOUND = 64 * 2**20


class ScoringModel(Protocol):
    """What the search needs of a decoder. W windows of L tokens, hidden width H."""

    @property
    def num_blocks(self) -> int:
        """How many blocks the whole model has."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """[W, L] int64 token ids to the hidden states [W, L, H] before the first block."""
        ...

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, H] after one unit, as a new tensor: the input stays as it is."""
        ...

    def loss(self, hidden: Tensor, token_ids: Tensor) -> float:
        """Sum over the W windows of the mean cross-entropy of their L-1 predictions × L, in float32."""
        ...


@dataclass(frozen=True)
class SearchResult:
    """A removal order with its evidence; also what a search continues from.

    `losses` has one value more than `removed` ([0]: the dense model). `num_passes` and
    `reference_passes` count the block passes per window of this search alone, without those of the search
    that it continued: what was spent, and what the reference implementation spends on the same rounds.
    """

    removed: tuple[Unit, ...] = ()
    losses: tuple[float, ...] = ()
    candidate_losses: tuple[dict[Unit, float], ...] = ()
    num_passes: int = 0
    reference_passes: int = 0


@dataclass(frozen=True)
class SearchProgress:
    """Where a search is, after each candidate of each batch of windows. Rounds and candidates count from 1.

    `best` is the candidate ahead in this round, `best_loss` its loss over the `best_windows` windows that it
    has been compared on so far. Passes are per window, and count this search alone.
    """

    round: int
    num_rounds: int
    candidate: Unit
    candidate_index: int
    num_candidates: int
    windows_done: int
    num_windows: int
    passes_done: float
    passes_total: int
    best: Unit | None
    best_loss: float
    best_windows: int


def round_passes(num_alive: int, *, dense: bool) -> int:
    """Block passes per window of a round over `num_alive` blocks, with the dense model's loss or without."""
    return (num_alive - 1) * (num_alive - 2) // 2 + (num_alive if dense else num_alive - 2)


def reference_round_passes(num_alive: int) -> int:
    """Block passes per window of a round in the authors' implementation, which reuses nothing."""
    return (num_alive - 2) * (num_alive - 1)


def search(
    model: ScoringModel,
    windows: Tensor,
    *,
    num_remove: int,
    resume: SearchResult | None = None,
    progress: Callable[[SearchProgress], None] | None = None,
    on_round: Callable[[SearchResult], None] | None = None,
    batch_windows: int | None = None,
    memory_bound: int = DEFAULT_MEMORY_BOUND,
) -> SearchResult:
    """The order in which `num_remove` blocks go, over `windows` [W, L] int64.

    `resume` is an earlier result over the same model and windows, to be continued up to `num_remove` in all;
    `on_round` gets the result after each round. `batch_windows` windows run at once; left out, as many as
    keep the hidden states that are alive below `memory_bound` bytes.

    Raises ConfigError when `num_remove` or `windows` are out of range, SlebError when the loss of the dense
    model or of every candidate of a round is not finite.
    """
    result = replace(resume or SearchResult(), num_passes=0, reference_passes=0)
    _check_arguments(model.num_blocks, windows, num_remove, result)
    alive = [Unit(block) for block in range(model.num_blocks) if Unit(block) not in result.removed]
    state = _Search(model, windows, batch_windows or _fitting_windows(model, windows, memory_bound), progress)
    rounds = range(len(alive), len(alive) - (num_remove - len(result.removed)), -1)
    state.plan(sum(round_passes(n, dense=not result.losses and n == len(alive)) for n in rounds), num_remove)
    with torch.no_grad():
        for num_alive in rounds:
            dense, candidates = state.run_round(alive, len(result.removed) + 1, dense=not result.losses)
            best = _best(candidates, len(result.removed) + 1)
            alive.remove(best)
            result = SearchResult(
                removed=(*result.removed, best),
                losses=(*(result.losses or (_finite_dense(dense),)), candidates[best]),
                candidate_losses=(*result.candidate_losses, candidates),
                num_passes=state.num_window_passes // len(windows),
                reference_passes=result.reference_passes + reference_round_passes(num_alive),
            )
            if on_round is not None:
                on_round(result)
    return result


def check_num_remove(num_remove: int, num_blocks: int) -> None:
    """ConfigError unless 1 <= num_remove <= num_blocks - 2: the first and the last block always stay."""
    most = num_blocks - 2
    if not 1 <= num_remove <= most:
        raise ConfigError(
            f"cannot remove {num_remove} of {num_blocks} blocks: the first and the last always stay, "
            + (f"so ask for 1 to {most}" if most > 0 else "so a model needs at least 3 blocks")
        )


def _check_arguments(num_blocks: int, windows: Tensor, num_remove: int, resume: SearchResult) -> None:
    check_num_remove(num_remove, num_blocks)
    if windows.dim() != 2 or windows.dtype != torch.int64 or windows.shape[0] < 1 or windows.shape[1] < 2:
        found = f"{windows.dtype} of shape {tuple(windows.shape)}"
        raise ConfigError(
            f"calibration windows are {found}; they must be int64 of shape [1 or more, 2 or more]"
        )
    for unit in resume.removed:
        if unit.part != "block" or unit.block >= num_blocks:
            raise ConfigError(
                f"cannot continue after removing {unit}: the search removes whole blocks of the model"
            )
    if len(resume.losses) != len(resume.removed) + bool(resume.removed):
        raise ConfigError("cannot continue an order without a loss for the dense model and for each removal")


def _fitting_windows(model: ScoringModel, windows: Tensor, memory_bound: int) -> int:
    with torch.no_grad():
        window_bytes = model.embed(windows[:1]).nbytes
    return max(1, min(len(windows), memory_bound // (_LIVE_COPIES * window_bytes)))


def _total(losses: Sequence[float]) -> float:
    """The sum over batches, `inf` (disqualified) unless all of it is finite."""
    try:
        return math.fsum(losses) if all(map(math.isfinite, losses)) else math.inf
    except OverflowError:
        return math.inf


def _finite_dense(loss: float) -> float:
    if not math.isfinite(loss):
        raise SlebError(
            "the loss of the whole model over the calibration windows is not a finite number: "
            "search with --dtype float32, and check that the checkpoint is intact"
        )
    return loss


def _best(candidates: dict[Unit, float], round_number: int) -> Unit:
    # Candidates are in the order of the blocks, and min keeps the first of equals: the shallowest.
    best = min(candidates, key=lambda unit: candidates[unit])
    if not math.isfinite(candidates[best]):
        raise SlebError(
            f"round {round_number}: without any one of the {len(candidates)} candidate blocks the loss is "
            "not a finite number, so none can be removed: search with --dtype float32, or remove fewer blocks"
        )
    return best


class _Search:
    """One search under way: it counts passes and tells how far it is."""

    def __init__(
        self,
        model: ScoringModel,
        windows: Tensor,
        batch_windows: int,
        progress: Callable[[SearchProgress], None] | None,
    ) -> None:
        self.model = model
        self.windows = windows
        self.batches: tuple[Tensor, ...] = torch.split(windows, batch_windows)
        self.progress = progress
        self.num_window_passes = 0
        self.passes_total = 0
        self.num_rounds = 0

    def plan(self, passes_total: int, num_rounds: int) -> None:
        self.passes_total, self.num_rounds = passes_total, num_rounds

    def run(self, unit: Unit, hidden: Tensor) -> Tensor:
        self.num_window_passes += len(hidden)
        return self.model.run(unit, hidden)

    def run_round(self, alive: list[Unit], number: int, *, dense: bool) -> tuple[float, dict[Unit, float]]:
        """The loss of the model as it stands (nan unless `dense`), and that without each candidate."""
        losses: dict[Unit, list[float]] = {unit: [] for unit in alive[1:-1]}
        dense_losses: list[float] = []
        windows_done = 0
        for batch in self.batches:
            hidden = self.run(alive[0], self.model.embed(batch))
            for index, unit in enumerate(alive[1:-1], 1):
                losses[unit].append(self._loss_through(alive[index + 1 :], hidden, batch))
                self._report(number, unit, losses, windows_done, len(batch))
                if dense or index < len(alive) - 2:
                    hidden = self.run(unit, hidden)
            if dense:
                dense_losses.append(_finite_dense(self._loss_through(alive[-1:], hidden, batch)))
            windows_done += len(batch)
        return _total(dense_losses) if dense else math.nan, {unit: _total(losses[unit]) for unit in losses}

    def _loss_through(self, units: Sequence[Unit], hidden: Tensor, batch: Tensor) -> float:
        for unit in units:
            hidden = self.run(unit, hidden)
        return self.model.loss(hidden, batch)

    def _report(
        self,
        number: int,
        candidate: Unit,
        losses: dict[Unit, list[float]],
        windows_done: int,
        batch_size: int,
    ) -> None:
        if self.progress is None:
            return
        # Compare over the batches that every candidate has seen; within the first, over those tried so far.
        num_batches = max(1, min(map(len, losses.values())))
        totals = {
            unit: _total(each[:num_batches]) for unit, each in losses.items() if len(each) >= num_batches
        }
        best = min(totals, key=lambda unit: totals[unit])
        index = list(losses).index(candidate) + 1
        self.progress(
            SearchProgress(
                round=number,
                num_rounds=self.num_rounds,
                candidate=candidate,
                candidate_index=index,
                num_candidates=len(losses),
                windows_done=windows_done + (batch_size if index == len(losses) else 0),
                num_windows=len(self.windows),
                passes_done=self.num_window_passes / len(self.windows),
                passes_total=self.passes_total,
                best=best if math.isfinite(totals[best]) else None,
                best_loss=totals[best],
                best_windows=sum(map(len, self.batches[:num_batches])),
            )
        )

"""What the search needs of a model, what it is told, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from sleb.errors import ConfigError
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer, Unit
from sleb.pruning.search.criterion import check_units

Mode = Literal["exact", "race", "gradient"]
MODES: tuple[str, ...] = get_args(Mode)
Objective = Literal["loss", "kl"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
DEFAULT_MEMORY_BOUND = 64 * 2**20
DEFAULT_TRUNK_BOUND = 2 * 2**30


class ScoringModel(Protocol):
    """What the search needs of a decoder. W windows of L tokens, hidden width H.

    With a gradient screen, `run` and `token_losses` must be differentiable with respect to the hidden states.
    """

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

    def apply(self, patch: Patch, hidden: Tensor) -> Tensor:
        """Hidden states [W, L, H] after a patch, as a new tensor."""
        ...

    def normed(self, hidden: Tensor) -> Tensor:
        """What a normed patch multiplies: hidden states [..., H] after a norm without a weight, float32."""
        ...

    def token_losses(self, hidden: Tensor, token_ids: Tensor) -> Tensor:
        """Cross-entropy [W, L-1] in nats, float32, of each token given those before it."""
        ...

    def expected_rows(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of the next-token distributions at hidden [W, L, H], the last apart, what `divergences` needs of them; no
        larger than `hidden`."""
        ...

    def divergences(
        self, hidden: Tensor, token_ids: Tensor, expected: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """KL divergence [W, L-1] in nats, 0 or more, of the distributions at `hidden` from those of `expected_rows`;
        and `token_losses`."""
        ...


class PatchFit(Protocol):
    """One patch, fitted to hidden states that come a batch at a time."""

    def add(self, before: Tensor, after: Tensor) -> None:
        """Hidden states [W, L, H] before the patch, and those that it should give."""
        ...

    def patch(self) -> Patch:
        """The patch as it is served, and stored."""
        ...


@dataclass(frozen=True)
class SearchSettings:
    """How to search.

    Attributes:
        units: "blocks"; "sublayers": attention and MLP of a block apart; "attention": attention alone.
        mode: "exact" is Algorithm 1 of the paper; "race" and "gradient" look at fewer candidates (`search.fast`).
        savings: what removing each unit saves, in any measure; None: all the same.
        objective: what a candidate is judged by: its "loss" (cross-entropy), or "kl", the divergence of its next-token
            distributions from the dense model's.
        fit: begins the patch for a run (its first and its last sublayer) that is served from a depth on; None: none.
            With patches, windows 0, 2, 4, … fit them and the others judge.
        batch_windows: windows that run at once; None: few enough for `memory_bound` bytes of hidden states.
        trunk_bound: bytes of hidden states that are kept for all candidates of a round; with patches as many again.
    """

    units: str = "blocks"
    mode: str = "exact"
    savings: Mapping[Unit, float] | None = None
    objective: str = "loss"
    fit: Callable[[tuple[Sublayer, Sublayer], int], PatchFit] | None = None
    batch_windows: int | None = None
    memory_bound: int = DEFAULT_MEMORY_BOUND
    trunk_bound: int = DEFAULT_TRUNK_BOUND

    def check(self) -> None:
        """ConfigError for a kind of units or a mode that does not exist, and for savings that save nothing."""
        check_units(self.units)
        if self.mode not in MODES:
            raise ConfigError(f"search mode {self.mode!r} does not exist: choose {', '.join(MODES)}")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective {self.objective!r} does not exist: choose {', '.join(OBJECTIVES)}")
        if self.mode == "gradient" and (self.objective != "loss" or self.fit is not None):
            raise ConfigError(
                "a gradient says nothing of patches, nor of the divergence, which is flat at the dense model: "
                "screen by a race, or search for the loss without patches"
            )
        for unit, saving in (self.savings or {}).items():
            if not (math.isfinite(saving) and saving > 0):
                raise ConfigError(f"unit {unit} saves {saving}; a saving must be a positive number")


EXACT = SearchSettings()


@dataclass(frozen=True)
class Margin:
    """How clearly a round was decided.

    Attributes:
        runner_up: the next best candidate; None when there was no other.
        difference: its loss less the winner's, over all windows; where `at_least`, no more was computed.
        z: the difference a standard error of the paired differences between the two, over stretches of text; None
            where the runner-up was not computed on all windows.
        num_exact: candidates computed on all windows. num_candidates: all of the round.
    """

    runner_up: Unit | None
    difference: float
    at_least: bool
    z: float | None
    num_exact: int
    num_candidates: int


@dataclass(frozen=True)
class SearchCost:
    """Work a window. A pass is one block run once (an attention or an MLP is half of one); an evaluation is the
    final norm, head and cross-entropy once. The reference implementation's numbers are for the same rounds.
    """

    num_passes: float = 0
    num_evaluations: float = 0
    reference_passes: float = 0
    reference_evaluations: float = 0


@dataclass(frozen=True)
class SearchResult:
    """A removal order with its evidence; also what a search continues from.

    `losses` has one value more than `removed` ([0]: the dense model). `candidate_losses` holds of each round the
    candidates that were computed on all windows, `math.inf` for one whose loss is not finite: values of the objective.
    `patches` are those of all depths. Where some windows fitted patches, losses are those of the others times all
    windows for each of them. `margins` and `cost` are those of this search alone, without the one that it continued.
    """

    removed: tuple[Unit, ...] = ()
    losses: tuple[float, ...] = ()
    candidate_losses: tuple[dict[Unit, float], ...] = ()
    patches: tuple[Patch, ...] = ()
    margins: tuple[Margin, ...] = ()
    cost: SearchCost = SearchCost()


@dataclass(frozen=True)
class SearchProgress:
    """Where a search is. Rounds and candidates count from 1.

    `share` is how much of all rounds is done, 0 to 1; what is abandoned counts as done. `best` is the candidate
    ahead in this round, `best_loss` its loss a token on the windows that it has been computed on so far.
    """

    round: int
    num_rounds: int
    candidate: Unit
    candidate_index: int
    num_candidates: int
    share: float
    best: Unit | None
    best_loss: float

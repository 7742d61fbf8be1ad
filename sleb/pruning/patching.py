"""Patches fitted in closed form: what a run of removed sublayers did to the residual stream, as a small map of it.

On the same tokens, let h be the residual before the run in the pruned model as it stands, and y the dense model's after
it. The patch h + W φ(h) + b is the ridge regression of y − h on φ(h), so nothing is trained:

    W = C R⁻¹    R = Σ (φ − φ̄)(φ − φ̄)ᵀ + Λ    C = Σ (δ − δ̄)(φ − φ̄)ᵀ    δ = y − h    b = δ̄ − W φ̄

(A linear map in place of blocks: ReplaceMe, arXiv 2505.02819; LinearPatch, arXiv 2505.24680. A scale of each channel:
Prune&Comp, arXiv 2507.18212.) Runs are fitted from the bottom up, so that each one mends what is left of those below.
Text is streamed: moments are summed in float64, and of hidden states only what a bound allows is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sleb.errors import ConfigError, SlebError
from sleb.layer_map.patches import Form, Patch, Patches
from sleb.layer_map.units import Sublayer, Unit, place_of
from sleb.pruning.options import PatchForm
from sleb.pruning.search.model import DEFAULT_MEMORY_BOUND, DEFAULT_TRUNK_BOUND, ScoringModel
from sleb.pruning.search.rounds import Evidence
from sleb.pruning.search.trunk import state_bytes

Array = np.ndarray[Any, np.dtype[Any]]
Run = tuple[Sublayer, Sublayer]  # its first and its last sublayer
Step = Sublayer | Patch

# Both found on SmolLM2-135M and 16 windows of Wikipedia, judged by other text: from 0.1 to 1 little changes.
RIDGE = 0.3
_FLOOR = 1e-3  # of the mean variance: features that hardly vary are held down too
_CHUNK = 4096  # tokens whose products are summed in float32
_FEW_TOKENS = 8  # a feature: with one a feature, patches of SmolLM2 raised the perplexity of other text
_LIVE_COPIES = 4  # hidden states of a batch alive at once: both models', features, targets


class Moments:
    """Count, means and centred second moments of features and targets over tokens, summed in float64.

    Chunks of tokens are centred and multiplied in float32 and joined by the update of Chan, Golub & LeVeque (1983),
    so that a large mean costs no digits. `gram` [F, F] is of features, `cross` [F, E] of features with targets.
    diagonal: of both only the diagonal, [E]: all that the form "scale" reads.
    """

    def __init__(self, *, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        self.count = 0
        self.features = self.targets = self.gram = self.cross = torch.zeros(0, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Features [W, L, F] and targets [W, L, E] of windows, without the first token of each.

        That one is an attention sink (arXiv 2309.17453): its residual may be a thousand times as long as the others'.
        """
        pairs = (
            each[:, 1:].reshape(-1, each.shape[-1]).float().split(_CHUNK) for each in (features, targets)
        )
        for some, other in zip(*pairs, strict=True):
            self.merge(self._of(some, other))

    def _of(self, features: Tensor, targets: Tensor) -> Moments:
        found = Moments(diagonal=self.diagonal)
        found.count = len(features)
        found.features, found.targets = features.double().mean(0), targets.double().mean(0)
        centred, other = features - found.features.float(), targets - found.targets.float()
        if self.diagonal:
            found.gram, found.cross = (centred**2).sum(0).double(), (centred * other).sum(0).double()
        else:
            found.gram, found.cross = (centred.T @ centred).double(), (centred.T @ other).double()
        return found

    def merge(self, other: Moments) -> None:
        """Takes over the tokens of `other`."""
        if not self.count:
            self.count = other.count
            self.features, self.targets, self.gram, self.cross = (
                each.clone() for each in (other.features, other.targets, other.gram, other.cross)
            )
            return
        count = self.count + other.count
        apart, target = other.features - self.features, other.targets - self.targets
        weight = self.count * other.count / count
        product = torch.mul if self.diagonal else torch.outer
        self.gram += other.gram + weight * product(apart, apart)
        self.cross += other.cross + weight * product(apart, target)
        self.features += apart * (other.count / count)
        self.targets += target * (other.count / count)
        self.count = count


def fit(moments: Moments, form: Form, rank: int | None = None, ridge: float = RIDGE) -> dict[str, Array]:
    """The tensors of the patch that these moments give, float32, as `Patch` has them.

    "scale" needs features h, the others φ(h). `ridge` is a share of each feature's variance, above 0. "low-rank" is
    the exact optimum of that rank under the same penalty: W projected on the leading eigenvectors of W R Wᵀ (Izenman
    1975, reduced-rank regression). Raises SlebError where the moments are not finite.
    """
    variances = moments.gram if moments.diagonal else moments.gram.diagonal()
    if not (variances.isfinite().all() and moments.targets.isfinite().all()):
        raise SlebError("hidden states are not finite numbers: fit with --dtype float32")
    floor = max(float(variances.mean()) * _FLOOR, torch.finfo(torch.float32).tiny)
    penalty = ridge * variances.clamp_min(floor)
    if form == "scale":
        cross = moments.cross if moments.diagonal else moments.cross.diagonal()
        change = cross / (variances + penalty)
        return _arrays(scale=1 + change, bias=moments.targets - change * moments.features)
    matrix = moments.gram + torch.diag(penalty)
    weight = torch.cholesky_solve(moments.cross, torch.linalg.cholesky(matrix))  # [F, E]: W transposed
    if form == "full":
        return _arrays(weight=weight.T, bias=moments.targets - moments.features @ weight)
    assert rank is not None
    up = torch.linalg.eigh(weight.T @ matrix @ weight).eigenvectors[:, -rank:]
    down = weight @ up
    return _arrays(down=down.T, up=up, bias=moments.targets - moments.features @ down @ up.T)


def _arrays(**tensors: Tensor) -> dict[str, Array]:
    return {name: tensor.float().contiguous().cpu().numpy() for name, tensor in tensors.items()}


def runs(removed: Iterable[Unit]) -> list[Run]:
    """The runs of neighbouring sublayers that `removed` takes out, in order."""
    gone = sorted(each for unit in removed for each in unit.sublayers)
    starts = [
        0,
        *(at for at, (one, other) in enumerate(pairwise(gone), 1) if place_of(other) != place_of(one) + 1),
    ]
    return [(gone[start], gone[end - 1]) for start, end in pairwise([*starts, len(gone)])] if gone else []


def check_text(model: ScoringModel, what: PatchForm, windows: Tensor) -> str | None:
    """What to say of windows that are few to fit on. Raises ConfigError for a rank above the hidden size."""
    width, num_tokens = model.embed(windows[:1, :1]).shape[-1], windows.numel()
    if what.rank is not None and what.rank > width:
        raise ConfigError(f"patch low-rank={what.rank} is more than the hidden size {width}: take full")
    if num_tokens >= _FEW_TOKENS * width:
        return None
    return (
        f"{num_tokens} tokens are few for patches of {width} features, which may then do harm: "
        f"take more --windows, {_FEW_TOKENS * width} tokens or more"
    )


class States:
    """Hidden states of windows after any steps, kept by what ran before them as far as a bound allows.

    Models that begin alike, the dense one and those of several depths, share what they begin with.
    """

    def __init__(
        self,
        model: ScoringModel,
        windows: Tensor,
        batch_windows: int | None = None,
        memory_bound: int = DEFAULT_TRUNK_BOUND,
        on_windows: Callable[[int], None] = lambda number: None,
    ) -> None:
        """on_windows: told of each batch that a fit or a loss has passed, and how many windows it had."""
        window_bytes = state_bytes(model, windows)
        if batch_windows is None:
            batch_windows = max(1, DEFAULT_MEMORY_BOUND // (_LIVE_COPIES * window_bytes))
        self.batches = windows.split(batch_windows)
        self.on_windows = on_windows
        self._model = model
        self._num_kept = memory_bound // (window_bytes * len(windows))
        self._kept: list[dict[tuple[Step, ...], Tensor]] = [{} for _ in self.batches]

    @torch.no_grad()
    def after(self, steps: tuple[Step, ...], index: int) -> Tensor:
        """Hidden states [W, L, E] of batch `index` after `steps`."""
        kept = self._kept[index]
        start = next((end for end in range(len(steps), 0, -1) if steps[:end] in kept), 0)
        hidden = kept[steps[:start]] if start else self._model.embed(self.batches[index])
        for step in steps[start:]:
            hidden = self.run(step, hidden)
        if start < len(steps) and self._num_kept:
            if len(kept) >= self._num_kept:  # the oldest goes: of two models side by side, what led here
                del kept[next(iter(kept))]
            kept[steps] = hidden
        return hidden

    def run(self, step: Step, hidden: Tensor) -> Tensor:
        if isinstance(step, Patch):
            return self._model.apply(step, hidden)
        return self._model.run(Unit(*step), hidden)

    @torch.no_grad()
    def loss(self, steps: tuple[Step, ...]) -> float:
        """The sum over the windows of mean cross-entropy × window length after `steps`, a whole model's."""
        evidence = Evidence()
        for index, tokens in enumerate(self.batches):
            for end, step in enumerate(steps):
                if isinstance(step, Patch):  # where deeper models branch off
                    self.after(steps[:end], index)
            evidence.add(self._model.token_losses(self.after(steps, index), tokens))
            self.on_windows(len(tokens))
        return evidence.total


class RunFit:
    """The patch of one run, fitted to hidden states that come a batch at a time: `sleb.pruning.search.PatchFit`."""

    def __init__(
        self, model: ScoringModel, what: PatchForm, run: Run, first_depth: int, ridge: float = RIDGE
    ) -> None:
        self._model, self._what, self._run, self._depth, self._ridge = model, what, run, first_depth, ridge
        self._normed = what.form != "scale"
        self._moments = Moments(diagonal=not self._normed)

    @torch.no_grad()
    def add(self, before: Tensor, after: Tensor) -> None:
        """Hidden states [W, L, E] of windows before the run, and those that they should become."""
        features = self._model.normed(before) if self._normed else before
        self._moments.add(features, after.float() - before.float())

    def patch(self) -> Patch:
        """The patch as it is served and stored, in half precision where that holds it."""
        tensors = fit(self._moments, self._what.form, self._what.rank, self._ridge)
        patch = Patch(*self._run, self._depth, None, self._what.form, self._normed, tensors)
        return Patches.of((patch,)).load()[0]


class Patcher:
    """Fits the patches of models that lack more and more of one dense model: one a removal.

    A run keeps the patch that was fitted when it first stood there, whatever goes below it later. One fitted anew for
    every depth needs two to three times the memory and, on SmolLM2-135M, is better by 0.0 to 0.5 % of perplexity.
    """

    def __init__(self, model: ScoringModel, states: States, what: PatchForm) -> None:
        self._model, self._states, self._what = model, states, what
        self._dense: tuple[Step, ...] = tuple(
            each for block in range(model.num_blocks) for each in Unit(block).sublayers
        )
        self._fitted: dict[Run, Patch] = {}

    def steps(self, removed: Iterable[Unit], depth: int, *, patched: bool = True) -> tuple[Step, ...]:
        """The model without `removed`, with its patches unless it is not `patched`; new ones begin at `depth`."""
        found: tuple[Step, ...] = ()
        end = 0
        for run in runs(removed):
            found += self._dense[end : place_of(run[0])]
            end = place_of(run[1]) + 1
            if not patched:
                continue
            if run not in self._fitted:
                fitting = RunFit(self._model, self._what, run, depth)
                for index, tokens in enumerate(self._states.batches):
                    wanted = self._states.after(self._dense[:end], index)
                    fitting.add(self._states.after(found, index), wanted)
                    self._states.on_windows(len(tokens))
                self._fitted[run] = fitting.patch()
            found += (self._fitted[run],)
        return found + self._dense[end:]


def spans(models: Sequence[tuple[Step, ...]]) -> tuple[Patch, ...]:
    """The patches of the models of depths 0, 1, …, each with the depths in a row that have it: as a file has them.

    Those of the last are of all deeper ones too.
    """
    found: list[Patch] = []
    last: dict[Step, int] = {}  # where in `found` those of the depth before are
    for depth, model in enumerate(models):
        here: dict[Step, int] = {}
        for step in model:
            if isinstance(step, Patch):
                here[step] = last.get(step, len(found))
                if step not in last:
                    found.append(replace(step, first_depth=depth))
                found[here[step]] = replace(found[here[step]], last_depth=depth)
        last = here
    for at in last.values():
        found[at] = replace(found[at], last_depth=None)
    return tuple(found)

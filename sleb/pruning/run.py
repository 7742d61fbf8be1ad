"""From a checkpoint to a layer map: load the model, gather the calibration, search, save each round."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap, Patches, SearchRecord, TextLosses, Unit
from sleb.layer_map.patches import PatchRecord
from sleb.options import takes_options
from sleb.pruning.calibration import Calibration, token_hash
from sleb.pruning.cost_model import CostModel, fit_cost_model
from sleb.pruning.options import (
    DEFAULT_REMOVE,
    PruneOptions,
    parse_increase,
    parse_remove,
    set_threads,
)
from sleb.pruning.patching import RIDGE, RunFit, check_text
from sleb.pruning.resume import check_output, check_resume
from sleb.pruning.search import (
    ScoringModel,
    SearchProgress,
    SearchResult,
    SearchSettings,
    candidate_units,
    check_num_remove,
    num_units,
    search,
    total_loss,
)
from sleb.pruning.target import FrontPoint, Target, check_reachable, front
from sleb.pruning.tokens import TokenizedModel, gather_tokens

if TYPE_CHECKING:
    from sleb.engine.model.architecture import DecoderSpec


class PrunableModel(ScoringModel, TokenizedModel, Protocol):
    """A scoring model that knows its name, shape, tokenizer and context, as `DecoderScorer` does."""

    @property
    def fingerprint(self) -> str | None: ...
    def num_parameters(self, unit: Unit) -> int: ...


@dataclass(frozen=True)
class PruneReport:
    """What a search found, what it took, and the front that it gives.

    Attributes:
        result: with the work of this search. num_windows, seqlen: of the calibration. seconds: of the search alone.
        front: quality and predicted speedup of every depth. cost_model: what predicts; None where none was fitted.
    """

    layer_map: LayerMap
    result: SearchResult
    num_windows: int
    seqlen: int
    seconds: float
    front: list[FrontPoint]
    cost_model: CostModel | None


@takes_options(PruneOptions, first="model")
def prune(model: str | os.PathLike[str] | PrunableModel, options: PruneOptions) -> LayerMap:
    """Search for the blocks that `model` misses least (Algorithm 1 of SLEB); the map recommends all of them.

    `model` is what the engine loads (a folder, hub id, .gguf file or alias) or a loaded model; the other
    arguments are the fields of `PruneOptions`. Raises ConfigError, ModelError, LayerMapError or SlebError.
    """
    return run_pruning(model, options).layer_map


def run_pruning(
    model: str | os.PathLike[str] | PrunableModel,
    options: PruneOptions,
    *,
    progress: Callable[[SearchProgress], None] | None = None,
    on_round: Callable[[LayerMap], None] | None = None,
    on_fit: Callable[[float], None] = lambda share: None,
    on_generate: Callable[[float], None] = lambda share: None,
    note: Callable[[str], None] = lambda message: None,
) -> PruneReport:
    """`prune` with everything that it measured.

    `on_round` gets the map as decided so far, after it is saved; `on_fit` how much of the cost model's measurements is
    done, 0 to 1; `on_generate` how much of a text that the model writes; `note` remarks for people. Whatever ends the
    search, the output file holds the rounds that were completed, or is as it was before the first.
    """
    options.check()
    set_threads(options.threads)
    path = None if options.output is None else Path(options.output)
    earlier = None if path is None else check_output(path, resume=options.resume, force=options.force)
    if options.resume and earlier is None:
        note(f"{path} does not exist yet: the search begins with its first round")
    if options.runtime == "transformers":
        note(
            "the map is found without patches and without predicted speedups: sleb does not serve a model of any "
            "architecture, but `sleb export` writes the smaller checkpoint"
        )
    scorer = _load(model, options)
    num_remove = _num_remove(options, scorer.num_blocks)
    tokens, held_out = gather_tokens(model, scorer, options, note=note, on_generate=on_generate)
    what = options.patch_form
    if what is not None and (advice := check_text(scorer, what, tokens.windows[::2])) is not None:
        note(f"every second window fits patches: {advice}")
    cost_model = _cost_model(model, options, on_fit)
    candidates = candidate_units(options.units, scorer.num_blocks)
    if options.target_speedup is not None and cost_model is not None:
        check_reachable(cost_model, candidates, options.target_speedup)
    run = _Run(scorer, options, tokens, held_out, cost_model, num_remove)
    if earlier is not None:
        check_resume(earlier, run.layer_map, run.patches)
        run.layer_map = replace(run.layer_map, **_evidence(earlier))
        note(f"continuing {path}: {earlier.max_depth} of {num_remove} removals are decided")

    def finish_round(result: SearchResult) -> None:
        run.add(result)
        if path is not None:
            run.layer_map.save(path)
        if on_round is not None:
            on_round(run.layer_map)

    started = time.monotonic()
    found = run.layer_map
    start = SearchResult(
        found.removed,
        found.losses or (),
        found.candidate_losses or (),
        () if found.patches is None else found.patches.load(),
    )
    if num_remove > len(start.removed) and not (start.removed and run.is_decided()):
        result = search(
            scorer,
            tokens.windows,
            num_remove=num_remove,
            resume=start,
            progress=progress,
            on_round=finish_round,
            until=lambda result: run.is_decided(),
            settings=SearchSettings(
                units=options.units,
                mode=options.search_mode,
                savings=_savings(options, scorer, cost_model, candidates),
                objective=options.search_objective,
                fit=run.fit,
                batch_windows=options.batch_windows,
            ),
        )
    else:
        result = start
        finish_round(start)  # the order stays, longer than asked; only the recommended depth changes
    num_windows, seqlen = tokens.windows.shape
    points = run.front()
    if run.target is not None and (missed := run.target.shortfall(points, run.layer_map.depth)):
        note(missed)
    seconds = time.monotonic() - started
    return PruneReport(run.layer_map, result, num_windows, seqlen, seconds, points, cost_model)


class _Run:
    """The map as it grows, its held-out losses, and whether the targets are met."""

    def __init__(
        self,
        scorer: PrunableModel,
        options: PruneOptions,
        tokens: Calibration,
        held_out: Sequence[Calibration],
        cost_model: CostModel | None,
        num_remove: int,
    ) -> None:
        self._scorer, self._options, self._held_out = scorer, options, held_out
        self._cost_model, self._num_remove = cost_model, num_remove
        increase = options.max_perplexity_increase
        self.target = (
            Target(options.target_speedup, None if increase is None else parse_increase(increase))
            if options.has_target
            else None
        )
        what = options.patch_form
        self.fit = None if what is None else partial(RunFit, scorer, what)
        calibration = replace(tokens.record, dtype=options.dtype)
        self.patches: PatchRecord | None = None
        if what is not None:  # every second window
            fitted = tokens.windows[::2]
            record = replace(calibration, windows=len(fitted), token_hash=token_hash(fitted))
            self.patches = PatchRecord(what.form, what.rank, RIDGE, record)
        self.layer_map = LayerMap(
            model=scorer.model_name,
            fingerprint=scorer.fingerprint,
            num_blocks=scorer.num_blocks,
            calibration=calibration,
            search=SearchRecord(
                units=options.units,
                mode=options.search_mode,
                cost=options.cost,
                objective=options.search_objective,
                patch="none" if what is None else str(what),
            ),
            held_out=tuple(TextLosses(replace(text.record, dtype=options.dtype)) for text in held_out),
        )

    def add(self, result: SearchResult) -> None:
        """Takes over a result, adds the held-out losses of its new depths, and recommends a depth."""
        patches = Patches.of(result.patches, self.patches or PatchRecord()) if result.patches else None
        self.layer_map = replace(
            self.layer_map,
            removed=result.removed,
            losses=result.losses,
            candidate_losses=result.candidate_losses,
            held_out=tuple(
                self._extended(known, text.windows, result.removed, patches)
                for known, text in zip(self.layer_map.held_out, self._held_out, strict=True)
            ),
            depth=len(result.removed),
            patches=patches,
        )
        self.layer_map = self.layer_map.recommend(self._depth())

    def _extended(
        self, known: TextLosses, windows: Tensor, removed: tuple[Unit, ...], patches: Patches | None
    ) -> TextLosses:
        """With the losses of the depths that it lacks."""
        depths = range(len(known.losses), len(removed) + 1)
        units = self._options.units
        new = [
            total_loss(
                self._scorer, windows, units, removed[:depth], () if patches is None else patches.at(depth)
            )
            for depth in depths
        ]
        return replace(known, losses=(*known.losses, *new))

    def front(self) -> list[FrontPoint]:
        return front(self.layer_map, self._cost_model)

    def is_decided(self) -> bool:
        """Whether the targets make further removals pointless."""
        return self.target is not None and self.target.is_decided(self.front())

    def _depth(self) -> int:
        if self.target is not None:
            return self.target.choose(self.front())
        depth = self._num_remove if self._options.depth is None else self._options.depth
        return min(depth, self.layer_map.max_depth)


def _evidence(layer_map: LayerMap) -> dict[str, Any]:
    """What a continued search takes over."""
    names = ("removed", "losses", "candidate_losses", "held_out", "depth", "patches")
    return {name: getattr(layer_map, name) for name in names}


def _cost_model(
    model: str | os.PathLike[str] | PrunableModel, options: PruneOptions, on_fit: Callable[[float], None]
) -> CostModel | None:
    """The cost model, fitted before the search; None for a loaded model, which need not be one of the engine's."""
    if not isinstance(model, str | os.PathLike):
        if options.target_speedup is not None or options.cost == "latency":
            raise ConfigError(
                "a speedup can only be predicted for a model given by name: pass its folder or id"
            )
        return None
    if not options.predicts_speedup:
        return None
    return fit_cost_model(
        os.fspath(model), device=options.device, batch=options.speedup_batch, on_progress=on_fit
    )


def _savings(
    options: PruneOptions, scorer: PrunableModel, cost_model: CostModel | None, units: Sequence[Unit]
) -> dict[Unit, float] | None:
    """What each candidate saves by `options.cost`; None where all save the same."""
    if options.cost == "params":
        return {unit: float(scorer.num_parameters(unit)) for unit in units}
    if options.cost == "latency":
        assert cost_model is not None
        return {unit: cost_model.saving(unit) for unit in units}
    return None  # every attention has as much KV as any other


def _num_remove(options: PruneOptions, num_blocks: int) -> int:
    """How many units the search removes at most."""
    if options.remove is None and options.has_target:
        num_remove = len(candidate_units(options.units, num_blocks))
    else:
        share = DEFAULT_REMOVE if options.remove is None else options.remove
        num_remove = parse_remove(share, num_units(options.units, num_blocks))
    check_num_remove(num_remove, num_blocks, options.units)
    if options.depth is not None and not 0 <= options.depth <= num_remove:
        allowed = f"0 to {num_remove}, the number of units removed"
        raise ConfigError(f"depth {options.depth} to recommend must be {allowed}")
    return num_remove


def _load(model: str | os.PathLike[str] | PrunableModel, options: PruneOptions) -> PrunableModel:
    if not isinstance(model, str | os.PathLike):
        return model
    if options.runtime == "transformers":
        from sleb.pruning.transformers_scorer import TransformersScorer

        return TransformersScorer.load(
            os.fspath(model),
            dtype=options.dtype,
            device=options.device,
            check=lambda num_blocks: _num_remove(options, num_blocks),
        )
    from sleb.engine.model.scoring import DecoderScorer

    def check(spec: DecoderSpec) -> None:
        if spec.parallel and options.units != "blocks":
            raise ConfigError(
                f"--units {options.units} cannot be had of {spec.architecture}: attention and MLP of a block read the "
                "same residual, so that neither goes without the other; search with --units blocks"
            )
        _num_remove(options, spec.num_blocks)

    return DecoderScorer.load(os.fspath(model), dtype=options.dtype, device=options.device, check=check)

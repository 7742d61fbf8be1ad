"""From a layer map to one with patches: load the model, gather the text, fit every depth, measure what that gives."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sleb.errors import ConfigError, SlebError
from sleb.fields import shown_path
from sleb.files import check_writable
from sleb.layer_map.layer_map import LayerMap, Patch, Patches, TextLosses, Unit
from sleb.layer_map.patches import PatchRecord
from sleb.options import takes_options
from sleb.pruning.calibration import Calibration
from sleb.pruning.options import PatchForm, PatchOptions, parse_patch, set_threads
from sleb.pruning.patching import RIDGE, Patcher, States, Step, check_text, runs, spans
from sleb.pruning.run import PrunableModel
from sleb.pruning.tokens import gather_tokens

__all__ = ["PatchReport", "patch", "run_patching"]


@dataclass(frozen=True)
class PatchReport:
    """The map with its patches, these, the parameters of a block, and how long fitting and measuring took."""

    layer_map: LayerMap
    patches: Patches
    block_size: int
    seconds: float


@takes_options(PatchOptions, first="model")
def patch(model: str | os.PathLike[str] | PrunableModel, options: PatchOptions) -> LayerMap:
    """Fit patches to the removals of a layer map; the map with them, and with losses measured with them.

    `model` is what the engine loads or a loaded model; the other arguments are the fields of `PatchOptions`, the map
    first. Raises ConfigError, ModelError, LayerMapError or SlebError.
    """
    return run_patching(model, options).layer_map


def run_patching(
    model: str | os.PathLike[str] | PrunableModel,
    options: PatchOptions,
    *,
    progress: Callable[[str, float], None] = lambda what, share: None,
    on_generate: Callable[[float], None] = lambda share: None,
    note: Callable[[str], None] = lambda message: None,
) -> PatchReport:
    """`patch` with what there is to tell. progress: what is under way, and how much of all is done, 0 to 1;
    on_generate: how much of a text that the model writes; note: remarks for people. Whatever ends it, the output is
    written whole or is as it was."""
    options.check()
    what = parse_patch(options.patch)
    assert what is not None
    layer_map = (
        options.layer_map if isinstance(options.layer_map, LayerMap) else LayerMap.find(options.layer_map)
    )
    depths = _depths(layer_map, options.depths)
    path = None if options.output is None else Path(options.output)
    if path is not None:
        check_writable(path)
        if path.exists() and not options.force:
            raise ConfigError(f"output {path} exists: replace it with --force, or name another")
    set_threads(options.threads)
    scorer = _load(model, options, layer_map)
    tokens, held_out = gather_tokens(model, scorer, options, note=note, on_generate=on_generate)
    if (advice := check_text(scorer, what, tokens.windows)) is not None:
        note(advice)
    if options.losses and not held_out:
        note(
            "no held-out text: the losses are those of the text that the patches are fitted to, which flatters"
        )
    started = time.monotonic()
    run = _Run(scorer, layer_map, options, progress)
    patched = run.patched(what, depths, [tokens, *held_out])
    if path is not None:
        patched.save(path)
    assert patched.patches is not None
    return PatchReport(patched, patched.patches, scorer.num_parameters(Unit(0)), time.monotonic() - started)


class _Run:
    """One fit. Texts are passed one after the other, so that one's hidden states are in memory at a time."""

    def __init__(
        self,
        scorer: PrunableModel,
        layer_map: LayerMap,
        options: PatchOptions,
        progress: Callable[[str, float], None],
    ) -> None:
        self._scorer, self._layer_map, self._options = scorer, layer_map, options
        self._progress = progress
        self._doing, self._done, self._total = "", 0, 1

    def patched(self, what: PatchForm, depths: Sequence[int], texts: Sequence[Calibration]) -> LayerMap:
        """texts: the one to fit to, then those that are held out."""
        layer_map, judged = self._layer_map, texts[min(1, len(texts) - 1)]
        models: list[tuple[Step, ...]] = []
        found: list[TextLosses] = []
        unpatched: TextLosses | None = None
        for text in texts:
            states = States(self._scorer, text.windows, on_windows=self._count)
            if text is texts[0]:
                self._total = self._num_windows(depths, texts, len(judged.windows))
                models, losses = self._fit(states, what, depths)
            else:
                losses = self._losses(states, models, f"measuring {text.record.source}")
            record = replace(text.record, dtype=self._options.dtype)
            found.append(TextLosses(record, losses))
            if text is judged and losses:
                unpatched = TextLosses(record, self._unpatched(states, models, losses))
        first, *held_out = found
        return replace(
            layer_map,
            calibration=first.record,
            losses=first.losses or None,
            candidate_losses=None,  # of a search that judged otherwise
            held_out=tuple(held_out),
            patches=Patches.of(spans(models), PatchRecord(what.form, what.rank, RIDGE, first.record)),
            unpatched=unpatched,
        )

    def _fit(
        self, states: States, what: PatchForm, depths: Sequence[int]
    ) -> tuple[list[tuple[Step, ...]], tuple[float, ...]]:
        """What runs at every depth, and its loss, if it is wanted, on the text that patches are fitted to."""
        removed = self._layer_map.removed
        patcher = Patcher(self._scorer, states, what)
        models: list[tuple[Step, ...]] = []
        losses: tuple[float, ...] = ()
        for depth in range(len(removed) + 1):
            doing = f"depth {depth} of {len(removed)}"
            self._doing = f"fitting {doing}"
            models.append(patcher.steps(removed[:depth], depth, patched=depth in depths))
            if self._options.losses:
                losses += self._losses(states, models[-1:], f"measuring {doing}")
        return models, losses

    def _unpatched(
        self, states: States, models: Sequence[tuple[Step, ...]], losses: tuple[float, ...]
    ) -> tuple[float, ...]:
        """The losses without patches, given those with them: the same where there are none."""
        bare = [tuple(step for step in model if not isinstance(step, Patch)) for model in models]
        return tuple(
            loss if without == model else self._losses(states, [without], "measuring without patches")[0]
            for without, model, loss in zip(bare, models, losses, strict=True)
        )

    def _losses(self, states: States, models: Sequence[tuple[Step, ...]], doing: str) -> tuple[float, ...]:
        self._doing = doing
        losses = tuple(map(states.loss, models))
        if not all(map(math.isfinite, losses)):
            raise SlebError(
                "the loss is not a finite number: fit with --dtype float32, and check the checkpoint"
            )
        return losses

    def _num_windows(self, depths: Sequence[int], texts: Sequence[Calibration], judged: int) -> int:
        """That will be passed by all fits and losses."""
        removed = self._layer_map.removed
        fitted = {run for depth in depths for run in runs(removed[:depth])}
        lengths = [len(text.windows) for text in texts]
        if not self._options.losses:
            return lengths[0] * len(fitted)
        return lengths[0] * len(fitted) + sum(lengths) * (len(removed) + 1) + judged * len(depths)

    def _count(self, num_windows: int) -> None:
        self._done += num_windows
        self._progress(self._doing, self._done / self._total)


def _depths(layer_map: LayerMap, wanted: Sequence[int] | None) -> Sequence[int]:
    """Those whose patches are fitted. Raises ConfigError for one that the map lacks, or a map without removals."""
    if not layer_map.max_depth:
        raise ConfigError(
            f"the layer map of {shown_path(layer_map.model)} removes nothing that a patch could mend"
        )
    for depth in wanted or ():
        if depth > layer_map.max_depth:
            raise ConfigError(
                f"depth {depth} is not there: the layer map has depths 0 to {layer_map.max_depth}"
            )
    return sorted(set(wanted or range(1, layer_map.max_depth + 1)))


def _load(
    model: str | os.PathLike[str] | PrunableModel, options: PatchOptions, layer_map: LayerMap
) -> PrunableModel:
    if not isinstance(model, str | os.PathLike):
        layer_map.check_model(
            num_blocks=model.num_blocks, fingerprint=model.fingerprint, model=model.model_name
        )
        return model
    from sleb.engine.model.scoring import DecoderScorer

    name = os.fspath(model)
    return DecoderScorer.load(
        name,
        dtype=options.dtype,
        device=options.device,
        check=lambda spec: layer_map.check_model(
            num_blocks=spec.num_blocks, fingerprint=spec.fingerprint, model=name, parallel=spec.parallel
        ),
    )

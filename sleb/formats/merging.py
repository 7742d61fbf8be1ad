"""Patches merged into the output projections of the MLPs before them, for formats that have no place for a patch.

As ReplaceMe does (arXiv 2505.02819), but on the neurons instead of on what the projection makes of them: on the same
tokens, let z be the neurons of the last MLP before a run in the merged model so far, h the residual behind it, and y
that of the patched model behind the run's patch. The projection gets D + Δ, and c where it has a bias, of the ridge
regression of y − h on z. A patch reads the whole residual stream, and an MLP's neurons do not know all of it: what is
lost is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sleb.engine.memory import check_fits
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.scoring import DecoderScorer
from sleb.errors import ConfigError
from sleb.formats.patched import biases_field, no_room
from sleb.formats.removal import Mending, Removal
from sleb.layer_map.patches import Array, Patch
from sleb.layer_map.units import Unit
from sleb.models.families import FAMILIES
from sleb.pruning.options import TextOptions
from sleb.pruning.patching import Moments, fit
from sleb.pruning.search.model import DEFAULT_MEMORY_BOUND
from sleb.pruning.tokens import gather_tokens


def merge_patches(
    model: str,
    removal: Removal,
    options: TextOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    notation: str = "hf",
) -> Mending:
    """The patches of the depth merged on the calibration text of `options`; `progress` counts blocks.

    notation: of the export: in a GGUF file fewer families have biases.

    Raises ConfigError for a patch that no block stands before, for a model whose MLPs do not add to the residual stream
    alone, or for want of memory.
    """
    patches = removal.mending.patches
    before = _places(removal, patches)
    specs: list[DecoderSpec] = []
    scorer = DecoderScorer.load(model, options.dtype, options.device, check=specs.append)
    [spec] = specs
    if lack := no_room(spec, plain=notation == "gguf"):
        raise ConfigError(f"{lack} in {spec.architecture}: use --patches drop")
    tokens, _ = gather_tokens(
        model, scorer, options, note=lambda message: None, on_generate=lambda share: None
    )
    _check_memory(spec, tokens.windows)
    gguf = FAMILIES[spec.architecture].gguf
    may = bool(biases_field(spec)) and (notation != "gguf" or (gguf is not None and "mlp" in gguf.biases))
    merger = Merger(scorer, tokens.windows, bias=spec.mlp_bias or may, scale=spec.residual_scale)
    for done, block in enumerate(removal.kept_blocks):
        progress(done, len(removal.kept_blocks))
        merger.run(block, before.get(block, ()))
    names = {"weight": f"{spec.names.down}.weight", "bias": f"{spec.names.down}.bias"}
    merged = {
        block: {
            names[name]: array.T if spec.transposed and name == "weight" else array
            for name, array in tensors.items()
        }
        for block, tensors in merger.merged.items()
    }
    return replace(removal.mending, merged=merged, calibration=tokens.record, losses=merger.losses())


def _places(removal: Removal, patches: Sequence[Patch]) -> dict[int, tuple[Patch, ...]]:
    """The patches that go into each block."""
    places: dict[int, tuple[Patch, ...]] = {}
    for patch in patches:
        block = max((each for each in removal.kept_blocks if each < patch.first[0]), default=None)
        if block is None:
            raise ConfigError(f"{patch.where} has no block before it to be merged into: use --patches drop")
        places[block] = (*places.get(block, ()), patch)
    return places


def _check_memory(spec: DecoderSpec, windows: Tensor) -> None:
    states = 3 * windows.numel() * spec.hidden_size * 4
    moments = 3 * spec.intermediate_size * (spec.intermediate_size + spec.hidden_size) * 8
    remedy = "take fewer or shorter --windows, or --patches drop"
    check_fits("merging patches takes", states + moments, torch.device("cpu"), remedy, ConfigError)


@dataclass
class _Batch:
    """Hidden states of some windows in the patched and in the merged model."""

    tokens: Tensor
    patched: Tensor
    merged: Tensor


class Merger:
    """Walks the patched model and the one without patches side by side.

    scale: the factor on what a sublayer adds. Attributes: merged: for each block that has taken patches in, weight
    [E, I] and, with `bias`, bias [E].
    """

    def __init__(self, model: DecoderScorer, windows: Tensor, *, bias: bool, scale: float = 1.0) -> None:
        self._model, self._bias, self._scale = model, bias, scale
        size = max(1, DEFAULT_MEMORY_BOUND // (16 * model.hidden_size * windows.shape[1]))
        self._batches = [
            _Batch(each, hidden, hidden) for each in windows.split(size) for hidden in [model.embed(each)]
        ]
        self.merged: dict[int, dict[str, Array]] = {}

    @torch.no_grad()
    def run(self, block: int, patches: Sequence[Patch]) -> None:
        """Runs a block in both models; where patches follow, their effect goes into its output projection."""
        model, attention, mlp = self._model, Unit(block, "attention"), Unit(block, "mlp")
        moments = Moments()
        for batch in self._batches:
            batch.patched = model.run(Unit(block), batch.patched)
            batch.merged = model.run(attention, batch.merged)
            if not patches:
                batch.merged = model.run(mlp, batch.merged)
                continue
            for patch in patches:
                batch.patched = model.apply(patch, batch.patched)
            missing = (batch.patched - model.run(mlp, batch.merged)) / self._scale
            moments.add(model.neurons(block, batch.merged), missing)
        if not patches:
            return
        if not self._bias:
            _about_zero(moments)
        change = fit(moments, "full")
        weight, bias = (torch.from_numpy(change[name]) for name in ("weight", "bias"))
        for batch in self._batches:
            added = model.neurons(block, batch.merged) @ weight.to(model.device).T + bias.to(model.device)
            batch.merged = model.run(mlp, batch.merged) + self._scale * added
        old, constant = model.output_projection(block)
        self.merged[block] = {"weight": (old.cpu() + weight).numpy()}
        if self._bias:
            self.merged[block]["bias"] = (bias if constant is None else constant.cpu() + bias).numpy()

    @torch.no_grad()
    def losses(self) -> tuple[float, float]:
        """Mean cross-entropy a token, in nats: of the patched and of the merged model."""
        sums, count = [0.0, 0.0], 0
        for batch in self._batches:
            for index, hidden in enumerate((batch.patched, batch.merged)):
                sums[index] += float(self._model.token_losses(hidden, batch.tokens).double().sum())
            count += batch.tokens[:, 1:].numel()
        return sums[0] / count, sums[1] / count


def _about_zero(moments: Moments) -> None:
    """Makes centred moments those about zero: what is fitted to them has no constant."""
    moments.gram += moments.count * torch.outer(moments.features, moments.features)
    moments.cross += moments.count * torch.outer(moments.features, moments.targets)
    moments.features, moments.targets = moments.features * 0, moments.targets * 0

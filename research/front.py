"""Fronts of quality against cost: layer maps of one model, found with different units, side by side.

    python research/front.py MODEL --maps blocks.json,sublayers.json,attention.json --json FILE --plot NAME

Perplexities are those that `sleb prune` wrote into the maps (of the first held-out text, where all have one), so the
maps must have been searched on the same tokens. Depths of different units do not compare, so each depth has its share
of the blocks' parameters, of the KV cache, and the speedup of a decoding step that a cost model predicts, fitted in
this run (`sleb.pruning.cost_model`); `sleb bench throughput --layer-map FILE` measures it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path

from common import run

from sleb.benchmarks.environment import describe_machine, shown_command
from sleb.benchmarks.plots import Panel, Point, draw_lines
from sleb.benchmarks.record import Measurement, Result
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import Model
from sleb.engine.config import EngineConfig
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.model.resolve import resolve_device, resolve_dtype
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.models.resolve import resolve_model
from sleb.options import option, option_of
from sleb.pruning.cost_model import CostModel, fit_cost_model


@dataclass(frozen=True)
class Options:
    """What to compare."""

    maps: Sequence[Path] = option(MISSING, "Layer maps that sleb prune wrote.", commas=True, metavar="FILE")
    batch: int = option(1, "Requests of a decoding step.", minimum=1)
    dtype: str = option_of(EngineConfig, "dtype")
    device: str = option_of(EngineConfig, "device")
    plot: Path | None = option(None, "Draw to this name with .png and .svg.")


def load_maps(paths: Sequence[Path]) -> dict[str, LayerMap]:
    """By the names of the files. Raises ConfigError for maps that do not compare."""
    maps = {path.stem: LayerMap.load(path) for path in paths}
    tokens = {each.calibration.token_hash for each in maps.values() if each.calibration and each.losses}
    if len(tokens) != 1 or len(maps) < len(paths) or any(each.losses is None for each in maps.values()):
        raise ConfigError(
            f"--maps {', '.join(maps)} do not compare: give files of different names that sleb prune wrote, searched "
            "with the same --calibration, --seqlen and --windows"
        )
    return maps


def front(
    name: str, layer_map: LayerMap, spec: DecoderSpec, cost: CostModel, held_out: bool
) -> Iterator[Measurement]:
    """Every depth of a map."""
    hidden = spec.hidden_size
    weights = {
        "attention": 2 * hidden * (spec.query_size + spec.kv_size),
        "mlp": (3 if spec.gated else 2) * hidden * spec.intermediate_size,
    }
    total = spec.num_blocks * sum(weights.values())
    for depth in range(layer_map.max_depth + 1):
        gone = layer_map.removed[:depth]
        parts = [part for unit in gone for _, part in unit.sublayers]
        facts = {
            "predicted ×": cost.speedup(gone, layer_map.num_patch_parameters(depth)),
            "of parameters removed": sum(weights[part] for part in parts) / total,
            "of KV removed": parts.count("attention") / spec.num_blocks,
        }
        metric, text = "calibration perplexity", layer_map.calibration_losses
        if held_out:
            metric, text = "held-out perplexity", layer_map.held_out[0]
        yield Measurement(name, f"depth {depth}", metric, text.perplexity(depth), facts=facts)


def draw(result: Result, stem: Path) -> None:
    """Perplexity against the predicted speedup, one line a map."""
    lines: dict[str, list[Point]] = {}
    for each in result.measurements:
        lines.setdefault(each.case, []).append((each.facts["predicted ×"], each.value, None))
    title = f"{result.settings['model']}: what to remove for a speedup"
    x_label = "speedup of a decoding step, predicted (higher is better)"
    draw_lines(stem, "", [Panel(title, "perplexity (lower is better)", lines, x_label)], (".png", ".svg"))


def main(model: Model, options: Options, output: OutputOptions) -> None:
    """Compare layer maps of different units: perplexity against parameters, KV cache and speedup."""
    maps = load_maps(options.maps)
    resolved = resolve_model(model)
    spec = resolve_spec(resolved.path)
    cost = fit_cost_model(model, batch=options.batch, dtype=options.dtype, device=options.device)
    held_out = all(each.held_out for each in maps.values())
    device, dtype = (
        resolve_device(options.device),
        resolve_dtype(options.dtype, "auto", spec.checkpoint_dtype),
    )
    environment = describe_machine(device, dtype, "", shown_command(sys.argv, model))
    settings = {"model": resolved.name, "batch": options.batch, "cost_model": asdict(cost)}
    found = [each for name, one in maps.items() for each in front(name, one, spec, cost, held_out)]
    result = Result("fronts", environment, settings, found)
    if options.plot is not None:
        draw(result, options.plot)
    output.show(result)


if __name__ == "__main__":
    run(main)

"""Fronts of quality against cost: layer maps of one model, found with different units, side by side.

    python research/front.py MODEL --maps blocks.json,sublayers.json,attention.json --json FILE --plot NAME

Perplexities are those that `sleb prune` wrote into the maps (of the held-out text, where all maps have one), so the
maps must have been searched on the same tokens. Depths of different units do not compare, so each depth has its share
of the blocks' parameters, of the KV cache, and the speedup of a decoding step that a cost model predicts, fitted in
this run (`sleb.pruning.cost_model`). Some depths of every map are measured too, in turns with the whole model, to
check it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Any

from common import run, say

from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.plots import Panel, Point, draw_lines
from sleb.benchmarks.record import Measurement, Result
from sleb.benchmarks.throughput import decode_seconds, greedy_params, plain_token_ids
from sleb.benchmarks.turns import Case, Run, TurnOptions, Turns, measure
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import Model
from sleb.engine.config import EngineConfig
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import DecoderSpec
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.options import option, option_of
from sleb.pruning.cost_model import CostModel, fit_cost_model

_PROMPT_TOKENS, _OUTPUT_TOKENS = 64, 64


@dataclass(frozen=True)
class Options:
    """What to compare."""

    maps: Sequence[Path] = option(MISSING, "Layer maps that sleb prune wrote.", commas=True, metavar="FILE")
    batch: int = option(1, "Requests of a decoding step.", minimum=1)
    measure: int = option(3, "Depths of each map that are measured; 0: none.", minimum=0)
    dtype: str = option_of(EngineConfig, "dtype")
    device: str = option_of(EngineConfig, "device")
    plot: Path | None = option(None, "Draw to this name with .png and .svg.")


def load_maps(paths: Sequence[Path]) -> dict[str, LayerMap]:
    """By the names of the files. Raises ConfigError for maps that do not compare."""
    maps = {path.stem: LayerMap.load(path) for path in paths}
    if len(maps) < len(paths) or not maps:
        raise ConfigError(
            "--maps takes files of different names, one or more; the table tells them by their names"
        )
    for name, layer_map in maps.items():
        if layer_map.losses is None or layer_map.calibration is None:
            raise ConfigError(f"{name} has no losses, so it has no front; take a map of sleb prune")
    if len({each.calibration.token_hash for each in maps.values() if each.calibration}) > 1:
        raise ConfigError(
            f"the maps {', '.join(maps)} were searched on different tokens, so their perplexities do not compare; "
            "search with the same --calibration, --seqlen and --windows"
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
    for depth in range(layer_map.max_depth + 1):
        gone = layer_map.removed[:depth]
        parts = [part for unit in gone for _, part in unit.sublayers]
        facts = {
            "predicted ×": cost.speedup(gone),
            "of parameters removed": sum(weights[part] for part in parts)
            / (spec.num_blocks * sum(weights.values())),
            "of KV removed": parts.count("attention") / spec.num_blocks,
        }
        metric = "held-out perplexity" if held_out else "perplexity"
        value = layer_map.perplexity(depth, held_out=held_out)
        yield Measurement(name, f"depth {depth}", metric, value, facts=facts)


def measure_speed(llm: LLM, name: str, options: Options, turns: TurnOptions, depths: Sequence[int]) -> Turns:
    """Decoding at `depths` in turns with the whole model."""
    token_ids, params = plain_token_ids(llm.engine), greedy_params(_OUTPUT_TOKENS)

    def decode(depth: int) -> Run:
        def once(turn: int) -> Mapping[str, float]:
            rng = random.Random(f"{turns.seed} {turn}")
            prompts = [rng.choices(token_ids, k=_PROMPT_TOKENS) for _ in range(options.batch)]
            seconds = decode_seconds(llm.engine, prompts, params, depth)
            return {"tokens/s": options.batch * (_OUTPUT_TOKENS - 1) / seconds}

        return once

    case = Case(name, {f"depth {depth}": decode(depth) for depth in depths}, "depth 0")
    return measure([case], turns, on_turn=lambda found, case: say(found.line(case)))


def draw(result: Result, stem: Path) -> None:
    """Perplexity against the predicted speedup, one line a map."""
    lines: dict[str, list[Point]] = {}
    for each in result.measurements:
        if each.metric.endswith("perplexity"):
            lines.setdefault(each.case, []).append((each.facts["predicted ×"], each.value, None))
    panel = Panel(
        f"{result.settings['model']}: what to remove for a speedup",
        "perplexity (lower is better)",
        lines,
        "speedup of a decoding step, predicted (higher is better)",
    )
    draw_lines(stem, "", [panel], (".png", ".svg"))


def main(model: Model, options: Options, turns: TurnOptions, output: OutputOptions) -> None:
    """Compare layer maps of different units: perplexity against parameters, KV cache and speedup."""
    maps = load_maps(options.maps)
    engine: dict[str, Any] = {"dtype": options.dtype, "device": options.device}
    cost = fit_cost_model(model, batch=options.batch, **engine)
    held_out = all(each.perplexity(0, held_out=True) is not None for each in maps.values())
    result = Result("fronts", {}, {"batch": options.batch, "cost_model": asdict(cost)})
    for name, layer_map in maps.items():
        places = range(1, options.measure + 1)
        depths = tuple(
            dict.fromkeys([0, *(layer_map.max_depth * place // options.measure for place in places)])
        )
        llm = LLM(
            model,
            layer_map,
            depths,
            max_model_len=_PROMPT_TOKENS + _OUTPUT_TOKENS,
            max_num_seqs=options.batch,
            max_num_batched_tokens=max(options.batch, min(options.batch * _PROMPT_TOKENS, 2048)),
            prefix_caching=False,
            **engine,
        )
        result.environment = result.environment or describe_environment(
            llm.engine, shown_command(sys.argv, model)
        )
        result.settings["model"] = llm.engine.model_name
        result.measurements += front(name, layer_map, llm.engine.spec, cost, held_out)
        if len(depths) > 1:
            found = measure_speed(llm, name, options, turns, depths)
            result.measurements += found.measurements()
            result.complete = found.complete
        if not result.complete:
            break
    if options.plot is not None and result.complete:
        draw(result, options.plot)
    output.show(result)


if __name__ == "__main__":
    run(main)

"""Fronts of quality against cost: layer maps of one model, found with different units, side by side.

    sleb bench fronts MODEL blocks.json sublayers.json attention.json --json FILE --plot NAME

Perplexities are those that `sleb prune` wrote into the maps (of the held-out text, where all maps have one), so the
maps must have been searched on the same tokens. Depths of different units do not compare, so each depth has its share
of the blocks' parameters, of the KV cache, and the speedup of a decoding step that a cost model predicts, fitted in
this run (`sleb.pruning.cost_model`). Some depths of every map are measured
too, in turns with the whole model, to check it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.harness import MOST_REPETITIONS, Progress, Samples, measure
from sleb.benchmarks.plots import plot_lines
from sleb.benchmarks.report import widen
from sleb.benchmarks.throughput import MAX_STEP_TOKENS, decode_seconds, greedy_params, plain_token_ids
from sleb.engine.llm import LLM
from sleb.engine.model.architecture import DecoderSpec
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.pruning.cost_model import CostModel, fit_cost_model

_PROMPT_TOKENS = 64


@dataclass(frozen=True)
class FrontsOptions:
    """What to compare.

    Attributes:
        maps: by the name that the table and the plot give them.
        batch: requests of a decoding step. measure: how many depths of each map are measured; 0: none.
    """

    model: str
    maps: Mapping[str, LayerMap]
    batch: int = 1
    measure: int = 3
    output_tokens: int = 64
    repetitions: int = 7
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def check(self) -> None:
        """ConfigError for maps that do not compare and numbers out of range."""
        if not self.maps:
            raise ConfigError("name at least one layer map")
        for name, value, least in (
            ("--batch", self.batch, 1), ("--measure", self.measure, 0),
            ("--output-tokens", self.output_tokens, 2), ("--repetitions", self.repetitions, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name} is {value}; it must be {least} or more")
        if self.repetitions > MOST_REPETITIONS:
            raise ConfigError(f"--repetitions is {self.repetitions}; it must be at most {MOST_REPETITIONS:,}")
        for name, layer_map in self.maps.items():
            if layer_map.losses is None or layer_map.calibration is None:
                raise ConfigError(f"{name} has no losses, so it has no front; take a map of sleb prune")
        hashes = {each.calibration.token_hash for each in self.maps.values() if each.calibration}
        if len(hashes) > 1:
            raise ConfigError(
                f"the maps {', '.join(self.maps)} were searched on different tokens, so their perplexities do not "
                "compare; search with the same --calibration, --seqlen and --windows"
            )


@dataclass(frozen=True)
class FrontRow:
    """One depth of a map. Shares are of what is removed; measured_*: None where the depth was not measured."""

    map: str
    depth: int
    removed: str | None
    parameters_removed: float
    kv_removed: float
    perplexity: float | None
    held_out_perplexity: float | None
    predicted_speedup: float
    measured_speedup: float | None = None
    measured_low: float | None = None
    measured_high: float | None = None
    measured_samples: tuple[float, ...] = ()


def run_fronts(
    options: FrontsOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Fits the cost model, measures, and gives the result file. Raises SlebError; Ctrl-C keeps complete maps."""
    options.check()
    cost = fit_cost_model(
        options.model, dtype=options.dtype, device=options.device, batch=options.batch,
        on_progress=lambda share: on_progress(Progress(int(share * 100), 100, "fitting the cost model")),
    )  # fmt: skip
    rows: list[FrontRow] = []
    environment: dict[str, Any] = {}
    name = ""
    complete = True
    for label, layer_map in options.maps.items():
        depths = measured_depths(layer_map, options.measure)
        llm = _load(options, layer_map, depths)
        name = llm.engine.model_name
        environment = environment or describe_environment(llm.engine, shown_command(command, options.model))
        found = front_rows(label, layer_map, llm.engine.spec, cost)
        try:
            rows += _measured(llm, options, label, depths, found, on_progress)
        except KeyboardInterrupt:
            complete = False
            break
    settings = {key: value for key, value in vars(options).items() if key not in ("model", "maps")}
    return {
        "kind": "fronts",
        "environment": environment,
        "model": name,
        "settings": settings,
        "maps": {label: _describe(layer_map) for label, layer_map in options.maps.items()},
        "cost_model": asdict(cost),
        "rows": [asdict(row) for row in rows],
        "complete": complete,
    }


def _describe(layer_map: LayerMap) -> dict[str, Any]:
    return {
        "removed": [str(unit) for unit in layer_map.removed],
        "search": None if layer_map.search is None else asdict(layer_map.search),
        "calibration": None if layer_map.calibration is None else asdict(layer_map.calibration),
        "held_out": None if layer_map.held_out is None else asdict(layer_map.held_out),
    }


def measured_depths(layer_map: LayerMap, count: int) -> tuple[int, ...]:
    """Depth 0 and `count` depths at equal distances, the deepest among them."""
    deepest = layer_map.max_depth
    return tuple(dict.fromkeys([0, *(deepest * place // count for place in range(1, count + 1))]))


def front_rows(label: str, layer_map: LayerMap, spec: DecoderSpec, cost: CostModel) -> list[FrontRow]:
    """Every depth of a map, nothing measured yet."""
    weights = sublayer_parameters(spec)
    whole = spec.num_blocks * sum(weights.values())
    rows = []
    for depth in range(layer_map.max_depth + 1):
        gone = layer_map.removed[:depth]
        parts = [part for unit in gone for _, part in unit.sublayers]
        rows.append(
            FrontRow(
                map=label,
                depth=depth,
                removed=str(gone[-1]) if gone else None,
                parameters_removed=sum(weights[part] for part in parts) / whole,
                kv_removed=parts.count("attention") / spec.num_blocks,
                perplexity=layer_map.perplexity(depth),
                held_out_perplexity=layer_map.perplexity(depth, held_out=True),
                predicted_speedup=cost.speedup(gone),
            )
        )
    return rows


def sublayer_parameters(spec: DecoderSpec) -> dict[str, int]:
    """Weights of the matrices of one attention and one MLP."""
    hidden = spec.hidden_size
    return {
        "attention": 2 * hidden * (spec.query_size + spec.kv_size),
        "mlp": (3 if spec.gated else 2) * hidden * spec.intermediate_size,
    }


def _load(options: FrontsOptions, layer_map: LayerMap, depths: Sequence[int]) -> LLM:
    return LLM(
        options.model, layer_map, depths, dtype=options.dtype, device=options.device, seed=options.seed,
        max_model_len=_PROMPT_TOKENS + options.output_tokens, max_num_seqs=options.batch,
        # As many prompts in a step as `sleb bench throughput` has, so that most steps decode all requests.
        max_num_batched_tokens=max(options.batch, min(options.batch * _PROMPT_TOKENS, MAX_STEP_TOKENS)),
        prefix_caching=False,
    )  # fmt: skip


def _measured(
    llm: LLM,
    options: FrontsOptions,
    label: str,
    depths: Sequence[int],
    rows: Sequence[FrontRow],
    on_progress: Callable[[Progress], None],
) -> list[FrontRow]:
    """The rows, those of `depths` with the speedup of their decoding steps."""
    if len(depths) < 2:
        return list(rows)
    samples: Samples[str] = {}
    token_ids = plain_token_ids(llm.engine)

    def prepare(workload: str, repetition: int) -> Callable[[int], float | None]:
        rng = random.Random(f"{options.seed} {repetition}")
        prompts = [rng.choices(token_ids, k=_PROMPT_TOKENS) for _ in range(options.batch)]
        params = greedy_params(options.output_tokens)
        return lambda depth: decode_seconds(llm.engine, prompts, params, depth)

    measure(
        prepare, [label], depths, options.repetitions, options.seed, samples, on_progress=on_progress
    )  # fmt: skip
    ratios = {depth: [times[0] / times[depth] for times in samples[label]] for depth in depths if depth}
    return [
        replace(
            row,
            measured_speedup=median(ratios[row.depth]),
            measured_low=min(ratios[row.depth]),
            measured_high=max(ratios[row.depth]),
            measured_samples=tuple(ratios[row.depth]),
        )
        if row.depth in ratios
        else row
        for row in rows
    ]


def print_fronts(result: Mapping[str, Any], console: Console) -> None:
    """A table, and what its columns mean."""
    widen(console)
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("map")
    for heading in (
        "depth", "parameters", "KV", "perplexity", "held out", "speedup, predicted", "measured", "low–high",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    previous = ""
    for row in result["rows"]:
        if previous and previous != row["map"]:
            table.add_section()
        table.add_row("" if previous == row["map"] else row["map"], *_cells(row))
        previous = row["map"]
    console.print(table)
    console.print(
        "parameters: of the blocks' weights, removed. KV: of the cache, saved. speedup: of a decoding step of "
        f"{result['settings']['batch']} requests over the whole model.",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    measured = row["measured_speedup"] is not None
    return [
        str(row["depth"]),
        f"−{row['parameters_removed']:.1%}" if row["depth"] else "",
        f"−{row['kv_removed']:.1%}" if row["kv_removed"] else "",
        *("" if row[key] is None else f"{row[key]:.2f}" for key in ("perplexity", "held_out_perplexity")),
        f"{row['predicted_speedup']:.3f}",
        f"{row['measured_speedup']:.3f}" if measured else "",
        f"{row['measured_low']:.3f}–{row['measured_high']:.3f}" if measured else "",
    ]


def plot_fronts(result: Mapping[str, Any], stem: Path) -> None:
    """Perplexity against the predicted speedup, one line a map, held out where all rows have it."""
    rows = result["rows"]
    held_out = all(row["held_out_perplexity"] is not None for row in rows)
    key = "held_out_perplexity" if held_out else "perplexity"
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row[key] is not None:
            lines.setdefault(row["map"], []).append((row["predicted_speedup"], row[key]))
    plot_lines(
        stem,
        lines,
        title=f"{result['model']}: what to remove for a speedup",
        x_label="speedup of a decoding step, predicted (higher is better)",
        y_label=f"perplexity of {'a held-out' if held_out else 'the calibration'} text (log, lower is better)",
        log_y=True,
    )

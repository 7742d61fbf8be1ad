"""The settings of the SLEB paper's section on speed, and the rows of its tables (arXiv 2402.09025).

The paper measures LLaMA-2-70B on two A100: the latency of a prompt of 2,048 tokens, and the throughput of 64 prompts
with 128 new tokens each. Here those prompts have 64 tokens, as in every "generate".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks.results import Row
from sleb.benchmarks.workloads import ThroughputOptions
from sleb.errors import ConfigError
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.units import Unit

SOURCE = "Song et al. 2024, SLEB, arXiv 2402.09025"
MODEL, HARDWARE = "LLaMA-2-70B", "two A100"
# Shares of the blocks that the paper's SLEB rows remove.
SHARES = (0.1, 0.2)
_SETTINGS: dict[str, Any] = {
    "tests": ("prompt", "generate"),
    "batches": (64,),
    "prompt_tokens": None,  # 2,048, or what the model holds, and 64
    "output_tokens": 128,
    "contexts": None,
}


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's tables. removed: its "sparsity". Speedups as printed there."""

    method: str
    removed: str
    latency_ms: float
    latency_speedup: float
    tokens_per_second: float
    throughput_speedup: float


ROWS = (
    PaperRow("dense", "0%", 1718.4, 1.00, 299, 1.00),
    PaperRow("Wanda", "2:4 (50%)", 1555.5, 1.10, 293, 0.98),
    PaperRow("DSnoT", "2:4 (50%)", 1555.5, 1.10, 293, 0.98),
    PaperRow("LLM-Pruner", "20%", 1534.3, 1.12, 314, 1.05),
    PaperRow("SliceGPT", "20%", 1658.7, 1.04, 314, 1.05),
    PaperRow("SliceGPT", "25%", 1440.7, 1.19, 331, 1.11),
    PaperRow("SliceGPT", "30%", 1364.2, 1.26, 343, 1.15),
    PaperRow("SLEB", "10%", 1529.1, 1.12, 336, 1.12),
    PaperRow("SLEB", "20%", 1364.1, 1.26, 381, 1.27),
)


def with_paper_settings(options: ThroughputOptions) -> ThroughputOptions:
    """The options with the paper's workloads, where they ask for it. Raises ConfigError if they set those too."""
    if not options.paper:
        return options
    defaults = ThroughputOptions()
    for name in ("depths", *_SETTINGS):
        if _plain(getattr(options, name)) != _plain(getattr(defaults, name)):
            option = "--context" if name == "contexts" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"--paper sets {option} itself, as the paper has it; leave one of the two out")
    return replace(options, **_SETTINGS)


def _plain(values: Sequence[Any] | int | None) -> tuple[Any, ...] | None:
    if values is None or isinstance(values, int):
        return None if values is None else (values,)
    return tuple(values)


def paper_depths(layer_map: LayerMap) -> tuple[int, ...]:
    """Depth 0 and those that remove 10 % and 20 % of the blocks, without the shares that `missing_shares` tells.

    Of a map whose units are parts of blocks, the depth that removes as many attentions and MLPs together.
    """
    found = [_depth_of(share, layer_map) for share in SHARES]
    return tuple(dict.fromkeys([0, *(depth for depth in found if depth is not None)]))


def missing_shares(layer_map: LayerMap) -> list[str]:
    """A sentence for each share that has no depth."""
    sentences = []
    for share in SHARES:
        if _depth_of(share, layer_map) is not None:
            continue
        reason = f"of {layer_map.num_blocks} blocks it is none."
        if wanted := _num_blocks(share, layer_map):
            reason = f"the layer map removes fewer than {wanted} of {layer_map.num_blocks}; give a longer --layer-map."
        sentences.append(f"The paper's {share:.0%} of the blocks is not measured: {reason}")
    return sentences


def _num_blocks(share: float, layer_map: LayerMap) -> int:
    return round(share * layer_map.num_blocks)


def _depth_of(share: float, layer_map: LayerMap) -> int | None:
    """The first depth that removes the share; None where it is no block, or the map does not reach it."""
    wanted, removed = 2 * _num_blocks(share, layer_map), 0
    for depth, unit in enumerate(layer_map.removed, 1):
        removed += len(unit.sublayers)
        if removed >= wanted > 0:
            return depth
    return None


def describe_paper() -> dict[str, Any]:
    """The object "paper" of a result."""
    return {"source": SOURCE, "model": MODEL, "hardware": HARDWARE, "rows": [asdict(row) for row in ROWS]}


def print_paper(rows: Sequence[Row], model: Mapping[str, Any], where: str, console: Console) -> None:
    """A table for each of the paper's two: first the depths measured here, then the paper's rows, marked as such.

    model: the object of that name in a result. where: the machine, in words.
    """

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for test in ("prompt", "generate"):
        measured = [row for row in rows if row.test == test and row.variant.startswith("depth")]
        if measured:
            say(_title(measured[0]))
            console.print(_table(test, measured, model))
    for note in (
        f"here: {model['name']} on {where}, measured in this run.",
        f"paper: {MODEL} on {HARDWARE}, printed in {SOURCE}; nothing of it was measured here. Times and tokens/s "
        "compare two models and machines; only speedups say something about both.",
    ):
        say(note)


def _title(row: Row) -> str:
    if row.test == "prompt":
        return f"Latency of a prompt, {row.prompt_tokens:,} tokens here and 2,048 in the paper:"
    return f"Throughput of {row.batch} prompts with {row.output_tokens} new tokens each:"


def _removed(model: Mapping[str, Any], depth: int) -> float:
    """The share of attentions and MLPs that a depth is without: a block counts as one of each."""
    num_removed = sum(len(Unit.parse(unit).sublayers) for unit in model["removed"][:depth])
    return num_removed / (2 * int(model["num_blocks"]))


def _table(test: str, measured: Sequence[Row], model: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("from")
    table.add_column("method")
    for heading in ("removed", "ms" if test == "prompt" else "tokens/s", "speedup"):
        table.add_column(heading, justify="right")
    for row in measured:
        value = f"{1000 * row.seconds:,.1f}" if test == "prompt" else f"{row.tokens_per_second:,.0f}"
        name = "dense" if row.depth == 0 else f"SLEB, depth {row.depth}"
        removed = _removed(model, row.depth or 0)
        table.add_row("here", name, f"{removed:.0%}", value, f"{row.speedup:.2f}")
    table.add_section()
    for each in ROWS:
        value = f"{each.latency_ms:,.1f}" if test == "prompt" else f"{each.tokens_per_second:,.0f}"
        speedup = each.latency_speedup if test == "prompt" else each.throughput_speedup
        table.add_row("paper", each.method, each.removed, value, f"{speedup:.2f}")
    return table

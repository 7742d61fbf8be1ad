"""`sleb show`: what a layer map removes, what each removal cost, and what it was found on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sleb.errors import LayerMapError
from sleb.layer_map.layer_map import CalibrationRecord, LayerMap, Part, SearchRecord, shipped_maps

_STRIP_BLOCKS = 16  # blocks a line: 16 columns of 4 fit a terminal of 80


def show(
    layer_map: Annotated[str, typer.Argument(help="A map file, or the name of a shipped map.")],
    depth: Annotated[
        int | None, typer.Option(help="Depth to draw.", show_default="the recommended one")
    ] = None,
) -> None:
    """Show what a layer map removes and keeps."""
    print_map(find_map(layer_map), depth, Console())


def find_map(name: str) -> LayerMap:
    """The map in a file of that name, else the shipped one; LayerMapError lists the shipped ones."""
    shipped = shipped_maps()
    if not Path(name).exists() and name in shipped:
        return LayerMap.load(shipped[name])
    if not Path(name).exists():
        raise LayerMapError(
            f"layer map {name} is neither a file nor shipped; shipped are: {', '.join(shipped)}"
        )
    return LayerMap.load(name)


def print_map(layer_map: LayerMap, depth: int | None, console: Console) -> None:
    """Strip of the blocks at `depth` (None: the recommended one), table of the removals, calibration."""
    depth = layer_map.depth if depth is None else depth
    lines = strip(layer_map, depth)
    console.print(
        f"{layer_map.model}: depth {depth} of 0 to {layer_map.max_depth}, "
        f"{kept_blocks(layer_map, depth):g} of {layer_map.num_blocks} blocks kept",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, no_wrap=True)
    console.print(_table(layer_map))
    for key, value in _facts(layer_map).items():
        console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)


def _facts(layer_map: LayerMap) -> dict[str, str]:
    facts = {
        "fingerprint": layer_map.fingerprint,
        "calibration": _known(layer_map.calibration),
        "held out": _known(layer_map.held_out),
        "search": _known(layer_map.search),
        "source": layer_map.source,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _known(record: CalibrationRecord | SearchRecord | None) -> str:
    fields = {} if record is None else asdict(record)
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in fields.items() if value is not None
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def kept_blocks(layer_map: LayerMap, depth: int) -> float:
    """Blocks that run at `depth`; one without its attention or its MLP counts half."""
    parts: tuple[Part, Part] = ("attention", "mlp")
    blocks = range(layer_map.num_blocks)
    return sum(layer_map.active((block, part), depth) for block in blocks for part in parts) / 2


def strip(layer_map: LayerMap, depth: int) -> list[str]:
    """Lines of block numbers over signs: ▉ kept, ░ removed, a attention only, m MLP only."""
    signs = {(True, True): "▉▉", (False, False): "░░", (True, False): "a", (False, True): "m"}
    lines = []
    for first in range(0, layer_map.num_blocks, _STRIP_BLOCKS):
        blocks = range(first, min(first + _STRIP_BLOCKS, layer_map.num_blocks))
        kept = [
            (layer_map.active((block, "attention"), depth), layer_map.active((block, "mlp"), depth))
            for block in blocks
        ]
        lines += ["".join(f"{block:>4}" for block in blocks), "".join(f"{signs[each]:>4}" for each in kept)]
    return [
        *lines,
        "▉▉ kept  ░░ removed" + ("  a only attention  m only MLP" if _has_parts(layer_map) else ""),
    ]


def _has_parts(layer_map: LayerMap) -> bool:
    return any(unit.part != "block" for unit in layer_map.removed)


def _table(layer_map: LayerMap) -> Table:
    losses, held_out = layer_map.losses, layer_map.held_out_losses
    table = Table()
    headings = (("loss", "perplexity") if losses else ()) + (("held-out perplexity",) if held_out else ())
    for heading in ("depth", "removed", *headings):
        table.add_column(heading, justify="right")
    table.add_column("")
    for depth in range(layer_map.max_depth + 1):
        cells = [str(depth), str(layer_map.removed[depth - 1]) if depth else "none"]
        if losses:
            cells += [f"{losses[depth]:.2f}", _number(layer_map.perplexity(depth))]
        if held_out:
            cells.append(_number(layer_map.perplexity(depth, held_out=True)))
        table.add_row(*cells, "recommended" if depth == layer_map.depth else "")
    return table

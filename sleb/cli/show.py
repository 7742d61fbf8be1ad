"""`sleb show`: what a layer map removes, what each removal cost, and what it was found on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from sleb.cli.options import with_options
from sleb.errors import LayerMapError
from sleb.layer_map.layer_map import (
    CalibrationRecord,
    LayerMap,
    Part,
    Patches,
    SearchRecord,
    Unit,
    shipped_maps,
)
from sleb.layer_map.patches import PatchRecord
from sleb.models.aliases import ALIASES
from sleb.models.resolve import check_model, resolve_config, shipped_map
from sleb.options import option
from sleb.terminal import Console

_MIN_WIDTH = 120  # where standard output is no terminal, a line may be as long as it needs to be
_STRIP_BLOCKS = 16  # blocks a line: 16 columns of 4 fit a terminal of 80


@dataclass(frozen=True)
class ShowOptions:
    """What is drawn of a map."""

    layer_map: str | None = option(
        None,
        "The map of MODEL: a file, or the name of a shipped map.",
        unset="the one shipped with it",
        metavar="FILE",
    )
    depth: int | None = option(None, "Depth to draw.", unset="the recommended one", minimum=0)


def _complete(incomplete: str) -> list[str]:
    return [name for name in (*ALIASES, *shipped_maps()) if name.startswith(incomplete)]


@with_options
def show(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A map file, the name of a shipped map, or a model, as in every command.",
            autocompletion=_complete,
        ),
    ],
    options: ShowOptions,
) -> None:
    """Show what a layer map removes and keeps, and what each removal costs."""
    block_size: int | None = None
    if options.layer_map is None:
        layer_map = find_map(model)
    else:
        check_model(model)
        layer_map = find_map(options.layer_map)
        from sleb.engine.model.allocation import num_parameters
        from sleb.engine.model.architecture import resolve_spec  # imports torch

        resolved = resolve_config(model)
        spec = resolve_spec(resolved.path)
        layer_map.check_model(
            num_blocks=spec.num_blocks,
            fingerprint=spec.fingerprint,
            model=resolved.name,
            parallel=spec.parallel,
        )
        block_size = num_parameters(spec, Unit(0))
    print_map(layer_map, options.depth, Console(), block_size)


def find_map(name: str) -> LayerMap:
    """The map in a file of that name, else the shipped one of that name or alias.

    Raises LayerMapError: it lists the shipped ones, or tells how a model gets a map.
    """
    path = Path(name)
    if (own := shipped_map(name)) is not None:
        return LayerMap.load(own)
    if os.path.isdir(path) or path.suffix == ".gguf":
        raise LayerMapError(
            f"{name} comes with no layer map: name one with --layer-map, or make one with `sleb prune`"
        )
    return LayerMap.find(name)


def print_map(
    layer_map: LayerMap, depth: int | None, console: Console, block_size: int | None = None
) -> None:
    """Strip of the blocks at `depth` (None: the recommended one), table of the removals, calibration.

    block_size: parameters of a block, of which those of patches are told as a share.
    """
    depth = layer_map.depth if depth is None else depth
    lines = strip(layer_map, depth)
    if layer_map.patches is not None:  # before anything is printed
        layer_map.patches.check_runs(layer_map.removed)
    console.print(
        f"{layer_map.model}: depth {depth} of 0 to {layer_map.max_depth}, "
        f"{kept_blocks(layer_map, depth):g} of {layer_map.num_blocks} blocks kept",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, no_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    console.print(_table(layer_map))
    for key, value in _facts(layer_map, depth, block_size).items():
        console.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)


def _facts(layer_map: LayerMap, depth: int, block_size: int | None) -> dict[str, str]:
    patches = layer_map.patches
    facts = {
        f"patches of depth {depth}": None if patches is None else _patch_cost(patches, depth, block_size),
        "fingerprint": layer_map.fingerprint,
        "calibration": _known(layer_map.calibration),
        "held out": "; ".join(_known(text.record) for text in layer_map.held_out) or _no_held_out(layer_map),
        "search": _known(layer_map.search),
        "fitted": None if patches is None else _known(patches.record),
        "source": layer_map.source,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _no_held_out(layer_map: LayerMap) -> str | None:
    return (
        None
        if layer_map.losses is None
        else "none, and the calibration text flatters; `sleb eval` measures others"
    )


def _patch_cost(patches: Patches, depth: int, block_size: int | None) -> str:
    size = patches.num_parameters(depth)
    share = "" if block_size is None else f", {size / block_size:.1%} of a block"
    megabytes = patches.num_bytes(depth) / 1e6
    return f"{len(patches.at(depth))}, {size / 1e6:.2f} M parameters ({megabytes:.2f} MB){share}"


def _patch_columns(layer_map: LayerMap) -> list[tuple[str, list[str]]]:
    """What each depth's patches cost, and the perplexity that it would have without them, as far as that is known."""
    patches, bare = layer_map.patches, layer_map.unpatched
    if patches is None:
        return []
    depths = range(layer_map.max_depth + 1)
    columns = [
        ("parameters of patches", [f"{patches.num_parameters(depth) / 1e6:.2f} M" for depth in depths])
    ]
    if bare is not None and bare.token_loss(0) is not None:
        heading = f"{bare.record.source} perplexity without"
        columns.append((heading, [_number(bare.perplexity(depth), 3) for depth in depths]))
    return columns


def _known(record: CalibrationRecord | SearchRecord | PatchRecord | None) -> str:
    fields = {} if record is None else asdict(record)
    fields |= fields.pop("calibration", None) or {}
    return ", ".join(
        f"{name.replace('_', ' ')} {value}" for name, value in fields.items() if value is not None
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


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
    """Perplexities say of which text; sums over it, as the file has them, where its number of tokens is not known."""
    depths = range(layer_map.max_depth + 1)
    columns = [("depth", [*map(str, depths)]), ("removed", ["none", *map(str, layer_map.removed)])]
    known = layer_map.calibration_losses
    if known.token_loss(0) is not None:
        columns.append(("nats a token", [_number(known.token_loss(depth), 4) for depth in depths]))
    for name, text in (
        ("calibration", known),
        *((str(each.record.source), each) for each in layer_map.held_out),
    ):
        if text.token_loss(0) is not None:
            columns.append((f"{name} perplexity", [_number(text.perplexity(depth), 3) for depth in depths]))
        elif text.losses:
            columns.append((f"{name} loss (sum over the text)", [_number(loss, 2) for loss in text.losses]))
    columns += _patch_columns(layer_map)
    columns.append(("", ["recommended" if depth == layer_map.depth else "" for depth in depths]))
    table = Table()
    for heading, _ in columns:
        table.add_column(Text(heading), justify="right" if heading else "left", overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*row)
    return table

"""`sleb show`: what a layer map removes, what each removal cost, and what it was found on."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sleb.cli.options import with_options
from sleb.errors import LayerMapError
from sleb.fields import shown_path
from sleb.layer_map.layer_map import CalibrationRecord, LayerMap, Part, SearchRecord, shipped_maps
from sleb.models.resolve import ALIAS, check_model, resolve_config, shipped_map
from sleb.options import option
from sleb.terminal import Console

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
    return [name for name in (ALIAS, *shipped_maps()) if name.startswith(incomplete)]


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
    if options.layer_map is None:
        layer_map = find_map(model)
    else:
        check_model(model)
        layer_map = find_map(options.layer_map)
        from sleb.engine.model.architecture import resolve_spec  # imports torch

        resolved = resolve_config(model)
        spec = resolve_spec(resolved.path)
        layer_map.check_model(num_blocks=spec.num_blocks, fingerprint=spec.fingerprint, model=resolved.name)
    print_map(layer_map, options.depth, Console())


def find_map(name: str) -> LayerMap:
    """The map in a file of that name, else the shipped one of that name or of that model's alias.

    Raises LayerMapError: it lists the shipped ones, or tells how a model gets a map.
    """
    path, shipped = Path(name), shipped_maps()
    if name == ALIAS and (own := shipped_map(name)) is not None:
        return LayerMap.load(own)
    if not os.path.exists(path) and name in shipped:
        return LayerMap.load(shipped[name])
    if os.path.isdir(path) or path.suffix == ".gguf":
        raise LayerMapError(
            f"{name} comes with no layer map: name one with --layer-map, or make one with `sleb prune`"
        )
    if not os.path.exists(path):  # a name that is too long is none
        known = ", ".join((ALIAS, *shipped))
        raise LayerMapError(
            f"layer map {shown_path(name)} is neither a file nor shipped; shipped are: {known}"
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


def _number(value: float | None, digits: int = 3) -> str:
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
    """Losses in nats a token; sums over the text, as the file has them, where the number of tokens is not known."""
    losses, held_out = layer_map.losses, layer_map.held_out_losses
    known = layer_map.token_loss(0) is not None
    table = Table()
    headings: tuple[str, ...] = ()
    if losses:
        headings = ("nats a token", "perplexity") if known else ("loss (sum over the text)",)
    if held_out:
        headings += ("held-out nats a token", "held-out perplexity")
    for heading in ("depth", "removed", *headings):
        table.add_column(heading, justify="right")
    table.add_column("")
    for depth in range(layer_map.max_depth + 1):
        cells = [str(depth), str(layer_map.removed[depth - 1]) if depth else "none"]
        if losses and known:
            cells += [_number(layer_map.token_loss(depth), 4), _number(layer_map.perplexity(depth))]
        elif losses:
            cells.append(f"{losses[depth]:.2f}")
        if held_out:
            cells.append(_number(layer_map.token_loss(depth, held_out=True), 4))
            cells.append(_number(layer_map.perplexity(depth, held_out=True)))
        table.add_row(*cells, "recommended" if depth == layer_map.depth else "")
    return table

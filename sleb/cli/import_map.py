"""`sleb import`: another tool's list of what to remove, as a layer map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sleb.formats import IMPORT_FORMATS
from sleb.formats.importing import import_map
from sleb.formats.output import check_file


def import_file(
    file: Annotated[Path, typer.Argument(help="The foreign file, or a model folder with a config.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the layer map goes (JSON).")],
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(IMPORT_FORMATS)}.")] = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            help="The model it is about: folder, hub id, .gguf file.", show_default="what the file says"
        ),
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="How many blocks the model has.", show_default="what the file says")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the map in --output.")] = False,
) -> None:
    """Turn another tool's list of removed blocks, attentions or MLPs into a layer map.

    Where the notation has an order, the map has the same; its losses are not known.
    """
    check_file(output, force=force)
    layer_map = import_map(
        file,
        format,
        model=model,
        num_blocks=num_blocks,
        note=lambda message: typer.echo(f"note: {message}", err=True),
    )
    layer_map.save(output)
    units = ", ".join(map(str, layer_map.removed))
    typer.echo(
        f"Written to {output}: {layer_map.model}, {layer_map.num_blocks} blocks, without {units}", err=True
    )

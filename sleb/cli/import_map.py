"""`sleb import`: another tool's list of what to remove, as a layer map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from sleb.cli.options import with_options
from sleb.formats import IMPORT_FORMATS
from sleb.options import option
from sleb.terminal import tell


@dataclass(frozen=True)
class ImportOptions:
    """What the foreign file is, and of what."""

    format: str = option("auto", "Of the file.", choices=tuple(IMPORT_FORMATS))
    model: str | None = option(
        None,
        "The model it is about: folder, hub id, .gguf file.",
        unset="what the file says",
        metavar="MODEL",
    )
    num_blocks: int | None = option(
        None, "How many blocks the model has.", unset="what the file says", minimum=1
    )
    force: bool = option(False, "Replace the map in --output.")


@with_options
def import_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The foreign file, or a model folder with a config.json.")
    ],
    options: ImportOptions,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where the layer map goes (JSON).")
    ],
) -> None:
    """Turn another tool's list of removed blocks, attentions or MLPs into a layer map.

    Where the notation has an order, the map has the same; its losses are not known.
    """
    from sleb.formats.importing import import_map  # torch: not for help
    from sleb.formats.output import check_file

    check_file(output, force=options.force)
    layer_map = import_map(
        file,
        options.format,
        model=options.model,
        num_blocks=options.num_blocks,
        note=lambda message: tell(f"note: {message}"),
    )
    layer_map.save(output)
    units = ", ".join(map(str, layer_map.removed))
    patched = "" if layer_map.patches is None else ", with a patch for them"
    tell(f"Written to {output}: {layer_map.model}, {layer_map.num_blocks} blocks, without {units}{patched}")

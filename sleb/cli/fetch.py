"""`sleb fetch`: put a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sleb.models.aliases import ALIASES
from sleb.models.resolve import fetch_model


def fetch(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(ALIASES)}, a hub id (owner/name), or a .gguf file.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", help="Put it into this folder.", show_default="the cache")
    ] = None,
) -> None:
    """Fetch a model and print its folder.

    The last line on standard output is the folder; everything else goes to standard error. What is there
    already is not fetched again.
    """
    typer.echo(fetch_model(model, to))

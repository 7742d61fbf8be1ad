"""`sleb bench report`: one report of several results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    directory: Annotated[Path, typer.Argument(help="Folder to write the report into; made if missing.")],
    files: Annotated[
        list[Path], typer.Argument(help="Result files: what sleb bench and sleb eval wrote with --json.")
    ],
) -> None:
    """Write one report (Markdown and plots) of several results: speed, quality, serving, other engines."""
    from sleb.benchmarks.old import load
    from sleb.benchmarks.show import check_report, write_report

    results = [load(path) for path in files]
    check_report(directory)
    for path in write_report(directory, results):
        typer.echo(path)

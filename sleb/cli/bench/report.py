"""`sleb bench report`: one report of several results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    directory: Annotated[Path, typer.Argument(help="Folder to write the report into; made if missing.")],
    files: Annotated[
        list[Path], typer.Argument(help="Result files: what sleb bench and sleb eval wrote with --json.")
    ],
) -> None:
    """Write one report (Markdown, HTML, plots) of several results: speed, quality, serving, other engines."""
    from sleb.benchmarks.reports import check_report
    from sleb.benchmarks.reports.kinds import read_result
    from sleb.benchmarks.reports.write import write_results

    results = [read_result(path) for path in files]
    check_report(directory)
    write_results(directory, results, Console())

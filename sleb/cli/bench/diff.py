"""`sleb bench diff`: what changed between two results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sleb.errors import ConfigError


def diff(
    a: Annotated[Path, typer.Argument(help="Result file, the older one.", metavar="A.json")],
    b: Annotated[Path, typer.Argument(help="Result file of the same kind.", metavar="B.json")],
    fail_below: Annotated[
        float | None,
        typer.Option(
            help="Exit with status 1 if any ratio of B to A is below this, as 0.95.", show_default="never"
        ),
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the comparison here.")] = None,
) -> None:
    """Compare two results of the same kind row by row; above 1, B is better."""
    from sleb.benchmarks.reports.diff import compare, print_difference
    from sleb.benchmarks.reports.kinds import read_result
    from sleb.files import check_writable, write_text

    if fail_below is not None and not 0 < fail_below < float("inf"):
        raise ConfigError(f"--fail-below is {fail_below:g}; it must be a ratio above 0, as 0.95")
    if json_path is not None:
        check_writable(json_path)
    found = compare(read_result(a), read_result(b))
    print_difference(found, Console(), fail_below)
    if json_path is not None:
        write_text(json_path, found.to_json(fail_below))
    if fail_below is not None and found.below(fail_below):
        raise typer.Exit(1)

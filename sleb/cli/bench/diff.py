"""`sleb bench diff`: what changed between two results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sleb.errors import ConfigError
from sleb.terminal import tell


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
    """Compare two results of the same kind figure by figure; above 1, B is better."""
    if fail_below is not None and not 0 < fail_below < float("inf"):
        raise ConfigError(f"--fail-below is {fail_below:g}; it must be a ratio above 0, as 0.95")
    from sleb.benchmarks import show
    from sleb.benchmarks.old import load
    from sleb.benchmarks.record import write_result
    from sleb.files import check_writable

    if json_path is not None:
        check_writable(json_path)
    found = show.diff(load(a), load(b))
    show.print_result(found)
    if json_path is not None:
        write_result(json_path, found)
    if fail_below is None:
        return
    low = [
        f"{each.case}, {each.subject}: " + (f"{each.ratio.estimate:.3f}" if each.ratio else "failed")
        for each in found.measurements
        if each.value is None or (each.ratio is not None and each.ratio.estimate < fail_below)
    ]
    if low:
        tell(f"below --fail-below {fail_below:g}: {'; '.join(low)}", "red")
        raise typer.Exit(1)

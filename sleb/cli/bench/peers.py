"""`sleb bench peers`: this engine beside others that are installed, or served."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sleb.benchmarks.peers import PeersOptions
from sleb.cli.bench.shared import OutputOptions, shown
from sleb.cli.options import Model, with_options

if TYPE_CHECKING:
    from sleb.benchmarks.record import Result
    from sleb.benchmarks.turns import Case, Turns


def _print_how(wanted: bool) -> None:
    if wanted:
        from sleb.benchmarks.installs import HOW

        typer.echo(HOW)
        raise typer.Exit


@with_options
def peers(
    model: Model,
    options: PeersOptions,
    output: OutputOptions,
    how: Annotated[
        bool,
        typer.Option(
            "--how", help="Say how the others are installed, and end.", callback=_print_how, is_eager=True
        ),
    ] = False,
) -> None:
    """Measure this engine against others on this machine's processors, in turns.

    Nothing is installed: --how says how. Ctrl-C reports the turns that are complete.
    """
    from sleb.benchmarks.peers import run_peers
    from sleb.benchmarks.record import write_result

    with shown("starting engines") as meanwhile:

        def keep(result: Result, turns: Turns, case: Case) -> None:
            meanwhile.turn(turns, case)
            if output.json_path is not None:
                write_result(output.json_path, result)

        result = run_peers(options, ["sleb", *sys.argv[1:]], meanwhile.run, meanwhile.line, keep)
    output.show(result)

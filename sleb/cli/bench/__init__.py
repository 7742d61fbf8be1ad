"""`sleb bench`: what pruning gives on this machine, and how near the kernels come to its limits. A module a command."""

from __future__ import annotations

import typer

from sleb.cli.bench.fronts import fronts
from sleb.cli.bench.kernels import kernels
from sleb.cli.bench.methods import methods
from sleb.cli.bench.search import search
from sleb.cli.bench.throughput import throughput

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _bench() -> None:
    """Measure speed: dense against pruned, and operator by operator."""


for _command in (throughput, kernels, search, methods, fronts):
    app.command()(_command)

"""`sleb bench`: what pruning gives on this machine, and how near the kernels come to its limits. A module a command."""

from __future__ import annotations

import typer

from sleb.cli.bench.diff import diff
from sleb.cli.bench.kernels import kernels
from sleb.cli.bench.peers import peers
from sleb.cli.bench.report import report
from sleb.cli.bench.serve import serve
from sleb.cli.bench.throughput import throughput
from sleb.cli.options import OptionsCommand

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _bench() -> None:
    """Measure speed: dense against pruned, ours against others, over HTTP, operator by operator."""


for _command in (throughput, serve, peers, kernels, report, diff):
    app.command(cls=OptionsCommand)(_command)

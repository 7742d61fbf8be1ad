"""`sleb bench throughput`: prompt processing and token generation, dense against pruned."""

from __future__ import annotations

import sys

import typer

from sleb.benchmarks.workloads import ThroughputOptions
from sleb.cli.bench.shared import OutputOptions, shown
from sleb.cli.options import OptionalModel, with_options
from sleb.terminal import tell


@with_options
def throughput(options: ThroughputOptions, output: OutputOptions, model: OptionalModel = None) -> None:
    """Measure prompt processing and token generation, several depths in turns.

    Ctrl-C reports the turns that are complete.
    """
    with shown("loading the model") as progress:
        from sleb.benchmarks.throughput import run_throughput, too_slow

        result = run_throughput(
            options,
            ["sleb", *sys.argv[1:]],
            on_load=progress.loading,
            on_progress=progress.run,
            on_turn=progress.turn,
        )
    output.show(result)
    slow = [] if options.fail_below is None else too_slow(result, options.fail_below)
    if slow:
        tell(f"below --fail-below {options.fail_below:g}: {'; '.join(slow)}", "red")
        raise typer.Exit(1)

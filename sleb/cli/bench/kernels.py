"""`sleb bench kernels`: every operator, backend against backend."""

from __future__ import annotations

import sys

from sleb.benchmarks.kernel_options import KernelsOptions
from sleb.cli.bench.shared import OutputOptions, shown
from sleb.cli.options import with_options


@with_options
def kernels(options: KernelsOptions, output: OutputOptions) -> None:
    """Measure every operator, several backends in turns, against the device's own limits.

    Ctrl-C reports what is complete.
    """
    with shown("measuring the device") as progress:
        from sleb.benchmarks.kernels import run_kernels

        result = run_kernels(
            options, ["sleb", *sys.argv[1:]], on_progress=progress.run, on_case=progress.line
        )
    output.show(result)

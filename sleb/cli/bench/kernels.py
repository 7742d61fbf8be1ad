"""`sleb bench kernels`: every operator, backend against backend."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder, RunsBar, parse_names


def kernels(
    ops: Annotated[
        str | None, typer.Option(help="Operators, as add_norm,linear.", show_default="all")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Of torch, triton, flash and varlen (attention alone).",
            show_default="all that the device may run",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16; float32 on a CPU), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    repetitions: Annotated[int, typer.Option(help="Samples of each backend.")] = 7,
    scale: Annotated[
        str, typer.Option(help="auto, full (a card's default) or small (a CPU's): the size of the shapes.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the random inputs and the order of the runs.")] = 0,
    json_path: JsonPath = None,
    report: ReportFolder = None,
) -> None:
    """Measure every operator, several backends in turns, against the device's own limits.

    Ctrl-C reports what is complete.
    """
    from sleb.benchmarks.environment import shown_command
    from sleb.benchmarks.kernels import KernelOptions, run_kernels
    from sleb.benchmarks.report import print_kernels

    options = KernelOptions(
        ops=None if ops is None else parse_names(ops),
        backends=None if backends is None else parse_names(backends),
        dtype=dtype,
        device=device,
        repetitions=repetitions,
        scale=scale,
        seed=seed,
    )
    outputs = Outputs(json_path, report)
    outputs.check()
    with RunsBar("measuring the device") as bar:
        found = run_kernels(options, shown_command(["sleb", *sys.argv[1:]], ""), on_progress=bar.show)
    console = Console()
    print_kernels(found, console)
    outputs.write(json.loads(found.to_json()), console)
    if not found.complete:
        raise typer.Exit(130)

"""`sleb bench search`: what a search takes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder, RunsBar


def search(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    calibration: Annotated[str, typer.Option(help="As for sleb prune.")] = "wikitext2",
    remove: Annotated[int, typer.Option(help="How many units.")] = 6,
    units: Annotated[str, typer.Option(help="blocks, sublayers or attention.")] = "blocks",
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of a draw.")] = 8,
    draws: Annotated[int, typer.Option(help="Draws of the windows, each searched exactly and fast.")] = 5,
    reference_draws: Annotated[
        int, typer.Option(help="In how many of them the authors' algorithm runs beside (blocks only).")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    seed: Annotated[int, typer.Option(help="Of the first draw, and of the order of the runs.")] = 0,
    json_path: JsonPath = None,
    report: ReportFolder = None,
) -> None:
    """Measure the search, exact and fast, beside the authors' algorithm, and how often fast agrees with exact.

    Ctrl-C reports the draws that are complete.
    """
    from sleb.benchmarks.search import SearchBenchOptions, print_search, run_search_bench
    from sleb.pruning.options import set_threads

    options = SearchBenchOptions(
        model, calibration, remove, units, seqlen, windows, draws, reference_draws, dtype, device, seed
    )
    outputs = Outputs(json_path, report)
    outputs.check()
    set_threads(threads)
    with RunsBar() as bar:
        result = run_search_bench(
            options, ["sleb", *sys.argv[1:]], lambda share, text: bar.show(int(share * 100), 100, text)
        )
    console = Console()
    print_search(result, console)
    outputs.write(result, console)
    if not result["complete"]:
        raise typer.Exit(130)

"""`sleb bench fronts`: what to remove for a speedup, whole blocks or parts of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder, RunsBar


def fronts(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    maps: Annotated[list[Path], typer.Argument(help="Layer maps that sleb prune wrote, one or more.")],
    batch: Annotated[int, typer.Option(help="Requests of a decoding step.")] = 1,
    measure: Annotated[int, typer.Option(help="Depths of each map that are measured; 0: none.")] = 3,
    repetitions: Annotated[int, typer.Option(help="Times that each of them is measured.")] = 7,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw to this name with .png and .svg.", show_default=False)
    ] = None,
    json_path: JsonPath = None,
    report: ReportFolder = None,
) -> None:
    """Compare layer maps of different units: perplexity against parameters, KV cache and speedup."""
    from sleb.benchmarks.fronts import FrontsOptions, plot_fronts, print_fronts, run_fronts
    from sleb.errors import ConfigError
    from sleb.layer_map.layer_map import LayerMap

    outputs = Outputs(json_path, report)
    outputs.check()
    if len({path.stem for path in maps}) < len(maps):
        raise ConfigError("two layer maps have the same file name; the table could not tell them apart")
    options = FrontsOptions(
        model=model,
        maps={path.stem: LayerMap.load(path) for path in maps},
        batch=batch,
        measure=measure,
        repetitions=repetitions,
        dtype=dtype,
        device=device,
    )
    console = Console()
    with RunsBar() as bar:
        result = run_fronts(options, ["sleb", *sys.argv[1:]], bar.update)
    print_fronts(result, console)
    outputs.write(result, console)
    if plot is not None and result["complete"]:
        plot_fronts(result, plot)
        console.print(f"Plotted to {plot}.png and {plot}.svg.", markup=False, highlight=False)
    if not result["complete"]:
        raise typer.Exit(130)

"""`sleb bench methods`: rules for which blocks to remove."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sleb.cli.bench.shared import RunsBar, parse_integers


def methods(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    calibration: Annotated[str, typer.Option(help="The text that every method sees.")],
    held_out: Annotated[str, typer.Option(help="A second text, that none sees.")],
    counts: Annotated[str, typer.Option(help="Blocks to remove, as 3,6.")] = "3,6",
    layer_map: Annotated[
        Path | None, typer.Option(help="SLEB's order.", show_default="searched for on the calibration text")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 8,
    random_seeds: Annotated[int, typer.Option(help="Draws of the random method.")] = 3,
    answers: Annotated[bool, typer.Option(help="Compare greedy answers too.")] = True,
    speed: Annotated[
        int, typer.Option(help="Compare the speed of so many blocks with width and 2:4 pruning; 0: do not.")
    ] = 0,
    repetitions: Annotated[int, typer.Option(help="Of the speed measurements.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the losses.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw to this name with .png and .svg.", show_default=False)
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write environment and results here.")
    ] = None,
) -> None:
    """Compare rules for which blocks to remove, on two texts and on answers; and ways to remove weights, on speed."""
    from sleb.benchmarks.command import write_result
    from sleb.benchmarks.method_speed import MethodSpeedOptions, print_method_speed, run_method_speed
    from sleb.benchmarks.methods import MethodsOptions, plot_methods, print_methods, run_methods
    from sleb.benchmarks.report import check_writable
    from sleb.layer_map import LayerMap

    if json_path is not None:
        check_writable(json_path)
    command = ["sleb", *sys.argv[1:]]
    options = MethodsOptions(
        model=model,
        calibration=calibration,
        held_out=held_out,
        counts=parse_integers("--counts", counts),
        layer_map=None if layer_map is None else LayerMap.load(layer_map),
        seqlen=seqlen,
        windows=windows,
        random_seeds=random_seeds,
        answers=answers,
        dtype=dtype,
        device=device,
    )
    console = Console()
    with RunsBar() as bar:
        result = run_methods(options, command, lambda share, text: bar.show(int(share * 100), 100, text))
    print_methods(result, console)
    if speed and result["complete"]:
        asked = MethodSpeedOptions(model, count=speed, repetitions=repetitions, device=device)
        with RunsBar() as bar:
            result["speed"] = run_method_speed(asked, command, bar.update)
        print_method_speed(result["speed"], console)
    if json_path is not None and result["rows"]:
        write_result(json_path, result)
    if plot is not None and result["complete"]:
        plot_methods(result, plot)
        console.print(f"Plotted to {plot}.png and {plot}.svg.", markup=False, highlight=False)
    if not (result["complete"] and result.get("speed", result)["complete"]):
        raise typer.Exit(130)

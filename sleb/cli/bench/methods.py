"""`sleb bench methods`: rules for which blocks to remove."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder, RunsBar, parse_integers


def methods(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    calibration: Annotated[
        str | None, typer.Option(help="The text that every method sees.", show_default=False)
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="A second text, that none sees.", show_default=False)
    ] = None,
    counts: Annotated[str, typer.Option(help="Blocks to remove, as 3,6.")] = "3,6",
    layer_map: Annotated[
        Path | None, typer.Option(help="SLEB's order.", show_default="searched for on the calibration text")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 8,
    random_seeds: Annotated[int, typer.Option(help="Draws of the random method.")] = 3,
    answers: Annotated[bool, typer.Option(help="Compare greedy answers too.")] = True,
    quality: Annotated[bool, typer.Option(help="Compare the rules; --no-quality: --speed alone.")] = True,
    speed: Annotated[
        int, typer.Option(help="Compare the speed of so many blocks with width and 2:4 pruning; 0: do not.")
    ] = 0,
    repetitions: Annotated[int, typer.Option(help="Of the speed measurements.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the losses.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw to this name with .png and .svg.", show_default=False)
    ] = None,
    json_path: JsonPath = None,
    report: ReportFolder = None,
) -> None:
    """Compare rules for which blocks to remove, on two texts and on answers; and ways to remove weights, on speed."""
    from sleb.benchmarks.method_speed import MethodSpeedOptions, print_method_speed, run_method_speed
    from sleb.benchmarks.methods import MethodsOptions, plot_methods, print_methods, run_methods
    from sleb.errors import ConfigError
    from sleb.layer_map.layer_map import LayerMap

    outputs = Outputs(json_path, report)
    outputs.check()
    command = ["sleb", *sys.argv[1:]]
    console = Console()
    asked = MethodSpeedOptions(model, count=speed, repetitions=repetitions, device=device)

    def measure_speed() -> dict[str, Any]:
        with RunsBar() as bar:
            found = run_method_speed(asked, command, bar.update)
        print_method_speed(found, console)
        return found

    if not quality:
        if not speed:
            raise ConfigError("--no-quality without --speed leaves nothing to compare; give --speed 6, say")
        result = measure_speed()
        outputs.write(result, console)
        if not result["complete"]:
            raise typer.Exit(130)
        return
    if calibration is None or held_out is None:
        raise ConfigError("the rules need two texts; give --calibration and --held-out")
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
    with RunsBar() as bar:
        result = run_methods(options, command, lambda share, text: bar.show(int(share * 100), 100, text))
    print_methods(result, console)
    if speed and result["complete"]:
        result["speed"] = measure_speed()
    outputs.write(result, console)
    if plot is not None and result["complete"]:
        plot_methods(result, plot)
        console.print(f"Plotted to {plot}.png and {plot}.svg.", markup=False, highlight=False)
    if not (result["complete"] and result.get("speed", result)["complete"]):
        raise typer.Exit(130)

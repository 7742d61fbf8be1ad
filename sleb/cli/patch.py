"""`sleb patch`: fit patches to the removals of a layer map."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sleb.cli.options import Model, with_options
from sleb.cli.progress import Bar
from sleb.cli.show import find_map, print_map
from sleb.errors import ConfigError
from sleb.pruning.options import PatchOptions
from sleb.terminal import Console, tell


@with_options
def patch(
    model: Model,
    layer_map: Annotated[
        str, typer.Argument(metavar="MAP", help="A layer map's file, or the name of a shipped one.")
    ],
    options: PatchOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the map goes, its patches beside it.",
            metavar="FILE",
            show_default="MAP-patched.json",
        ),
    ] = None,
) -> None:
    """Fit patches to the removals of a layer map, and measure every depth with them.

    Patches are fitted in closed form, on calibration text: nothing is trained. MAP stays as it is.
    """
    from sleb.pruning.patch_map import run_patching

    source, found = Path(layer_map), find_map(layer_map)
    if output is None and not source.is_file():
        raise ConfigError(f"{layer_map} is a shipped map: name the file for the one with patches in --output")
    target = output or source.with_name(f"{source.stem}-patched.json")
    asked = replace(options, layer_map=found, output=target)
    console = Console(stderr=True)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    try:
        with Bar(
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        ) as bar:
            doing = ""

            def show(what: str, share: float) -> None:
                nonlocal doing
                if what != doing and not console.is_terminal:  # where no bar moves
                    say(f"{share:4.0%} {what}")
                doing = what
                bar.show(what, share, 1)

            report = run_patching(
                model,
                asked,
                progress=show,
                on_generate=lambda share: bar.show("the model writes its text", share, 1),
                note=say,
            )
    except KeyboardInterrupt:
        there = "is as it was" if target.exists() else "is not written"
        tell(
            f"Interrupted: {target} {there}. Patches are kept when all are fitted; a part with --depths takes less."
        )
        raise typer.Exit(130) from None
    print_map(report.layer_map, None, Console(), report.block_size)
    file = target.with_name(report.patches.file_name(target.stem))
    tell(
        f"Written to {target}, its patches to {file} ({file.stat().st_size / 1e6:.2f} MB), in {report.seconds:.0f} s."
    )

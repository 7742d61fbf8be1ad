"""`sleb export`: a pruned model, or what it lacks, in the form that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from sleb.cli.show import find_map
from sleb.formats import EXPORT_FORMATS


def export(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    format: Annotated[str, typer.Option("--format", help=f"{', '.join(EXPORT_FORMATS)}.")] = "hf",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder (hf, zeroed, decilm) or file.", show_default="standard output"
        ),
    ] = None,
    layer_map: Annotated[
        str | None,
        typer.Option(help="A map file, or the name of a shipped map.", show_default="the alias's own"),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="How many removals.", show_default="the map's recommended depth")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file: 5GB, 500MB.")] = "5GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Write a model at one depth of a layer map for other tools.

    hf is a smaller checkpoint; zeroed keeps the shape; decilm can lack attention or MLP alone. The other formats are
    texts: a mergekit configuration, lists of what is removed, and a command for llama.cpp.
    """
    from sleb.formats.exporting import export_model, parse_size  # torch: not for help

    chosen = None if layer_map is None else find_map(layer_map)
    with _Bar() as bar:
        removal, text = export_model(
            model,
            format,
            output,
            layer_map=chosen,
            depth=depth,
            force=force,
            shard_bytes=parse_size(max_shard_size),
            progress=bar.update,
        )
    if output is None:
        typer.echo(text, nl=False)
        return
    kept, total = len(removal.kept_blocks), removal.layer_map.num_blocks
    typer.echo(f"Written to {output}: depth {removal.depth}, {kept} of {total} blocks", err=True)


class _Bar:
    """Bytes of weights written, on standard error; appears with the first of them."""

    def __init__(self) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        self._progress = Progress(TextColumn("writing weights"), *columns, console=console, transient=True)
        self._task = self._progress.add_task("", total=None)
        self._started = False

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._started:
            self._progress.stop()

    def update(self, num_done: int, num_bytes: int) -> None:
        if not self._started:
            self._started = True
            self._progress.start()
        self._progress.update(self._task, completed=num_done, total=num_bytes)

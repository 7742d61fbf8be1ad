"""`sleb bench`: what pruning gives on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from sleb.errors import ConfigError

if TYPE_CHECKING:
    from sleb.benchmarks.harness import Progress

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _bench() -> None:
    """Measure speed, dense against pruned."""


@app.command()
def throughput(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    layer_map: Annotated[
        str | None,
        typer.Option(help="Layer map (JSON), or none.", show_default="the one shipped with smollm2"),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="Depths to compare, as 0,6.", show_default="0 and the map's recommended one"),
    ] = None,
    tests: Annotated[str, typer.Option(help="prompt, generate, or both.")] = "prompt,generate",
    batches: Annotated[str, typer.Option(help="Requests at once in generate.")] = "64,1",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt.", show_default="prompt: 2048, or what the model holds; generate: 64"
        ),
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="New tokens of a request in generate.")] = 128,
    repetitions: Annotated[int, typer.Option(help="Times that each depth is measured.")] = 5,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="auto (as --dtype), int8 or int4 (quantised when loaded), or a dtype.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    load_format: Annotated[
        str, typer.Option(help="auto, safetensors, or dummy: random weights, only a config is needed.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="one a physical core")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order of the runs.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write environment, samples and results here.")
    ] = None,
) -> None:
    """Measure prompt processing and token generation, several depths in turns.

    Ctrl-C reports the repetitions that are complete.
    """
    from sleb.benchmarks.report import check_writable, print_report, write_text
    from sleb.benchmarks.throughput import run_throughput
    from sleb.benchmarks.workloads import ThroughputOptions

    options = ThroughputOptions(
        model=model,
        layer_map=layer_map,
        depths=None if depths is None else parse_integers("--depths", depths),
        tests=[name.strip() for name in tests.split(",") if name.strip()],
        batches=parse_integers("--batches", batches),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repetitions=repetitions,
        dtype=dtype,
        weights=weights,
        device=device,
        load_format=load_format,
        threads=threads,
        seed=seed,
    )
    if json_path is not None:
        check_writable(json_path)
    with _RunsBar() as bar:
        report = run_throughput(
            options, ["sleb", *sys.argv[1:]], on_progress=bar.update, on_load=bar.show_loading
        )
    print_report(report, Console())
    if json_path is not None and report.rows:  # an early Ctrl-C must not replace an older result by nothing
        write_text(json_path, report.to_json())
    if not report.complete:
        raise typer.Exit(130)


def parse_integers(option: str, text: str) -> list[int]:
    """The integers in a list like "0,6". Raises ConfigError naming `option`."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; it must be integers with commas between, as 0,6") from None


class _RunsBar:
    """Runs done of all, on standard error.

    It is drawn between runs only: a thread that redraws it would take its time from the runs.
    """

    def __init__(self) -> None:
        self._bar = Bar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("loading the model", total=None)

    def __enter__(self) -> _RunsBar:
        self._bar.start()
        self._bar.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show_loading(self, num_done: int, num_weights: int) -> None:
        """Shows how much of the model is loaded, in percent."""
        self._bar.update(self._task, total=100, completed=100 * num_done // num_weights, refresh=True)

    def update(self, progress: Progress) -> None:
        """Shows what has been done and what runs next."""
        self._bar.update(
            self._task,
            total=progress.num_runs,
            completed=progress.num_done,
            description=progress.next_run,
            refresh=True,
        )

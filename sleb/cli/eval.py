"""`sleb eval`: what every depth costs in quality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sleb.benchmarks.quality.options import EvalOptions
from sleb.cli.options import Model, with_options
from sleb.errors import ConfigError, SlebError
from sleb.files import check_writable
from sleb.terminal import Console, tell


@with_options
def evaluate(
    model: Model,
    options: EvalOptions,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything here; `sleb serve --bench-result` reads it."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Write a report for people, with plots, to this folder.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw quality by depth to this name with .png and .svg.", show_default="no plot"),
    ] = None,
) -> None:
    """Measure what each depth costs in quality: perplexity, agreement with the dense model, answers, lm-eval tasks.

    Ctrl-C reports what is complete.
    """
    if plot is not None and not options.text:
        raise ConfigError("--plot draws perplexity by depth; name a --text")
    for path in (json_path, plot and plot.with_name(f"{plot.name}.png")):
        if path is not None:
            check_writable(path)
    from sleb.benchmarks import show
    from sleb.benchmarks.plots import check_plots, draw_quality
    from sleb.benchmarks.quality.evaluate import run_eval
    from sleb.benchmarks.record import write_result

    if report is not None:
        show.check_report(report)
    if plot is not None:
        check_plots("--plot")
    with _EvalBar() as bar:
        result = run_eval(options, ["sleb", *sys.argv[1:]], bar.show)
    if not result.measurements:  # an early Ctrl-C must not replace an older one by nothing
        tell("Interrupted before anything was complete; nothing is written.")
        raise typer.Exit(130)
    show.print_result(result)
    if json_path is not None:
        write_result(json_path, result)
    if report is not None:
        show.write_report(report, [result])
    if plot is not None:
        draw_quality(result, plot, (".png", ".svg"))
    if problem := result.settings.get("problem"):
        raise SlebError(problem)
    if not result.complete:
        raise typer.Exit(130)


class _EvalBar:
    """What is being done, on standard error; appears with the first report."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("")

    def __enter__(self) -> _EvalBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """As `sleb.benchmarks.quality.evaluate.OnProgress`."""
        self._bar.start()  # does nothing once it is started
        self._bar.update(self._task, description=what, completed=done, total=total or None)

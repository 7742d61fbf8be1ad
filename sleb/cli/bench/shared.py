"""What the commands of `sleb bench` share: where results go, and what is shown while something is measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from sleb.benchmarks.record import Result, write_result
from sleb.benchmarks.turns import Case, Progress, Turns
from sleb.files import check_writable
from sleb.options import option


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes besides the terminal."""

    json_path: Path | None = option(
        None,
        "Write the result here as JSON, with what it was measured on.",
        flags=("--json",),
        group="Output",
    )
    report: Path | None = option(
        None, "Write report.md, report.html and plots to this folder.", group="Output"
    )

    def check(self) -> None:
        """Raises ConfigError, before anything is measured, for what cannot be written."""
        if self.json_path is not None:
            check_writable(self.json_path)
        if self.report is not None:
            from sleb.benchmarks.show import check_report

            check_report(self.report)

    def show(self, result: Result) -> None:
        """Prints a result and writes it, if it has any figures: an early Ctrl-C must not replace an older one by none.

        Exit status 130 for one that was interrupted.
        """
        from sleb.benchmarks.show import print_result, write_report

        print_result(result)
        if result.measurements and self.json_path is not None:
            write_result(self.json_path, result)
        if result.measurements and self.report is not None:
            for path in write_report(self.report, [result]):
                typer.echo(path, err=True)
        if not result.complete:
            raise typer.Exit(130)


class Shown:
    """What happens meanwhile, on standard error: a bar in a terminal, elsewhere a line a turn.

    The bar is drawn between runs only: a thread that redraws it would take its time from the runs.
    """

    def __init__(self, bar: Bar | None, description: str) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task(description, total=None)

    def loading(self, num_done: int, num_weights: int) -> None:
        """How much of the model is loaded, in percent."""
        self._draw(100 * num_done // max(1, num_weights), 100)

    def run(self, runs: Progress) -> None:
        """What has been done, and what runs next."""
        self._draw(runs.num_done, runs.num_runs, runs.next_run)

    def turn(self, turns: Turns, case: Case) -> None:
        """What a turn found, and the ratios so far."""
        self.line(turns.line(case))

    def line(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            typer.echo(text, err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def _draw(self, completed: int, total: int, description: str | None = None) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task, completed=completed, total=total, description=description, refresh=True
            )


@contextmanager
def shown(description: str) -> Iterator[Shown]:
    """Says what is done first, then what its methods are told."""
    if not sys.stderr.isatty():
        typer.echo(f"{description} …", err=True)
        yield Shown(None, description)
        return
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        found = Shown(bar, description)
        bar.refresh()
        yield found

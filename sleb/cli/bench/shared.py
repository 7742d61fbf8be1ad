"""What the commands of `sleb bench` share: where results go, and what is shown while something is measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn

from sleb.benchmarks.record import Result, write_result
from sleb.benchmarks.turns import Case, Progress, Turns
from sleb.cli.progress import Bar
from sleb.files import check_writable
from sleb.options import option
from sleb.terminal import tell


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes besides the terminal."""

    json_path: Path | None = option(
        None,
        "Write the result here as JSON, with what it was measured on.",
        flags=("--json",),
        group="Output",
    )
    report: Path | None = option(None, "Write report.md and plots to this folder.", group="Output")

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
                tell(path)
        if not result.complete:
            raise typer.Exit(130)


class Shown:
    """What happens meanwhile, on standard error: a bar in a terminal, drawn between runs only; else a line a turn."""

    def __init__(self, bar: Bar | None, description: str) -> None:
        self._bar, self._description = bar, description
        if bar is None:
            tell(f"{description} …")
        else:
            bar.show(description, 0, None)

    def loading(self, num_done: int, num_weights: int) -> None:
        """How much of the model is loaded, in percent."""
        if self._bar is not None:
            self._bar.show(self._description, 100 * num_done // max(1, num_weights), 100)

    def run(self, runs: Progress) -> None:
        """What has been done, and what runs next."""
        if self._bar is not None:
            self._bar.show(runs.next_run, runs.num_done, runs.num_runs)

    def turn(self, turns: Turns, case: Case) -> None:
        """What a turn found, and the ratios so far."""
        self.line(turns.line(case))

    def line(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is None:
            tell(text)
        else:
            self._bar.print(text)


@contextmanager
def shown(description: str) -> Iterator[Shown]:
    """Says what is done first, then what its methods are told."""
    with Bar(BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), in_background=False) as bar:
        yield Shown(bar if sys.stderr.isatty() else None, description)

"""Progress on standard error."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Self

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from sleb.terminal import Console

if TYPE_CHECKING:
    from sleb.engine.config import EngineConfig
    from sleb.engine.engine import Engine


class Bar:
    """One bar that appears with the first report: what is done, of how much, under a description.

    in_background: a thread redraws it as well. Where time is measured it must not: that would take its time from it.
    """

    def __init__(
        self,
        *columns: ProgressColumn,
        console: Console | None = None,
        transient: bool = True,
        in_background: bool = True,
    ) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            *columns,
            console=console,
            transient=transient,
            auto_refresh=in_background,
            disable=transient and not console.is_terminal,  # it would leave an empty line in a log
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def show(self, description: str, done: float, total: float | None) -> None:
        """total: None where it is not known."""
        if self._task is None:
            self._task = self._progress.add_task(description, total=total)
            self._progress.start()
        elif self._progress.finished and done != total:  # what comes next has a time of its own
            self._progress.reset(self._task)
        refresh = not self._progress.live.auto_refresh
        self._progress.update(
            self._task, description=description, completed=done, total=total, refresh=refresh
        )

    def print(self, line: str) -> None:
        """A line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False)


class LoadingBar(Bar):
    """Of a model: it appears with the first weights and is gone at the end. Fetching may show one before."""

    def __init__(self) -> None:
        super().__init__(BarColumn(), TaskProgressColumn(), TimeElapsedColumn())

    def update(self, num_done: int, num_weights: int) -> None:
        """Shows how many weights have come in, of how many."""
        self.show("loading weights", num_done, num_weights)

    def show_tuning(self, operator: str) -> None:
        """Shows which operator is being measured; how many there will be is not known."""
        self.show(f"tuning {operator}", 0, None)

    def update_capture(self, num_done: int, num_graphs: int) -> None:
        """Shows how many graphs are captured, of how many."""
        self.show("capturing graphs", num_done, num_graphs)


def load_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, under a progress bar on standard error."""
    from sleb.engine.engine import Engine

    with LoadingBar() as bar:
        return Engine(
            replace(config, on_progress=bar.update, on_tuning=bar.show_tuning, on_capture=bar.update_capture)
        )

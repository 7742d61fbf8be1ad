"""Progress on standard error."""

from __future__ import annotations

from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Bar:
    """One bar that appears with the first report: what is done, of how much, under a description."""

    def __init__(
        self, *columns: ProgressColumn, console: Console | None = None, transient: bool = True
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            *columns,
            console=console or Console(stderr=True),
            transient=transient,
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
            self._task = self._progress.add_task(description)
            self._progress.start()
        self._progress.update(self._task, description=description, completed=done, total=total)


class LoadingBar:
    """A bar that appears with the first weights and is gone at the end: fetching the model may show one before."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._tasks:
            self._bar.stop()

    def update(self, num_done: int, num_weights: int) -> None:
        """Shows how many weights have come in, of how many."""
        self._show("loading weights", num_done, num_weights)

    def show_tuning(self, operator: str) -> None:
        """Shows which operator is being measured; how many there will be is not known."""
        self._show("tuning kernels", 0, None)
        self._bar.update(self._tasks["tuning kernels"], description=f"tuning {operator}")

    def update_capture(self, num_done: int, num_graphs: int) -> None:
        """Shows how many graphs are captured, of how many."""
        self._show("capturing graphs", num_done, num_graphs)

    def _show(self, what: str, num_done: int, total: int | None) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what)
            self._bar.start()
        self._bar.update(self._tasks[what], completed=num_done, total=total)

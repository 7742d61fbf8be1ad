"""The progress of loading a model, on standard error."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn


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
        self._task: TaskID | None = None

    def __enter__(self) -> LoadingBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._bar.stop()

    def update(self, num_done: int, num_weights: int) -> None:
        """Shows how many weights have come in, of how many."""
        if self._task is None:
            self._task = self._bar.add_task("loading weights")
            self._bar.start()
        self._bar.update(self._task, completed=num_done, total=num_weights)

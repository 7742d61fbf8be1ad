"""`sleb bench serve`: load on any OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sleb.benchmarks.load.options import ServeLoadOptions
from sleb.cli.bench.shared import OutputOptions
from sleb.cli.options import with_options
from sleb.terminal import Console, tell

if TYPE_CHECKING:
    from sleb.benchmarks.record import Result


@with_options
def serve(
    options: ServeLoadOptions,
    output: OutputOptions,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Instead of --url: two servers in turns, B over A.",
            metavar="URL_A URL_B",
            show_default=False,
            rich_help_panel="Server",
        ),
    ] = None,
) -> None:
    """Load an OpenAI-compatible server, and measure throughput and latencies; or compare two.

    Prompts are random words, new in every run: a prefix cache has the chat template's beginning alone. Ctrl-C
    reports what is complete.
    """
    from sleb.benchmarks.serve import describe_client, run_serve

    environment = describe_client(options, ["sleb", *sys.argv[1:]])
    with _LoadBar() as bar:
        result = run_serve(options, environment, bar.show)
    with contextlib.suppress(typer.Exit):
        output.show(result)
    _exit(result)


def _exit(result: Result) -> None:
    """130 for an interrupted load; 1 where nothing was answered, or a server answered no more."""
    problem = result.settings.get("problem")
    rates = [each for each in result.measurements if each.metric == "tokens/s"]
    if problem is None and not result.complete:
        raise typer.Exit(130)
    if problem is None and not any(each.value for each in rates):
        reasons = sorted({reason for each in rates for reason in each.facts.get("failures", {})})
        problem = f"all requests failed: {'; '.join(reasons)}"
    if problem is not None:
        tell(f"error: {problem}", "red")
        raise typer.Exit(1)


class _LoadBar:
    """Requests done of all, how many run and how fast, on standard error: a bar in a terminal, else a line a level.

    It is drawn only when told, twice a second.
    """

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _LoadBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, num_done: int, num_requests: int | None, what: str) -> None:
        """What is under way, and how its load stands."""
        if num_done == 0 and self._bar.disable:
            tell(f"{what} …")
        self._bar.update(self._task, total=num_requests, completed=num_done, description=what, refresh=True)

"""The bar of a command that works in several phases."""

import io

from rich.console import Console
from rich.progress import TimeRemainingColumn

from sleb.cli.progress import Bar


def test_a_finished_phase_does_not_stop_the_clock_of_the_next() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with Bar(TimeRemainingColumn(), console=console, transient=False) as bar:
        bar.show("measuring", 1, 1)
        bar.show("searching", 0.5, 1)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "searching -:--:--" in shown  # finished would be 0:00:00


def test_a_bar_that_is_gone_at_the_end_leaves_nothing_in_a_log() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with Bar(TimeRemainingColumn(), console=console) as bar:
        bar.show("loading", 1, 2)
        bar.print("a line")
        bar.show("loading", 2, 2)
    assert console.file.getvalue() == "a line\n"  # type: ignore[attr-defined]

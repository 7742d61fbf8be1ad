"""What came out, as a table, a line and a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sleb.doctor.outcome import Outcome
from sleb.doctor.run import Examination, Result
from sleb.doctor.target import shown
from sleb.files import write_text
from sleb.terminal import Console

_STYLES = {
    Outcome.PASS: "green",
    Outcome.FAIL: "bold red",
    Outcome.MISSING: "red",
    Outcome.DIFFERS: "yellow",
    Outcome.SKIPPED: "dim",
}


def print_report(examination: Examination, console: Console) -> None:
    """A table of all checks, and a line with the counts."""
    model = "not named" if examination.model is None else shown(examination.model)
    console.print(Text(f"{examination.url}, model {model}"), soft_wrap=True)
    table = Table(pad_edge=False, box=None, header_style="bold")
    for heading in ("group", "check", "result"):
        table.add_column(heading, no_wrap=True)
    table.add_column("reason", overflow="fold")
    group = None
    for result in examination.results:
        shown_group = result.check.group if result.check.group != group else ""
        group = result.check.group
        outcome = Text(result.outcome, style=_STYLES[result.outcome])
        table.add_row(shown_group, result.check.name, outcome, Text(_reason(result)))
    console.print(table)
    console.print(Text(summary(examination)), soft_wrap=True)


def _reason(result: Result) -> str:
    if result.outcome in (Outcome.FAIL, Outcome.DIFFERS):
        return f"{result.reason}. Expected: {result.check.expected}"
    return result.reason


def summary(examination: Examination) -> str:
    """Counts, and whether the server passes."""
    verdict = "passes" if not examination.problems else f"does not pass: {len(examination.problems)} problems"
    return f"{', '.join(_counts(examination.results))}; the server {verdict}"


def _counts(results: list[Result]) -> Iterator[str]:
    for outcome in Outcome:
        number = sum(result.outcome is outcome for result in results)
        if number or outcome is Outcome.PASS:
            yield f"{number} {outcome}"


def write_json(examination: Examination, path: Path) -> None:
    """Everything into a file. Raises ConfigError if it cannot be written."""
    write_text(path, json.dumps(examination.to_json(), ensure_ascii=False, indent=2) + "\n")

"""Where the README's tables come from: the newest result file of a name, and its link below the table."""

from __future__ import annotations

import re
from pathlib import Path

from sleb.benchmarks.reports.document import Table
from sleb.benchmarks.reports.kinds import Result, read_result
from sleb.benchmarks.reports.markdown import table_lines
from sleb.errors import ConfigError

RESULTS = "benchmarks/results"  # as the README links it


class NotMeasuredError(ConfigError):
    """A table whose result file is not there."""


def newest(results: Path, name: str) -> Result:
    """Of DATE-NAME.json that of the latest date. Raises NotMeasuredError if there is none."""
    dated = re.compile(rf"\d{{4}}-\d{{2}}-\d{{2}}-{re.escape(name)}\.json")
    found = sorted(path for path in results.glob("*.json") if dated.fullmatch(path.name))
    if not found:
        raise NotMeasuredError(
            f"{results} has no DATE-{name}.json; measure it, or take its table out of the README"
        )
    return read_result(found[-1])


def table_text(table: Table, *sources: Result) -> str:
    """The table, and the files that it is from."""
    names = [Path(source.name).name for source in sources]
    links = ", ".join(f"[{name}]({RESULTS}/{name})" for name in names)
    return "\n".join([*table_lines(table), "", f"From {links}.", ""])


def percent(share: float, form: str = ".0%") -> str:
    """With a minus and a space, as −13 %."""
    return format(share, form).replace("-", "−").replace("%", " %")

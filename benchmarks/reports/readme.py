"""The README's tables of measurements, made from the result files: `scripts/readme-tables` puts them between markers.

    <!-- table: peers -->
    | … |
    <!-- end of table -->

A function a table. Each reads the newest file DATE-NAME.json of its name, and names that file below the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sleb.benchmarks.reports.readme_pruning import depths_table, fronts_table, methods_table, search_table
from sleb.benchmarks.reports.readme_sources import RESULTS, NotMeasuredError, newest
from sleb.benchmarks.reports.readme_speed import (
    compare_table,
    formats_table,
    peers_table,
    serving_table,
    throughput_table,
)
from sleb.errors import ConfigError

__all__ = ["RESULTS", "TABLES", "NotMeasuredError", "check_markers", "fill", "newest", "outdated"]

_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:table:|end of table).*?-->")

TABLES: dict[str, Callable[[Path], str]] = {
    "peers": peers_table,
    "throughput": throughput_table,
    "serving": serving_table,
    "compare": compare_table,
    "weight-formats": formats_table,
    "depths": depths_table,
    "search": search_table,
    "methods": methods_table,
    "fronts": fronts_table,
}


def fill(readme: str, results: Path) -> str:
    """The README with every table made anew. Raises ConfigError for a table that is not known, or a lone marker."""
    check_markers(readme)
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]](results)}{found[4]}", readme)


def check_markers(readme: str) -> None:
    """Raises ConfigError for markers that do not come in pairs, or that name no table."""
    markers = _MARKER.findall(readme)
    paired = [marker for found in _MARKED.finditer(readme) for marker in (found[1].strip(), found[4])]
    if markers != paired:
        raise ConfigError(
            "a marker of the README has no partner; write '<!-- table: NAME -->' on a line before a table and "
            "'<!-- end of table -->' on one after it"
        )
    for _, name, *_ in _MARKED.findall(readme):
        if name not in TABLES:
            raise ConfigError(
                f"the README marks a table '{name}', which is not known; choose from {', '.join(TABLES)}"
            )


def outdated(readme: str, results: Path) -> list[str]:
    """The names of the tables that are not what the result files say, or not in the README. Raises ConfigError.

    A table that has no result file yet need not be in the README.
    """
    check_markers(readme)
    shown: dict[str, set[str]] = {}
    for _, name, body, _ in _MARKED.findall(readme):
        shown.setdefault(name, set()).add(body)
    found = []
    for name, make in TABLES.items():
        try:
            expected = make(results)
        except NotMeasuredError:
            if name in shown:
                raise
            continue
        if shown.get(name) != {expected}:
            found.append(name)
    return found

"""Result files: those of now, and those of throughput from before every result was made of measurements."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sleb.benchmarks.record import Measurement, Ratio, Result, read_json
from sleb.errors import ConfigError

Document = Mapping[str, Any]


def load(path: Path) -> Result:
    """The result in a file of either form. Raises ConfigError for a file that is neither, naming it."""
    return read_result(read_json(path), str(path))


def read_result(document: Document, name: str) -> Result:
    """The result in a JSON object of either form. Raises ConfigError for what is neither, with `name`."""
    try:
        result = Result.of_document(document) if isinstance(document.get("notes"), list) else _old(document)
        seen = set()
        for each in result.measurements:
            ratio = each.ratio or Ratio(1.0)
            figures = (each.value, *(each.spread or ()), ratio.estimate, ratio.low, ratio.high)
            if not all(math.isfinite(figure) for figure in figures if figure is not None):
                raise ValueError("a figure is not finite")
            if each.key in seen or not all(isinstance(part, str) for part in each.key):
                raise ValueError("a figure is there twice, or a name is none")
            seen.add(each.key)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} is no result of sleb; give a file that `sleb bench --json` or `sleb eval --json` wrote"
        ) from error
    return result


def _old(document: Document) -> Result:
    if document["kind"] != "throughput":
        raise ValueError("no other kind was kept in the form of before")
    settings = dict(document.get("settings") or {}, model=document.get("model"))
    notes = list((document.get("conditions") or {}).get("notices", ()))
    found, environment = list(_throughput(document)), dict(document.get("environment") or {})
    return Result("throughput", environment, settings, found, notes, bool(document.get("complete", True)))


def _ratio(row: Document, name: str) -> Ratio | None:
    """None for a baseline, whose ratio is exactly 1 by definition."""
    if row.get(name) is None or row.get("verdict") == "baseline":
        return None
    return Ratio(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))


def _spread(row: Document, name: str) -> tuple[float, float] | None:
    low, high = row.get(f"{name}_interval") or (row.get(f"{name}_low"), row.get(f"{name}_high"))
    return None if low is None or high is None else (low, high)


def _throughput(document: Document) -> Iterator[Measurement]:
    for row in document["rows"]:
        work = f"{row['output_tokens']} after {row['prompt_tokens']}"
        case = f"{row['test']} {row['batch']} × {row['prompt_tokens'] if row['test'] == 'prompt' else work}"
        subject = row.get("variant") or f"depth {row['depth']}"
        names = ("ideal_speedup", "roofline_share")
        facts = {name: row[name] for name in names if row.get(name) is not None}
        rate, spread = row["tokens_per_second"], _spread(row, "tokens_per_second")
        yield Measurement(case, subject, "tokens/s", rate, spread, _ratio(row, "speedup"), facts)

"""The tables of `sleb bench serve`, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sleb.benchmarks.report import widen

_COLUMNS = (
    *("requests", "failed", "requests/s", "tokens/s", "with prompts", "TTFT", "p99", "TPOT", "p99"),
    *("ITL p99", "latency", "p99", "most at once"),
)
_MILLISECONDS = (
    "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms", "median_e2el_ms", "p99_e2el_ms",
)  # fmt: skip
# Metric of a comparison -> what people call it.
_SHOWN_METRICS = {
    "output_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "median_ttft_ms": "TTFT, ms",
    "median_tpot_ms": "TPOT, ms",
}


def print_serving(result: Mapping[str, Any], console: Console) -> None:
    """A line of what was loaded, a row a level and below it its tiers, comparisons, and what they mean."""
    widen(console)

    def say(text: str) -> None:
        console.print(as_text(text), soft_wrap=True)

    settings = result["settings"]
    for name, url in zip(("A", "B"), settings["urls"], strict=False):
        server = result["servers"][name] if "servers" in result else result["server"]
        software = " ".join(filter(None, (server["owned_by"] or server["software"], server["version"])))
        say(f"{name + ': ' if 'servers' in result else ''}{url}" + (f" ({software})" if software else ""))
    say(f"{result['model']['name']}, {settings['endpoint']}, {_lengths(settings)}")
    if result["rows"]:
        console.print(_level_table(result["rows"], bool(settings["goodput"])))
    if result.get("comparisons"):
        console.print(_comparison_table(result["comparisons"]))
    for note in notes(result):
        say(note)


def _lengths(settings: Mapping[str, Any]) -> str:
    output = f"{settings['output_tokens']} tokens"
    if settings["dataset"]:
        return f"prompts of {settings['dataset']}, answers of {output}"
    prefix = f"{settings['prefix_tokens']} shared + " if settings["prefix_tokens"] else ""
    spread = f", ± {settings['length_spread']:.0%}" if settings["length_spread"] else ""
    return f"prompts of {prefix}{settings['prompt_tokens']} tokens, answers of {output}{spread}"


def _level_table(rows: Sequence[Mapping[str, Any]], has_goodput: bool) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("load")
    for heading in (*_COLUMNS, *(("goodput/s",) if has_goodput else ())):
        table.add_column(heading, justify="right")
    for row in rows:
        label = f"{row['label']}: " if row["label"] else ""
        table.add_row(as_text(f"{label}{row['level']}"), *_cells(row, has_goodput))
        for tier in row["tiers"]:
            table.add_row(as_text(f"  {tier['model_id']}"), *_cells(tier, has_goodput), style="dim")
    return table


def _cells(row: Mapping[str, Any], has_goodput: bool) -> list[str]:
    cells = [
        str(row["completed"]),
        str(row["failed"] or ""),
        *(number(row[key]) for key in ("request_throughput", "output_throughput", "total_token_throughput")),
        *(number(row[key]) for key in _MILLISECONDS),
        str(row["max_concurrent_requests"]),
    ]
    return [*cells, number(row["request_goodput"])] if has_goodput else cells


def _comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("load", "metric"):
        table.add_column(heading)
    for heading in ("A", "B", "B over A", "low–high"):
        table.add_column(heading, justify="right")
    table.add_column("B is")
    previous = ""
    for each in comparisons:
        if previous and previous != each["level"]:
            table.add_section()
        table.add_row(
            as_text("" if previous == each["level"] else each["level"]),
            _SHOWN_METRICS[each["metric"]],
            number(each["a"]),
            number(each["b"]),
            f"{each['speedup']:.3f}",
            f"{each['speedup_low']:.3f}–{each['speedup_high']:.3f}",
            "no different" if each["verdict"] == "no difference" else each["verdict"],
        )
        previous = each["level"]
    return table


def as_text(text: str) -> Text:
    """What servers and users wrote, as they wrote it: Rich would take what stands in brackets for its own marks."""
    return Text(printable(text))


def printable(text: str) -> str:
    """`text` with escapes for what moves a cursor, and for what no terminal can be sent."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    lines = []
    if not result["complete"] and "problem" not in result:  # which is a notice
        lines.append("Interrupted: only what was complete by then is counted.")
    lines += result["conditions"]["notices"]
    if result["rows"]:
        lines.append(
            "tokens/s: of answers, over the whole duration. TTFT, TPOT, latency: medians in milliseconds, p99 beside "
            "them. ITL: between chunks, of which one may hold several tokens."
        )
    if result["rows"] and result["settings"]["goodput"]:
        limits = ", ".join(f"{name} ≤ {value:g} ms" for name, value in result["settings"]["goodput"].items())
        lines.append(f"goodput: requests a second that keep {limits}.")
    comparisons = result.get("comparisons")
    if comparisons:
        level = comparisons[0]["speedup_level"]
        ends = (
            f"the {level:.0%} interval"
            if level
            else "the least and the greatest: too few rounds for an interval"
        )
        lines.append(
            f"B over A: above 1 B is better (of times A / B), paired in {len(comparisons[0]['speedup_samples'])} "
            f"rounds; low–high: {ends}."
        )
    return lines


def number(value: float | None) -> str:
    """Three digits, or all before the point; nothing for null."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

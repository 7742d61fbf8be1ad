"""The result of `sleb bench peers` for people: all pairs, the engines, their memory, and what to know of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sleb.benchmarks.report import widen

_COLOURS = {"faster": "green", "slower": "red"}
_NOT_TOLD = "not told"


def print_peers(result: Mapping[str, Any], console: Console) -> None:
    """Tables, and below them notes."""
    widen(console)
    if result["rows"]:
        console.print(_pairs(result["rows"]))
        console.print(_engines(result["engines"]))
        if result["memory"]:
            console.print(_memory(result["memory"]))
    for note in notes(result):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the tables must know."""
    lines = []
    if not result["complete"] and "problem" not in result:
        lines.append("Interrupted: only complete repetitions are shown.")
    lines += [f"Took no part, {name}: {text}" for name, text in result["failures"].items()]
    lines += result["conditions"]["notices"]
    if any(row["verdict"] is None for row in result["rows"]):
        lines.append(
            "Fewer than six repetitions: the interval is from the least to the greatest, and there is no verdict."
        )
    for label, shares in result["floor_shares"].items():
        if shares:
            spread = f"{median(shares):.2f} ({min(shares):.2f}–{max(shares):.2f})"
            lines.append(
                f"decode-1, {label}: {spread} of the speed at which memory gives the weights, read beside it."
            )
    return lines


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Table:
    levels = {row["ratio_level"] for row in rows}
    interval = f"{levels.pop():.0%} interval" if levels == {0.95} else "interval"
    right = ("sleb, tokens/s", "peer, tokens/s", "ratio", interval, "runs")
    table = _table("test", "sleb", "peer", right=right)
    table.add_column("sleb is")
    previous = None
    for row in rows:
        if previous not in (None, row["test"]):
            table.add_section()
        runs = f"{row['repetitions']}" + (f" ({row['disturbed']} disturbed)" if row["disturbed"] else "")
        word = row["verdict"] or ""
        table.add_row(
            "" if row["test"] == previous else row["test"],
            row["weight_format"],
            Text(row["peer"]),
            f"{row['rate']:,.1f}",
            f"{row['peer_rate']:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}",
            runs,
            Text(word, _COLOURS.get(word, "")),
        )
        previous = row["test"]
    return table


def _engines(engines: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("engine", "version", "computes in", "attention", "compiled", "threads", "over", right=())
    for name, facts in engines.items():
        version, *told = (_fact(facts.get(key)) for key in ("version", "attention", "compiled", "threads"))
        cells = [name, version, _dtype(facts), *told, facts.get("transport", "calls")]
        table.add_row(*map(Text, cells))  # what engines tell of themselves is no markup
    return table


def _dtype(facts: Mapping[str, Any]) -> str:
    """dtype and weights, as far as they are told."""
    dtype, weights = facts.get("dtype"), facts.get("weights")
    known = [*([str(dtype)] if dtype else []), *([f"{weights} weights"] if weights else [])]
    return ", ".join(known) or _NOT_TOLD


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _NOT_TOLD if value is None else str(value)


def _memory(memory: Mapping[str, Mapping[str, int]]) -> Table:
    table = _table("engine", right=("peak memory", "shared pages once", "processes"))
    for name, facts in memory.items():
        pss = f"{facts['pss'] / 2**20:,.0f} MiB" if facts.get("pss") else ""
        table.add_row(Text(name), f"{facts['peak_rss'] / 2**20:,.0f} MiB", pss, str(facts["processes"]))
    return table


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right")
    return table

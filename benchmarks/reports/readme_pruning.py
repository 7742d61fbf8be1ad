"""The README's tables of what is removed, what that costs and what finding it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sleb.benchmarks.reports.document import Table
from sleb.benchmarks.reports.quality import prune_perplexities
from sleb.benchmarks.reports.readme_sources import newest, percent, table_text
from sleb.benchmarks.reports.shown import estimate

_SEARCHES = ("search-smollm2-8x512", "search-smollm2-4x512")


def depths_table(results: Path) -> str:
    """What depth costs on the search's own text: the first depths, then every other one."""
    result = newest(results, "prune-smollm2")
    found = {
        depth: value for depth, value in prune_perplexities(result).items() if depth <= 4 or depth % 2 == 0
    }
    cells = [f"{value:.1f}" if value < 99.95 else f"{value:.0f}" for value in found.values()]
    return table_text(Table(["depth", *map(str, found)], (), [["perplexity", *cells]]), result)


def search_table(results: Path) -> str:
    """How much faster than the authors' algorithm the modes search, and what they find."""
    found = [newest(results, name) for name in _SEARCHES]
    headings = ["search"]
    for result in found:
        settings = result.settings
        headings += [
            f"{settings['remove']} rounds over {settings['windows']} windows",
            "same blocks as exact",
        ]
    lines = []
    for mode in ("exact", "race", "gradient"):
        line = [mode]
        for result in found:
            summary = result.data["summary"][mode]
            over, agreement = summary["speedup_over_reference"], summary["agreement"]
            line.append(f"{estimate(over['median'], over['low'], over['high'])} times")
            line.append("" if mode == "exact" else _same(agreement["same_set"], agreement["loss_ratio"]))
        lines.append(line)
    return table_text(Table(headings, (), lines), *found)


def methods_table(results: Path) -> str:
    """Perplexity of both texts and answers that loop, by rule and count: the best of the last count first."""
    result = newest(results, "methods-smollm2")
    counts = sorted({row["count"] for row in result.rows if row["count"]})
    headings = ["blocks chosen by"]
    for count in counts:
        headings += [f"{count} removed: perplexity", "held out", "answers that loop"]
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in result.rows:
        if row["count"]:
            found.setdefault(row["method"], {}).setdefault(row["count"], []).append(dict(row))
    order = sorted(found, key=lambda name: _middle(found[name][counts[-1]], "held_out_perplexity"))
    lines = []
    for name in order:
        line = [name if len(found[name][counts[0]]) == 1 else f"{name} (median)"]
        for count in counts:
            rows = found[name][count]
            looped = median(row["answers"]["looped"] for row in rows)
            line += [
                *(_rounded(_middle(rows, key)) for key in ("perplexity", "held_out_perplexity")),
                percent(looped),
            ]
        lines.append(line)
    return table_text(Table(headings, (), lines), result)


def _middle(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return median(math.inf if row[key] is None else row[key] for row in rows)


def _rounded(perplexity: float) -> str:
    if perplexity >= 1e6:
        return "over a million"
    return f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:,.0f}"


def fronts_table(results: Path) -> str:
    """What is removed for which speedup, by kind of unit: the depths that were measured."""
    result = newest(results, "fronts-smollm2")
    lines = []
    for row in result.rows:
        if row["measured_speedup"] is None:
            continue
        lines.append(
            [
                f"{row['depth']} {row['map']}",
                *(percent(-row[key]) for key in ("parameters_removed", "kv_removed")),
                f"{row['perplexity']:.1f}",
                f"{row['held_out_perplexity']:.1f}",
                f"{row['predicted_speedup']:.2f}",
                estimate(row["measured_speedup"], row["measured_low"], row["measured_high"]),
            ]
        )
    headings = ["removed", "parameters", "KV", "perplexity", "held out", "speedup, predicted", "measured"]
    return table_text(Table(headings, (), lines), result)


def _same(share: float, loss_ratio: float) -> str:
    more = f", loss {percent(loss_ratio - 1, '+.1%')}" if share < 1 else ""
    return percent(share) + more

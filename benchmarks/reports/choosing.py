"""Sections about which blocks to remove, and what finding them takes: methods, search, fronts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from sleb.benchmarks.reports.document import Block, Bullets, Paragraph, Section, Table, unrepeated
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.shown import estimate, number, rate, share, spaced, spread

Row = Mapping[str, Any]


def methods_section(result: Result) -> Section:
    """As the table of `sleb bench methods`: the best of each count first."""
    answered = any(row.get("answers") for row in result.rows)
    columns = ("calibration", "held out", *(("loops", "stops early", "same as dense") if answered else ()))
    lines = []
    for row in sorted(result.rows, key=_rank):
        cells = [_perplexity(row[key]) for key in ("perplexity", "held_out_perplexity")]
        if answered:
            answers = row.get("answers") or {}
            cells += [share(answers.get(key)) for key in ("looped", "early", "identical")]
        lines.append([str(row["count"]), method(row), ", ".join(map(str, row["removed"])), *cells])
    blocks: list[Block] = [
        Table(("blocks", "method", "removed"), columns, unrepeated(lines)),
        Paragraph(
            "calibration, held out: perplexity of the two texts. loops: answers that end in a repeated piece; "
            "stops early: empty, or a quarter of the dense answer."
        ),
    ]
    if speed := result.data.get("speed"):
        blocks += method_speed_section(Result(speed, "method-speed", result.name)).blocks
    return Section(_method_sentences(result.rows), blocks)


def method(row: Row) -> str:
    """A method's name, with the seed of a random one."""
    return str(row["method"]) if row.get("seed") is None else f"{row['method']} {row['seed']}"


def _rank(row: Row) -> tuple[int, float]:
    value = row["held_out_perplexity"]
    return row["count"], math.inf if value is None else value


def _perplexity(value: float | None) -> str:
    return "over 1e304" if value is None else f"{value:.2f}"


def _method_sentences(rows: Sequence[Row]) -> list[str]:
    """For each count, which method has the lowest held-out perplexity, random ones by their median."""
    sentences = []
    for count in spaced(sorted({row["count"] for row in rows if row["count"]}), 3):
        found: dict[str, list[float]] = {}
        for row in rows:
            if row["count"] == count:
                found.setdefault(row["method"], []).append(_rank(row)[1])
        best, *others = sorted((median(values), name) for name, values in found.items())
        then = f", then {others[0][1]} with {others[0][0]:.3g}" if others else ""
        sentences.append(
            f"Of {count} blocks removed, {best[1]} costs least: held-out perplexity {best[0]:.3g}{then}."
        )
    return sentences


def method_speed_section(result: Result) -> Section:
    """As the table of `sleb bench methods --speed`."""
    removed = result.data["parameters_removed"]
    lines = [
        [
            row["load"],
            row["variant"],
            f"−{removed[row['variant']]:.0%}" if row["variant"] in removed else "",
            f"{row['seconds']:.3g}",
            number(row["speedup"], ".3f"),
            spread(row.get("speedup_low"), row.get("speedup_high")),
        ]
        for row in result.rows
    ]
    columns = ("parameters of blocks", "seconds", "speedup", "low–high")
    note = result.data.get("note_2:4")
    return Section(
        [],
        [
            Table(("load", "removed by"), columns, unrepeated(lines)),
            Paragraph(
                f"speedup: over dense, median of ratios within a repetition.{f' 2:4: {note}.' if note else ''}"
            ),
        ],
    )


def search_section(result: Result) -> Section:
    """As the table of `sleb bench search`."""
    lines = []
    for mode, found in result.data["summary"].items():
        agreement = found["agreement"]
        lines.append(
            [
                mode,
                f"{found['seconds']:,.1f}",
                rate(found.get("tokens_per_second")),
                ratio(found.get("speedup_over_reference")),
                ratio(found.get("speedup_over_exact")),
                share(agreement["same_round"]),
                share(agreement["same_set"]),
                f"{agreement['loss_ratio']:.4f}",
            ]
        )
    columns = ("seconds", "tokens/s", "over reference", "over exact", "same unit", "same set", "loss / exact")
    return Section(
        _search_sentences(result),
        [
            Paragraph(f"{_search_in_words(result)}; draws of the text: {result.settings['draws']}."),
            Table(("mode",), columns, lines),
            Bullets(
                [
                    "reference: the authors' algorithm on the same kernels. tokens/s: of calibration text, times the "
                    "candidates computed on it.",
                    "same unit: in the same round as exact; same set: in any round. loss: after the last round, "
                    "median over the draws.",
                ]
            ),
        ],
    )


def ratio(found: Mapping[str, float] | None) -> str:
    """A median with its ends, as the search's summary holds it."""
    return "" if found is None else estimate(found["median"], found["low"], found["high"])


def _search_in_words(result: Result) -> str:
    settings = result.settings
    return f"{settings['remove']} rounds over {settings['windows']} windows of {settings['seqlen']:,} tokens"


def _search_sentences(result: Result) -> list[str]:
    parts = []
    for mode, found in result.data["summary"].items():
        over = found.get("speedup_over_reference")
        if over is not None and mode != "reference":
            same = (
                f" ({found['agreement']['same_set']:.0%} of the blocks as exact)" if mode != "exact" else ""
            )
            parts.append(f"{mode} {ratio(over)}{same}")
    if not parts:
        return []
    return [
        f"A search of {_search_in_words(result)}, times as fast as the authors' algorithm: {', '.join(parts)}."
    ]


def fronts_section(result: Result) -> Section:
    """As the table of `sleb bench fronts`."""
    columns = (
        *(
            "depth",
            "parameters",
            "KV",
            "perplexity",
            "held out",
            "speedup, predicted",
            "measured",
            "low–high",
        ),
    )
    lines = [
        [
            row["map"],
            str(row["depth"]),
            number(-row["parameters_removed"], ".1%") if row["parameters_removed"] else "",
            number(-row["kv_removed"], ".1%") if row["kv_removed"] else "",
            number(row.get("perplexity"), ".2f"),
            number(row.get("held_out_perplexity"), ".2f"),
            number(row["predicted_speedup"], ".3f"),
            number(row.get("measured_speedup"), ".3f"),
            spread(row.get("measured_low"), row.get("measured_high")),
        ]
        for row in result.rows
    ]
    return Section(
        [],
        [
            Table(("map",), columns, unrepeated(lines)),
            Paragraph(
                "parameters: of the blocks' weights, removed. KV: of the cache, saved. speedup: of a decoding step of "
                f"{result.settings.get('batch', 'the same')} requests over the whole model."
            ),
        ],
    )

"""What `sleb eval` tells people: a table for each part, what its columns mean, and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks import plots
from sleb.benchmarks.old import read_result
from sleb.benchmarks.quality.interval import Interval
from sleb.benchmarks.quality.rows import QualityReport, QualityRow
from sleb.benchmarks.report import widen


def print_quality(report: QualityReport, console: Console) -> None:
    """Tables and notes of the parts that were measured."""
    widen(console)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    rows, environment = report.rows, report.environment
    where = environment.get("gpu") or environment.get("cpu") or environment.get("system")
    say(f"{report.model['name']}, {environment.get('dtype')} on {where}")
    if rows[0].tokens is not None:
        say(_text_title(report))
        console.print(_text_table(rows))
        if rows[0].texts:
            console.print(_by_text_table(rows))
    if rows[0].generation is not None:
        console.print(_generation_table(rows))
    if rows[0].tasks is not None:
        console.print(_task_table(rows))
    for note in notes(report):
        say(note)


def _text_title(report: QualityReport) -> str:
    settings, rows = report.settings, report.rows
    windows = sum(settings["windows"])
    return (
        f"{settings['dataset']}: {rows[0].tokens:,} tokens predicted in {windows} windows of {settings['seqlen']}, "
        f"as in {'SLEB and GPTQ' if settings['windows_like'] == 'sleb' else 'lm-eval'}"
    )


def _new_table(title: str | None, headings: Sequence[str], num_left: int = 0) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True, title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < num_left else "right")
    return table


def _text_table(rows: Sequence[QualityRow]) -> Table:
    headings = ["depth", "perplexity", "95 %", "over dense", "95 %", "same token", "95 %", "KL", "95 %"]
    by_word = rows[0].word_perplexity is not None
    table = _new_table(None, headings + ["a word", "a byte", "bits a byte"] * by_word)
    for row in rows:
        cells = [str(row.depth), _number(row.perplexity, ".3f"), _range(row.perplexity_interval, ".3f")]
        cells += [_number(row.ratio, ".4f"), _range(row.ratio_interval, ".4f")]
        cells += [_number(row.agreement, ".1%"), _range(row.agreement_interval, ".1%")]
        cells += [_number(row.kl, ".4f"), _range(row.kl_interval, ".4f")]
        if by_word:
            cells += [_number(row.word_perplexity, ".3f"), _number(row.byte_perplexity, ".4f")]
            cells += [_number(row.bits_per_byte, ".4f")]
        table.add_row(*cells)
    return table


def _by_text_table(rows: Sequence[QualityRow]) -> Table:
    table = _new_table("By text: perplexity, and over the dense model's", ["text", "tokens"], 1)
    for row in rows:
        table.add_column(f"depth {row.depth}", justify="right")
    for place, first in enumerate(rows[0].texts):
        found = [row.texts[place] for row in rows]
        cells = [
            _number(each["perplexity"], ".3f") + ("" if each["ratio"] is None else f" ({each['ratio']:.3f})")
            for each in found
        ]
        table.add_row(first["name"], f"{first['tokens']:,}", *cells)
    return table


def _generation_table(rows: Sequence[QualityRow]) -> Table:
    first = rows[0].generation
    assert first is not None
    headings = [
        "depth",
        "tokens",
        "repeated",
        "looped",
        "empty",
        "unfinished",
        "early",
        "identical",
        "common start",
    ]
    table = _new_table(f"{first.answers} greedy answers", headings)
    for row in rows:
        if (found := row.generation) is not None:
            shares = (
                found.repeated,
                found.looped,
                found.empty,
                found.unfinished,
                found.early,
                found.identical,
            )
            cells = [f"{found.mean_tokens:.1f}", *(_number(share, ".0%") for share in shares)]
            table.add_row(str(row.depth), *cells, _number(found.common_prefix, ".1f"))
    return table


def _task_table(rows: Sequence[QualityRow]) -> Table:
    measured = [row for row in rows if row.tasks is not None]
    headings = ["task", "metric", *(f"depth {row.depth}" for row in measured)]
    table = _new_table("lm-eval, ± standard error", headings, 2)
    for task, metrics in (measured[0].tasks or {}).items():
        for number, metric in enumerate(metrics):
            scores = [(row.tasks or {}).get(task, {}).get(metric) for row in measured]
            cells = [
                "" if score is None
                else f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")
                for score in scores
            ]  # fmt: skip
            table.add_row("" if number else task, metric, *cells)
    return table


def notes(report: QualityReport) -> list[str]:
    """What a reader of the tables must know."""
    rows, lines = report.rows, []
    if not report.complete:
        lines.append("Cut short: only what was complete by then is shown.")
    if rows[0].tokens is not None:
        lines.append(
            "over dense, same token, KL (dense ‖ depth, in nats): against depth 0 on the same tokens. 95 %: by batch "
            "means over stretches of the text, paired where depths are compared; they speak for text like this one."
        )
        if any(row.perplexity is None for row in rows):
            lines.append("A perplexity that is not a finite number is left out; try --dtype float32.")
    if rows[0].generation is not None:
        lines.append(
            "repeated: four tokens in a row come more than three times. looped: the end is one piece said three times "
            "or more. unfinished: cut at the limit of tokens. early: empty, or below a quarter of the dense answer's "
            "tokens. common start: tokens before the first that differs from the dense answer."
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _range(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f"{interval[0]:{form}}–{interval[1]:{form}}"


def draw_quality(report: QualityReport, stem: Path) -> None:
    """Quality by depth, with intervals, as PNG and SVG. Raises ConfigError."""
    plots.draw_quality(read_result(json.loads(report.to_json()), "the result"), stem, (".png", ".svg"))

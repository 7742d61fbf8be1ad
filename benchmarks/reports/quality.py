"""Sections about what pruning and quantising cost: perplexity, answers, tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sleb.benchmarks.reports.document import Block, Bullets, Paragraph, Section, Table, unrepeated
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.shown import number, plural, share, size, spread, unit_noun

Row = Mapping[str, Any]

_ANSWERS = {
    "repeated": "repeated",
    "looped": "looped",
    "empty": "empty",
    "unfinished": "unfinished",
    "early": "early",
    "identical": "identical",
}
_TEXT_MEANING = (
    "over dense, same token, KL (dense ‖ depth, in nats): against depth 0 on the same tokens. 95 %: by batch means "
    "over stretches of the text, paired where depths are compared; they speak for text like this one."
)
_ANSWERS_MEANING = (
    "repeated: four tokens in a row come more than three times. looped: the end is one piece said three times or more. "
    "unfinished: cut at the limit of tokens. early: empty, or below a quarter of the dense answer's tokens. common "
    "start: tokens before the first that differs from the dense answer."
)


def quality_section(result: Result) -> Section:
    """As the tables of `sleb eval`: texts, answers, tasks, whichever there are."""
    rows, settings = result.rows, result.settings
    blocks: list[Block] = []
    meanings = []
    if any(row.get("tokens") is not None for row in rows):
        tokens = next(row["tokens"] for row in rows if row.get("tokens") is not None)
        blocks += [
            Paragraph(
                f"{dataset(result)}: {tokens:,} tokens predicted in windows of {settings.get('seqlen')}."
            ),
            _text_table(rows),
        ]
        meanings.append(_TEXT_MEANING)
        if any(row.get("texts") for row in rows):
            blocks += [Paragraph("By text: perplexity, and over the dense model's."), _by_text_table(rows)]
    if any(row.get("generation") for row in rows):
        blocks.append(_answers_table(rows))
        meanings.append(_ANSWERS_MEANING)
    if any(row.get("tasks") for row in rows):
        blocks += [Paragraph("Tasks of lm-eval, ± standard error."), _tasks_table(rows)]
    return Section([], [*blocks, Bullets(meanings)] if meanings else blocks)


def dataset(result: Result) -> str:
    """The name of the text that perplexity is of."""
    return str(result.settings.get("dataset") or "the text")


def perplexities(result: Result) -> dict[int, float]:
    """By depth, those that were measured."""
    return {row["depth"]: row["perplexity"] for row in result.rows if row.get("perplexity") is not None}


def _text_table(rows: Sequence[Row]) -> Table:
    columns = ["depth", "perplexity", "95 %", "over dense", "95 %", "same token", "95 %", "KL", "95 %"]
    by_word = any(row.get("word_perplexity") is not None for row in rows)
    forms = {"perplexity": ".3f", "ratio": ".4f", "agreement": ".1%", "kl": ".4f"}
    lines = []
    for row in rows:
        cells = [str(row["depth"])]
        for key, form in forms.items():
            low, high = row.get(f"{key}_interval") or (None, None)
            cells += [number(row.get(key), form), spread(low, high, form)]
        if by_word:
            cells += [number(row.get("word_perplexity"), ".3f"), number(row.get("byte_perplexity"), ".4f")]
            cells.append(number(row.get("bits_per_byte"), ".4f"))
        lines.append(cells)
    return Table((), columns + ["a word", "a byte", "bits a byte"] * by_word, lines)


def _by_text_table(rows: Sequence[Row]) -> Table:
    lines = []
    for place, first in enumerate(rows[0]["texts"]):
        cells = []
        for text in (row["texts"][place] for row in rows):
            ratio = "" if text.get("ratio") is None else f" ({text['ratio']:.3f})"
            cells.append(number(text["perplexity"], ".3f") + ratio)
        lines.append([first["name"], f"{first['tokens']:,}", *cells])
    return Table(("text",), ["tokens", *(f"depth {row['depth']}" for row in rows)], lines)


def _answers_table(rows: Sequence[Row]) -> Table:
    lines = []
    for row in rows:
        if found := row.get("generation"):
            shares = [share(found.get(key)) for key in _ANSWERS]
            tokens, common = number(found["mean_tokens"], ".1f"), number(found.get("common_prefix"), ".1f")
            lines.append([str(row["depth"]), str(found["answers"]), tokens, *shares, common])
    return Table((), ("depth", "greedy answers", "tokens", *_ANSWERS.values(), "common start"), lines)


def _tasks_table(rows: Sequence[Row]) -> Table:
    measured = [row for row in rows if row.get("tasks")]
    lines = []
    for task, metrics in measured[0]["tasks"].items():
        for metric in metrics:
            scores = [(row["tasks"].get(task) or {}).get(metric) for row in measured]
            lines.append([task, metric, *map(_score, scores)])
    return Table(("task", "metric"), [f"depth {row['depth']}" for row in measured], unrepeated(lines))


def _score(score: Row | None) -> str:
    if score is None:
        return ""
    error = score.get("stderr")
    return f"{score['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def quality_sentence(result: Result, depth: int) -> str:
    """What a depth costs, as "perplexity of wikitext2 rises from 24.9 to 51.2"; empty where it is not known."""
    found = perplexities(result)
    if 0 not in found or depth not in found or not depth:
        return ""
    verb = "rises" if found[depth] >= found[0] else "falls"
    return f"perplexity of {dataset(result)} {verb} from {found[0]:.3g} to {found[depth]:.3g}"


def formats_section(result: Result) -> Section:
    """As the table of `sleb.benchmarks.cpu_quality`."""
    lines = [
        [
            row["implementation"],
            row["weights"],
            str(row.get("dtype") or ""),
            number(row["perplexity"], ".4f"),
            number(row.get("ratio"), ".4f"),
            size(row.get("weight_bytes")),
            "" if row.get("seconds") is None else f"{row['seconds']:.1f} s",
        ]
        for row in result.rows
    ]
    summary = [
        f"{row['weights']} weights: perplexity {row['perplexity']:.3f}, {row['ratio'] - 1:+.2%} against bfloat16's."
        for row in result.rows
        if row.get("ratio") is not None
        and row["implementation"] == "sleb"
        and row["weights"] in ("int8", "int4")
    ]
    settings = result.settings
    scored = f"{settings['num_tokens']:,} tokens, windows of {settings['window']:,}." if settings else ""
    table = Table(
        ("implementation", "weights"), ("dtype", "perplexity", "over bfloat16", "size", "time"), lines
    )
    return Section(summary, [*([Paragraph(scored)] if scored else []), table])


def prune_section(result: Result) -> Section:
    """The losses of a search on its own calibration text, as perplexities."""
    found = prune_perplexities(result)
    removed = result.data["removed"]
    lines = [
        [str(depth), str(removed[depth - 1]) if depth else "", f"{value:.2f}", f"{value / found[0]:.3f}"]
        for depth, value in found.items()
    ]
    last = max(found)
    noun = unit_noun(removed[:last])
    summary = [
        f"By the search itself, removing {plural(last, noun)} raises the perplexity of its calibration text from "
        f"{found[0]:.3g} to {found[last]:.3g}."
    ]
    return Section(
        summary if last else [],
        [
            Table((), ("depth", "removed last", "perplexity", "over dense"), lines),
            Paragraph(f"The {noun}s were chosen on this text, so it flatters: other texts lose more."),
        ],
    )


def prune_perplexities(result: Result) -> dict[int, float]:
    """By depth: exp of the mean loss a token. The losses are sums over all tokens of the calibration windows."""
    calibration = result.data["calibration"]
    num_tokens = calibration["windows"] * calibration["seqlen"]
    return {depth: math.exp(loss / num_tokens) for depth, loss in enumerate(result.data["losses"])}

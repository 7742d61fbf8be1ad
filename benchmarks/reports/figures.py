"""Which plots a result gives, and their data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb.benchmarks.plots import Bar, Measure, plot_groups, plot_quality
from sleb.benchmarks.reports.document import Figure
from sleb.benchmarks.reports.drawings import draw_scaling, draw_speedups, draw_tradeoff
from sleb.benchmarks.reports.engines import by_test, ratio_meaning, words_of_test
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.quality import dataset, perplexities
from sleb.benchmarks.reports.serving import serve_figures
from sleb.benchmarks.reports.shown import plural, spaced
from sleb.benchmarks.reports.speed import is_baseline, is_depth, without_parts
from sleb.benchmarks.reports.speed_notes import num_counted, workload
from sleb.benchmarks.stats import LEAST_FOR_LEVEL

Row = Mapping[str, Any]

_MOST_LINES = 6  # depths in a plot with a line each
_MOST_BARS = 4  # depths in a plot with a bar each in every test


def slug(text: str) -> str:
    """A part of a file's name: small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "result"


def draw_figures(result: Result, folder: Path, name: str) -> list[Figure]:
    """The plots of one result, their files beginning with `name`. Raises ConfigError."""
    draw = _DRAW.get(result.kind)
    return [] if draw is None else list(draw(result, folder / name))


def draw_tradeoffs(speed: Result, quality: Result, stem: Path) -> Figure | None:
    """Speedup against perplexity of the depths that both results have; None for less than two of them."""
    found = perplexities(quality)
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in without_parts(speed.rows):
        if is_depth(row) and row["depth"] in found:
            lines.setdefault(workload(row), []).append(
                (row["speedup"], found[row["depth"]], str(row["depth"]))
            )
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    label = f"perplexity of {dataset(quality)}"
    draw_tradeoff(stem, lines, f"{_about(speed)}: what a speedup costs", label)
    return Figure(
        stem.name,
        f"{label[0].upper()}{label[1:]} against speedup, one point a depth, which stands beside it. "
        "The further down and to the right, the better.",
    )


def _about(result: Result) -> str:
    return ", ".join(filter(None, (result.model, result.weights)))


def _beside(stem: Path, name: str) -> Path:
    return stem.with_name(f"{stem.name}-{name}")


def _throughput(result: Result, stem: Path) -> Iterator[Figure]:
    rows = [row for row in result.rows if is_depth(row)]
    depths = sorted({row["depth"] for row in rows})
    if any(not is_baseline(row) for row in rows):
        yield _speedups(result, rows, _beside(stem, "speedup"))
    for test in ("generate", "decode"):
        yield from _scalings(result, [row for row in rows if row["test"] == test], stem)
    shares = _shares(rows, spaced(depths, _MOST_BARS))
    if shares:
        path = _beside(stem, "roofline")
        plot_groups(
            path, shares, title=f"{_about(result)}: share of the ceiling", form=".0%", mark=1.0,
            x_label="least time that memory and arithmetic allow, over the time taken",
            mark_label="as fast as the ceilings measured in the same run allow",
        )  # fmt: skip
        yield Figure(path.name, f"Share of the roofline by test and depth{_left_out(depths, _MOST_BARS)}.")


def _speedups(result: Result, rows: Sequence[Row], stem: Path) -> Figure:
    lines: dict[str, list[Bar]] = {}
    ideals: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["depth"]):
        speedup = row["speedup"]
        ends = (row.get("speedup_low", speedup), row.get("speedup_high", speedup))
        lines.setdefault(workload(row), []).append((row["depth"], speedup, *ends))
        if row.get("ideal_speedup") is not None:
            ideals.setdefault(workload(row), []).append((row["depth"], row["ideal_speedup"]))
    draw_speedups(stem, lines, ideals, f"{_about(result)}: speedup by depth")
    caption = "Speedup by depth with its interval, beside the ideal, a panel a test."
    if any(row.get("speedup_level") is None for row in rows):
        caption += (
            f" With fewer than {LEAST_FOR_LEVEL} repetitions its ends are the least and the greatest ratio."
        )
    return Figure(stem.name, caption)


def _scalings(result: Result, rows: Sequence[Row], stem: Path) -> Iterator[Figure]:
    """Throughput of one test, a figure for each of its lengths against the batch.

    Decoding at more contexts than batches is a sweep over contexts: a figure for each batch against the context.
    """
    batches, contexts = ({row[key] for row in rows} for key in ("batch", "prompt_tokens"))
    sweeps = any(row["test"] == "decode" for row in rows) and len(contexts) > len(batches)
    x, fixed = ("prompt_tokens", "batch") if sweeps else ("batch", "prompt_tokens")
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["depth"], row[x])):
        groups.setdefault((row[fixed], row["output_tokens"]), []).append(row)
    for (value, output_tokens), own in sorted(groups.items()):
        if len({row[x] for row in own}) > 1:
            name = f"{'context' if sweeps else 'batch'}-{own[0]['test']}"
            if len(groups) > 1:
                name += f"-{value}-{output_tokens}"
            yield _scaling(result, own, x, _beside(stem, name))


def _scaling(result: Result, rows: Sequence[Row], x: str, stem: Path) -> Figure:
    """Rows of one test that differ in depth and in `x`: "batch", or "prompt_tokens", the context."""
    first = rows[0]
    every = sorted({row["depth"] for row in rows})
    drawn = spaced(every, _MOST_LINES)
    lines: dict[str, list[Bar]] = {}
    for row in rows:
        if row["depth"] in drawn:
            value = row["tokens_per_second"]
            ends = (row.get("tokens_per_second_low", value), row.get("tokens_per_second_high", value))
            lines.setdefault(f"depth {row['depth']}", []).append((row[x], value, *ends))
    tokens = f"{num_counted(first):,} tokens"
    if x == "batch":
        against, label = "batch", "requests at once"
        what = f"{tokens} after {first['prompt_tokens']:,}"
    else:
        against, label = "context", "tokens of context"
        what = f"{plural(first['batch'], 'request')} of {tokens}"
    title = f"{_about(result)}: {first['test']} of {what}, by {against}"
    draw_scaling(stem, lines, title=title, x_label=label, y_label="tokens/s")
    return Figure(
        stem.name,
        f"Throughput ({first['test']}: {what}) against the {against}, by depth{_left_out(every, _MOST_LINES)}.",
    )


def _left_out(depths: Sequence[int], most: int) -> str:
    return f"; {most} of {len(depths)} depths are drawn" if len(depths) > most else ""


def _shares(rows: Sequence[Row], depths: Sequence[int]) -> dict[str, list[Measure]]:
    groups: dict[str, list[Measure]] = {}
    for row in sorted(rows, key=lambda row: row["depth"]):
        value = row.get("roofline_share")
        if value is not None and row["depth"] in depths:
            groups.setdefault(workload(row), []).append((f"depth {row['depth']}", value, value, value))
    return groups


def _peers(result: Result, stem: Path) -> Iterator[Figure]:
    formats: dict[str, dict[str, list[Measure]]] = {}
    for row in by_test(result):
        ends = (row.get("ratio_low", row["ratio"]), row.get("ratio_high", row["ratio"]))
        groups = formats.setdefault(row["weight_format"], {})
        groups.setdefault(words_of_test(row["test"]), []).append((row["peer"], row["ratio"], *ends))
    for weight_format, groups in formats.items():
        value, whiskers = ratio_meaning(row for row in result.rows if row["weight_format"] == weight_format)
        path = _beside(stem, slug(weight_format))
        plot_groups(
            path, groups, title=f"{result.model}: sleb {weight_format} against other engines", form=".2f", mark=1.0,
            x_label="tokens/s over the other engine's (higher is better)", mark_label="as fast as the other engine",
        )  # fmt: skip
        yield Figure(
            path.name,
            f"sleb with {weight_format} weights against other engines: {value}, whiskers to {whiskers}.",
        )


def _quality(result: Result, stem: Path) -> Iterator[Figure]:
    bars = [_bar(row, "perplexity") for row in result.rows if row.get("perplexity") is not None]
    agreements = [_bar(row, "agreement") for row in result.rows if row.get("agreement") is not None]
    if len(bars) > 1:
        path = _beside(stem, "by-depth")
        plot_quality(path, bars, agreements, f"{result.model} on {dataset(result)}: quality by depth")
        yield Figure(
            path.name, f"Perplexity of {dataset(result)}, and how often the next token stays, by depth."
        )


def _bar(row: Row, key: str) -> Bar:
    value = row[key]
    low, high = row.get(f"{key}_interval") or (value, value)
    return float(row["depth"]), value, low, high


def _methods(result: Result, stem: Path) -> Iterator[Figure]:
    from sleb.benchmarks.methods import plot_methods  # loads torch

    if any(row["count"] == 0 and row["held_out_perplexity"] is not None for row in result.rows):
        plot_methods(result.data, stem)
        yield Figure(
            stem.name, "Perplexity of a held-out text by the number of blocks removed, a line a method."
        )


def _fronts(result: Result, stem: Path) -> Iterator[Figure]:
    from sleb.benchmarks.fronts import plot_fronts  # loads torch

    if result.rows:
        plot_fronts(result.data, stem)
        yield Figure(stem.name, "Perplexity against the predicted speedup, a line a layer map.")


_DRAW: dict[str, Callable[[Result, Path], Iterator[Figure]]] = {
    "throughput": _throughput,
    "serve": serve_figures,
    "peers": _peers,
    "quality": _quality,
    "methods": _methods,
    "fronts": _fronts,
}

"""The section, plots and main figures of `sleb bench serve`: throughput and latency by level of load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sleb.benchmarks.reports.document import Block, Bullets, Figure, Paragraph, Section, Table, unrepeated
from sleb.benchmarks.reports.drawings import draw_distributions, draw_scaling
from sleb.benchmarks.reports.facts import flat_environment
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.measure import Measure, sample_interval
from sleb.benchmarks.reports.shown import estimate, number, rate, share, spaced, spread

Row = Mapping[str, Any]

_MOST_LINES = 6  # levels in a plot with a line each
_LATENCIES = {"TTFT": "ttft", "TPOT": "tpot", "ITL": "itl", "E2EL": "e2el"}
# Metric of a comparison of two servers -> what people call it.
COMPARED = {
    "output_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "median_ttft_ms": "median TTFT, ms",
    "median_tpot_ms": "median TPOT, ms",
}
_MEANINGS = [
    "tokens/s: new tokens of all whole answers over the level's duration. TTFT: from the sending of a request to its "
    "first text. TPOT: a token after the first, an answer's mean. ITL: between pieces of text. E2EL: from the sending "
    "to the end. All in milliseconds, median and 99th percentile.",
    "N at once: so many clients, each of which waits for its answer. N requests/s: sent at random times, whatever "
    "becomes of the others.",
]


def serve_section(result: Result) -> Section:
    """A row a level; of several models, one for each below it."""
    lines = []
    for row in result.rows:
        lines.append([name_of(row), _whole(row), *_cells(row)])
        lines += [
            [f"{name_of(row)}: {tier['model_id']}", _whole(tier), *_cells(tier)]
            for tier in row.get("tiers") or ()
        ]
    latencies = [f"{name} {statistic}" for name in _LATENCIES for statistic in ("median", "p99")]
    columns = ("answers", "tokens/s", "requests/s", "good/s", *latencies, "client")
    blocks: list[Block] = [*map(Paragraph, _servers(result))]
    blocks += [Table(("level",), columns, lines).without_empty(), Bullets(_meanings(result))]
    if comparisons := result.data.get("comparisons"):
        blocks += _comparison(comparisons)
    return Section(_sentences(result), blocks)


def _servers(result: Result) -> list[str]:
    """What each server said of itself, in a line."""
    lines = []
    for name, facts in result.servers.items():
        shown = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in flat_environment(facts).items()
        )
        lines.append(f"{f'Server {name}' if name else 'Server'}: {shown}.")
    return lines


def _comparison(comparisons: Sequence[Row]) -> list[Block]:
    """Two servers: B over A."""
    lines = [
        [
            each["level"],
            COMPARED.get(each["metric"], each["metric"]),
            rate(each["a"]),
            rate(each["b"]),
            number(each["speedup"], ".3f"),
            spread(each["speedup_low"], each["speedup_high"]),
            verdict_in_words(each),
        ]
        for each in comparisons
    ]
    table = Table(("level", "metric"), ("A", "B", "B over A", "interval", "B is"), unrepeated(lines))
    return [
        table.without_empty(),
        Paragraph(
            "B over A: above 1 B is better (of times A / B), from ratios within rounds in which both met requests "
            "of the same lengths. Without a verdict the rounds were too few, and the interval is from the least to the "
            "greatest."
        ),
    ]


def verdict_in_words(compared: Row) -> str:
    """What B is; nothing of too few rounds."""
    if not compared.get("speedup_level"):
        return ""
    return "no different" if compared["verdict"] == "no difference" else str(compared["verdict"])


def speedup_in_words(compared: Row) -> str:
    """B over A with its interval; of too few rounds for one with the least and the greatest."""
    num_runs = None if compared.get("speedup_level") else len(compared.get("speedup_samples") or ()) or None
    return estimate(compared["speedup"], compared["speedup_low"], compared["speedup_high"], num_runs=num_runs)


def name_of(row: Row) -> str:
    """The level in words, after the row's label if it has one."""
    return ", ".join(str(part) for part in (row.get("label"), row["level"]) if part)


def _whole(row: Row) -> str:
    return f"{row['completed']:,}" + (f" ({row['failed']:,} failed)" if row["failed"] else "")


def _cells(row: Row) -> list[str]:
    latencies = [
        rate(row.get(f"{statistic}_{metric}_ms"))
        for metric in _LATENCIES.values()
        for statistic in ("median", "p99")
    ]
    return [
        rate(row["output_throughput"]),
        number(row["request_throughput"], ".3g"),
        number(row.get("request_goodput"), ".3g"),
        *latencies,
        share(row.get("client_cpu_share")),
    ]


def _meanings(result: Result) -> list[str]:
    lines = list(_MEANINGS)
    if goodput := result.settings.get("goodput"):
        limits = ", ".join(f"{metric.upper()} {limit:g} ms" for metric, limit in goodput.items())
        lines.append(f"good/s: requests a second that kept to {limits}.")
    lines.append("client: what the process that sent the load took of one processor.")
    return lines


def _sentences(result: Result) -> list[str]:
    """Of two servers how they compare; of one the first level, a middle one and the last."""
    compared = [
        each for each in result.data.get("comparisons") or () if each["metric"] == "output_throughput"
    ]
    if compared:
        shown = (f"{speedup_in_words(each)} with {each['level']}" for each in compared)
        return [f"Tokens/s of server B over server A's: {', '.join(shown)}."]
    sentences = []
    for row in spaced([row for row in result.rows if row["completed"]], 3):
        text = f"Serving {name_of(row)} gives {rate(row['output_throughput'])} tokens/s"
        # Tokens/s is a total over the duration, the others are of each answer.
        latencies = []
        if row.get("median_ttft_ms") is not None:
            latencies.append(f"the first token after {rate(row['median_ttft_ms'])} ms")
        if row.get("median_tpot_ms") is not None:
            latencies.append(f"then {rate(row['median_tpot_ms'])} ms a token")
        if latencies:
            text += f"; in the median {', '.join(latencies)}"
        sentences.append(f"{text}.")
    return sentences


def serve_measures(result: Result) -> Iterator[Measure]:
    """Throughput and median latencies of each level; of two servers with the throughput of each round as samples."""
    rounds = {
        each["level"]: each
        for each in result.data.get("comparisons") or ()
        if each["metric"] == "output_throughput"
    }
    for row in result.rows:
        name, label = name_of(row), row.get("label")
        compared = rounds.get(row["level"], {})
        samples = compared.get(f"{label}_samples".lower())
        speedup = compared.get("speedup") if label == "B" else None
        throughput = row["output_throughput"]
        yield Measure(
            f"{name}, tokens/s", throughput, "tokens/s", interval=sample_interval(samples), speedup=speedup
        )
        for metric in ("ttft", "itl"):
            if values := _milliseconds([row], metric):
                # Gaps of one answer depend on each other too much for an interval.
                interval = sample_interval(values) if metric == "ttft" else None
                yield Measure(f"{name}, {metric.upper()}", median(values), "ms", False, interval)


def _milliseconds(rows: Sequence[Row], metric: str) -> list[float]:
    """Of every request that was answered, or between every two pieces of its text."""
    found: list[float] = []
    for row in rows:
        for error, first, gaps, whole in zip(
            row["errors"], row["ttfts"], row["itls"], row["latencies"], strict=True
        ):
            if not error:
                seconds = {"ttft": [first], "itl": gaps, "e2el": [whole]}[metric]
                found += [1000 * value for value in seconds]
    return found


def serve_figures(result: Result, stem: Path) -> Iterator[Figure]:
    """Throughput by level, and how latencies are distributed."""
    yield from _scaling(result, stem)
    names = list(dict.fromkeys(map(name_of, result.rows)))
    drawn = spaced(names, _MOST_LINES)
    left_out = "" if len(drawn) == len(names) else f"; {len(drawn)} of {len(names)} levels are drawn"
    for metric, what in (("ttft", "time to the first token"), ("itl", "time between pieces of text")):
        samples = {
            name: _milliseconds([row for row in result.rows if name_of(row) == name], metric)
            for name in drawn
        }
        samples = {name: values for name, values in samples.items() if values}
        if samples:
            path = stem.with_name(f"{stem.name}-{metric}")
            draw_distributions(path, samples, f"{result.model}: {what} ({metric.upper()})", "milliseconds")
            yield Figure(
                path.name,
                f"{what[0].upper()}{what[1:]}, cumulative: which share of the samples, whose number is in "
                f"brackets, was at most so long{left_out}.",
            )


def _scaling(result: Result, stem: Path) -> Iterator[Figure]:
    """Tokens/s against requests at once, and against requests a second, where there are two levels of them."""
    for key, name, x_label in (
        ("max_concurrency", "concurrency", "requests at once"),
        ("request_rate", "rate", "requests a second"),
    ):
        lines: dict[str, list[tuple[float, float, float, float]]] = {}
        for row in result.rows:
            open_loop = row.get("request_rate") not in (None, "inf")
            if open_loop == (key == "request_rate") and row.get(key) is not None:
                label = row.get("label") or result.model
                value = row["output_throughput"]
                lines.setdefault(label, []).append((float(row[key]), value, value, value))
        points = {bar[0] for bars in lines.values() for bar in bars}
        if len(points) > 1:
            path = stem.with_name(f"{stem.name}-{name}")
            draw_scaling(
                path,
                {label: sorted(bars) for label, bars in lines.items()},
                title=f"{result.model}: served tokens/s by {name}",
                x_label=x_label,
                y_label="tokens/s",
            )
            yield Figure(path.name, f"New tokens a second against {x_label}.")

"""Sections about speed: throughput, batches of several depths, HTTP, transformers' generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sleb.benchmarks.reports.document import Block, Bullets, Paragraph, Section, Table, unrepeated
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.shown import (
    estimate,
    listed,
    number,
    plural,
    rate,
    rate_spread,
    seconds,
    share,
    size,
    spread,
)
from sleb.benchmarks.reports.speed_notes import is_noisy, num_counted, throughput_notes, workload

Row = Mapping[str, Any]

_MOST_DEPTHS = 4  # that the name of a mixed batch lists


def is_depth(row: Row) -> bool:
    """Whether a row stands for its depth: it is neither the control nor a mixed batch."""
    return row.get("variant") not in ("control", "mixed")


def is_baseline(row: Row) -> bool:
    """Whether speedups refer to this row."""
    return is_depth(row) and row["depth"] == row["baseline_depth"]


def variant(row: Row) -> str:
    """What ran: a depth, the baseline a second time, or several depths in one batch."""
    if row.get("variant") == "mixed":
        depths = list(map(str, row["depths"]))
        return " + ".join(depths if len(depths) <= _MOST_DEPTHS else [depths[0], "…", depths[-1]])
    return f"{row['depth']} again" if row.get("variant") == "control" else str(row["depth"])


def throughput_section(result: Result) -> Section:
    """As the table of `sleb bench throughput`."""
    rows = result.rows
    columns = (
        *(
            "depth",
            "tokens/s",
            "low–high",
            "time",
            "speedup",
            _interval_heading(rows),
            "verdict",
            "ideal",
            "of gain",
        ),
        *("roofline", "weights", "KV"),
    )
    lines = unrepeated([[workload(row), *_cells(row)] for row in rows])
    blocks: list[Block] = [
        Table(("test",), columns, lines).without_empty(),
        Bullets(throughput_notes(result)),
    ]
    if paper := result.data.get("paper"):
        blocks += _paper(paper)
    return Section([], blocks)


def _paper(paper: Row) -> list[Block]:
    """The rows that the SLEB paper prints, to be held beside the speedups."""
    lines = [
        [
            row["method"],
            row["removed"],
            number(row["latency_ms"], ",.1f"),
            number(row["latency_speedup"], ".2f"),
            number(row["tokens_per_second"], ",.0f"),
            number(row["throughput_speedup"], ".2f"),
        ]
        for row in paper["rows"]
    ]
    columns = ("removed", "prompt, ms", "speedup", "tokens/s", "speedup")
    return [
        Paragraph(
            f"The paper: {paper['model']} on {paper['hardware']}, printed in {paper['source']}; nothing of it was "
            "measured here. Only speedups say something about both."
        ),
        Table(("method",), columns, lines),
    ]


def _interval_heading(rows: Sequence[Row]) -> str:
    levels = {row.get("speedup_level") for row in rows if not is_baseline(row)}
    [level] = levels if len(levels) == 1 else [None]
    return f"{level:.0%} interval" if level else "interval" if levels - {None} else "low–high"


def _cells(row: Row) -> list[str]:
    compared = not is_baseline(row)
    ends = rate_spread(row.get("tokens_per_second_low"), row.get("tokens_per_second_high"))
    return [
        variant(row),
        rate(row["tokens_per_second"]) + ("*" if is_noisy(row) else ""),
        ends,
        seconds(row.get("seconds")),
        number(row["speedup"], ".3f") if compared else "1",
        spread(row.get("speedup_low"), row.get("speedup_high")) if compared else "",
        str(row.get("verdict") or "") if compared and row.get("speedup_level") else "",
        number(row.get("ideal_speedup"), ".3f") if compared else "1",
        share(row.get("ideal_gain_share")) if compared else "",
        share(row.get("roofline_share")),
        size(row.get("weight_bytes")),
        size(row.get("kv_bytes")),
    ]


def speed_sentence(rows: Iterable[Row]) -> str:
    """The speedups of one depth in all tests, as "1.25 (1.23–1.28) times as fast for a prompt of 2,048 tokens"."""
    told = without_parts(rows)
    lengths = {(row["prompt_tokens"], row["output_tokens"]) for row in told if row["test"] != "prompt"}
    parts: list[str] = []
    for row in told:
        words = _in_words(row, with_lengths=len(lengths) > 1)
        if row.get("speedup_level") and row.get("verdict") == "no difference":
            parts.append(f"no measurable difference for {words}")
            continue
        num_runs = None if row.get("speedup_level") else row.get("repetitions")
        shown = estimate(row["speedup"], row.get("speedup_low"), row.get("speedup_high"), num_runs=num_runs)
        parts.append(f"{shown} {'' if parts else 'times as fast '}for {words}")
    return ", ".join(parts)


def without_parts(rows: Iterable[Row]) -> list[Row]:
    """The rows without those of decode that are a part of one of generate: of the same batch and lengths."""
    every = list(rows)
    whole = {_shape(row) for row in every if row["test"] == "generate"}
    return [row for row in every if row["test"] != "decode" or _shape(row) not in whole]


def _shape(row: Row) -> tuple[int, int, int]:
    return row["batch"], row["prompt_tokens"], row["output_tokens"]


def _in_words(row: Row, with_lengths: bool) -> str:
    if row["test"] == "prompt":
        what = "a prompt" if row["batch"] == 1 else f"{row['batch']} prompts"
        return f"{what} of {row['prompt_tokens']:,} tokens"
    streams = plural(row["batch"], "stream")
    if with_lengths:
        streams += f" of {num_counted(row):,} tokens after {row['prompt_tokens']:,}"
    return f"{streams} without their prompts" if row["test"] == "decode" else streams


def mixed_section(result: Result) -> Section:
    """The ratio of `sleb.benchmarks.mixed`, and each depth alone."""
    data = result.data
    rates = data["tokens_per_second"]
    depths = [str(depth) for depth in rates["alone"]]
    rows = [[f"depth {depth} alone", rate(rates["alone"][depth])] for depth in rates["alone"]]
    rows += [["expected of the mixed batch", rate(rates["expected"])], ["mixed batch", rate(rates["mixed"])]]
    shown = _ratio(data)
    return Section(
        [
            f"A batch that mixes the depths {listed(depths)} reaches {shown} of the throughput that the depths "
            "alone let expect."
        ],
        [
            Table(("batch",), ("tokens/s",), rows),
            Paragraph(_target(data, shown)),
            Paragraph(
                "expected: if mixing cost nothing, the mixed batch would take the mean of the times of the depths "
                "alone. The ratio is that mean over the time it took, median of the ratios within repetitions."
            ),
        ],
    )


def http_section(result: Result) -> Section:
    """The ratio of `sleb.benchmarks.http_overhead`."""
    data = result.data
    rates = data["tokens_per_second"]
    shown = _ratio(data)
    streams = result.settings.get("streams")
    who = f"{streams} streams over HTTP get" if streams else "Over HTTP one gets"
    return Section(
        [f"{who} {shown} of the tokens/s of the same prompts generated directly."],
        [
            Table(
                ("side",), ("tokens/s",), [["directly", rate(rates["direct"])], ["HTTP", rate(rates["http"])]]
            ),
            Paragraph(_target(data, shown)),
            Paragraph(
                "Medians; the ratio is that of the times within repetitions. The clients' own work on the same "
                "machine counts as HTTP's."
            ),
        ],
    )


def _ratio(data: Row) -> str:
    """With its interval, or where it has no level the least and the greatest of the repetitions."""
    runs = data.get("ratio_samples") or data.get("repetitions") or ()
    num_runs = None if data.get("ratio_level") or not runs else len(runs)
    return estimate(data["ratio"], data["ratio_low"], data["ratio_high"], num_runs=num_runs)


def _target(data: Row, shown: str) -> str:
    target = data.get("target")
    met = "" if target is None else f"; the target, {target:g}, is {'met' if data.get('met') else 'not met'}"
    return f"Ratio {shown}{met}."


def transformers_section(result: Result) -> Section:
    """The ratio of `sleb.benchmarks.transformers_generate`."""
    data = result.data
    rows = [
        [name, rate(data[side].get("tokens_per_second"))]
        for side, name in (("ours", "sleb"), ("transformers", "transformers"))
    ]
    summary = []
    if "ratio" in data:
        shown = _ratio(data)
        summary.append(f"sleb generates {shown} times as fast as transformers' generate.")
    return Section(summary, [Table(("engine",), ("tokens/s",), rows)])

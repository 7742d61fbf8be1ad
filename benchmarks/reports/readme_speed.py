"""The README's tables of speed: against other engines, by depth, by weight format, and over HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleb.benchmarks.reports.document import Table, unrepeated
from sleb.benchmarks.reports.engines import by_test, words_of_test
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.readme_sources import newest, percent, table_text
from sleb.benchmarks.reports.serving import COMPARED, verdict_in_words
from sleb.benchmarks.reports.shown import estimate, number, plural, rate, spaced
from sleb.benchmarks.reports.speed import is_baseline, is_depth

Row = Mapping[str, Any]

# A peer's name in result files -> how the README calls it; {} is its version.
_ENGINES = {
    "vllm": "vLLM {} (CPU)",
    "openvino": "OpenVINO GenAI {}",
    "llamacpp-bf16": "llama.cpp {}",
    "llamacpp-q8_0": "llama.cpp {} Q8_0",
    "llamacpp-q4_1": "llama.cpp {} Q4_1",
    "transformers": "transformers {}",
}
# Our format of so many bits as a peer's.
_SAME_BITS = {"llamacpp-q8_0": "int8", "llamacpp-q4_1": "int4"}
_SHAPE = ("test", "batch", "prompt_tokens", "output_tokens")
_MOST_DEPTHS = 3
_TIERS = (3, 6)  # of the demo model, as it is served where nothing else is said


def peers_table(results: Path) -> str:
    """The ratios against each engine: ours as a whole, ours pruned, and quantised beside formats of as many bits."""
    result = newest(results, "peers-smollm2-depths")
    rows = [row for row in by_test(result) if not row["http"]]
    headings = list(dict.fromkeys(words_of_test(row["test"]) for row in rows))
    cells: dict[tuple[int, str, str], dict[str, str]] = {}
    for row in sorted(rows, key=_place):
        ours = row["weight_format"].partition(":")[0]
        if ours == _SAME_BITS.get(row["peer"], "bf16") and not (row["depth"] and ours != "bf16"):
            line = cells.setdefault((row["depth"], row["peer"], ours), {})
            line[words_of_test(row["test"])] = _ratio(row, "ratio")
    lines = [
        [_contest(result, *names), *(found.get(heading, "") for heading in headings)]
        for names, found in cells.items()
    ]
    return table_text(Table(["against (bf16, where nothing else is said)", *headings], (), lines), result)


def _place(row: Row) -> tuple[bool, int, int]:
    """Bf16 before the others, whole before pruned, then the engines in their order."""
    return row["peer"] in _SAME_BITS, row["depth"], [*_ENGINES, row["peer"]].index(row["peer"])


def _contest(result: Result, depth: int, peer: str, ours: str) -> str:
    version = ".".join(str(result.data["engines"][peer]["version"]).split(".")[:2])
    name = _ENGINES.get(peer, f"{peer} {{}}").format(version)
    if depth:
        return f"{name}, ours at depth {depth}"
    return f"{name}, ours {ours}" if peer in _SAME_BITS else name


def _ratio(row: Row, key: str) -> str:
    """With its interval, or with what its ends are where that has no level."""
    shown = estimate(row[key], row[f"{key}_low"], row[f"{key}_high"])
    return shown if row.get(f"{key}_level") else f"{shown}, low–high of {plural(row['repetitions'], 'run')}"


def throughput_table(results: Path) -> str:
    """What depths give against the full model: where they are many, the tiers and the last, or a few between."""
    result = newest(results, "throughput-smollm2-cpu")
    rows = [row for row in result.rows if is_depth(row)]
    measured = sorted({row["depth"] for row in rows if not is_baseline(row)})
    depths = spaced(measured, _MOST_DEPTHS)
    if set(_TIERS) < set(measured):
        depths = sorted({*_TIERS, measured[-1]})
    lines = []
    for base in filter(is_baseline, rows):
        shape = [base[key] for key in _SHAPE]
        own = {row["depth"]: row for row in rows if [row[key] for key in _SHAPE] == shape}
        line = [_workload(*shape), rate(base["tokens_per_second"])]
        for row in (own[depth] for depth in depths):
            line += [
                rate(row["tokens_per_second"]),
                _ratio(row, "speedup"),
                number(row["ideal_speedup"], ".2f"),
            ]
        lines.append(line)
    headings = ["test", "depth 0, tokens/s"]
    for depth in depths:
        headings += [f"depth {depth}, tokens/s", "speedup (95 % interval)", "ideal"]
    return table_text(Table(headings, (), lines), result)


def _workload(test: str, batch: int, prompt_tokens: int, output_tokens: int) -> str:
    if test == "prompt":
        prompts = "one prompt" if batch == 1 else f"{batch} prompts"
        return f"{prompts} of {prompt_tokens:,} tokens"
    each = "" if batch == 1 else " each"
    without = ", without the prompts" if test == "decode" else ""
    return f"{plural(batch, 'prompt')} of {prompt_tokens:,} tokens, {output_tokens} new tokens{each}{without}"


def formats_table(results: Path) -> str:
    """What a weight format costs: a column a format."""
    result = newest(results, "quality-cpu-smollm2")
    columns = [
        row["weights"] if row["implementation"] == "sleb" else f"{row['implementation']}, {row['weights']}"
        for row in result.rows
    ]
    sizes = [row["weight_bytes"] for row in result.rows]
    lines = [
        ["size", *("" if size is None else f"{size / 2**20:.0f} MiB" for size in sizes)],
        ["perplexity", *(f"{row['perplexity']:.3f}" for row in result.rows)],
        [
            "over bfloat16",
            *("" if row["ratio"] == 1 else percent(row["ratio"] - 1, "+.2%") for row in result.rows),
        ],
    ]
    return table_text(Table(["weights", *columns], (), lines), result)


def serving_table(results: Path) -> str:
    """Rates and latencies by level of load."""
    result = newest(results, "serve-smollm2")
    latencies = [f"{statistic}_{metric}_ms" for metric in ("ttft", "tpot") for statistic in ("median", "p99")]
    lines = [
        [
            str(row["level"]),
            number(row["request_throughput"], ".3g"),
            rate(row["output_throughput"]),
            *(rate(row[key]) for key in latencies),
        ]
        for row in result.rows
    ]
    headings = ["load", "requests/s", "new tokens/s"]
    headings += [
        f"{metric} {statistic}, ms" for metric in ("TTFT", "TPOT") for statistic in ("median", "p99")
    ]
    return table_text(Table(headings, (), lines), result)


def compare_table(results: Path) -> str:
    """Two servers under the same load: each figure of both, and how many times as good B is."""
    result = newest(results, "serve-compare-smollm2")
    lines = []
    for each in result.data["comparisons"]:
        ratio = _ratio({**each, "repetitions": len(each["speedup_samples"])}, "speedup")
        metric = COMPARED.get(each["metric"], each["metric"])
        lines.append([each["level"], metric, rate(each["a"]), rate(each["b"]), ratio, verdict_in_words(each)])
    sides = [_side(result, place, name) for place, name in enumerate(("A", "B"))]
    headings = ["load", "measured", *sides, "B over A (95 % interval)", "B is"]
    return table_text(Table(headings, (), unrepeated(lines)), result)


def _side(result: Result, place: int, name: str) -> str:
    """As "A: vllm 0.32, smollm2": what the server says it is, and its model."""
    server = result.servers[name]
    who = " ".join(str(server[key]) for key in ("owned_by", "version") if server.get(key))
    return f"{name}: {', '.join(filter(None, (who, result.data['model']['models'][place])))}"

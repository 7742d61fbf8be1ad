"""The README's tables of measurements, made from the result files: `scripts/readme-tables` puts them between markers.

    <!-- table: peers -->
    | … |
    <!-- end of table -->

A function a table. Each reads the newest file DATE-NAME.json of its name, and names that file below the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sleb.benchmarks.reports.document import Table
from sleb.benchmarks.reports.kinds import Result, read_result
from sleb.benchmarks.reports.markdown import table_lines
from sleb.benchmarks.reports.quality import prune_perplexities
from sleb.benchmarks.reports.shown import estimate, number, plural, rate, spaced
from sleb.benchmarks.reports.speed import is_baseline, is_depth
from sleb.errors import ConfigError

RESULTS = "benchmarks/results"  # as the README links it

# A peer's name in result files -> how the README calls it; {} is its version.
_ENGINES = {
    "vllm": "vLLM {} (CPU)",
    "openvino": "OpenVINO GenAI {}",
    "llamacpp-bf16": "llama.cpp {}",
    "transformers": "transformers {}",
}
_SHAPE = ("test", "batch", "prompt_tokens", "output_tokens")
_MOST_DEPTHS = 3
_SEARCHES = ("search-smollm2-8x512", "search-smollm2-4x512")
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:table:|end of table).*?-->")


def newest(results: Path, name: str) -> Result:
    """Of the latest date. Raises ConfigError if there is none."""
    dated = re.compile(rf"\d{{4}}-\d{{2}}-\d{{2}}-{re.escape(name)}\.json")
    found = sorted(path for path in results.glob("*.json") if dated.fullmatch(path.name))
    if not found:
        raise ConfigError(
            f"{results} has no DATE-{name}.json; measure it, or take its table out of the README"
        )
    return read_result(found[-1])


def peers_table(results: Path) -> str:
    """The ratios of bf16 against each engine."""
    result = newest(results, "peers-smollm2")
    rows = [row for row in result.rows if row["weight_format"] == "bf16"]
    tests = list(dict.fromkeys(row["test"] for row in rows))
    cells = {
        (row["peer"], row["test"]): estimate(row["ratio"], row["ratio_low"], row["ratio_high"])
        for row in rows
    }
    peers = sorted({row["peer"] for row in rows}, key=lambda peer: [*_ENGINES, peer].index(peer))
    lines = [[_engine(result, peer), *(cells.get((peer, test), "") for test in tests)] for peer in peers]
    return _shown(Table(["against (bf16)", *map(_test, tests)], (), lines), result)


def _engine(result: Result, peer: str) -> str:
    version = ".".join(str(result.data["engines"][peer]["version"]).split(".")[:2])
    return _ENGINES.get(peer, f"{peer} {{}}").format(version)


def _test(name: str) -> str:
    kind, _, count = name.partition("-")
    if kind == "prompt":
        return f"prompt of {int(count):,}"
    return "1 stream" if count == "1" else f"{count} streams"


def throughput_table(results: Path) -> str:
    """What depths give against the full model: where they are many, the first, a middle one and the last."""
    result = newest(results, "throughput-smollm2-cpu")
    rows = [row for row in result.rows if is_depth(row)]
    depths = spaced(sorted({row["depth"] for row in rows if not is_baseline(row)}), _MOST_DEPTHS)
    is_interval = any(row.get("speedup_level") for row in rows)
    lines = []
    for base in filter(is_baseline, rows):
        shape = [base[key] for key in _SHAPE]
        own = {row["depth"]: row for row in rows if [row[key] for key in _SHAPE] == shape}
        line = [_workload(*shape), rate(base["tokens_per_second"])]
        for row in (own[depth] for depth in depths):
            speedup = estimate(row["speedup"], row["speedup_low"], row["speedup_high"])
            if is_interval and row.get("speedup_level") is None:
                speedup += f", low–high of {row['repetitions']} runs"
            line += [rate(row["tokens_per_second"]), speedup, number(row["ideal_speedup"], ".2f")]
        lines.append(line)
    ends = "95 % interval" if is_interval else "low–high"
    headings = ["test", "depth 0, tokens/s"]
    for depth in depths:
        headings += [f"depth {depth}, tokens/s", f"speedup ({ends})", "ideal"]
    return _shown(Table(headings, (), lines), result)


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
        ["over bfloat16", *("" if row["ratio"] == 1 else _percent(row["ratio"] - 1) for row in result.rows)],
    ]
    return _shown(Table(["weights", *columns], (), lines), result)


def _percent(share: float) -> str:
    return f"{share:+.2%}".replace("-", "−").replace("%", " %")


def depths_table(results: Path) -> str:
    """What depth costs on the search's own text: the first depths, then every other one."""
    result = newest(results, "prune-smollm2")
    found = {
        depth: value for depth, value in prune_perplexities(result).items() if depth <= 4 or depth % 2 == 0
    }
    cells = [f"{value:.1f}" if value < 99.95 else f"{value:.0f}" for value in found.values()]
    return _shown(Table(["depth", *map(str, found)], (), [["perplexity", *cells]]), result)


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
    return _shown(Table(headings, (), lines), *found)


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
                f"{looped:.0%}".replace("%", " %"),
            ]
        lines.append(line)
    return _shown(Table(headings, (), lines), result)


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
                *(f"−{row[key]:.0%}".replace("%", " %") for key in ("parameters_removed", "kv_removed")),
                f"{row['perplexity']:.1f}",
                f"{row['held_out_perplexity']:.1f}",
                f"{row['predicted_speedup']:.2f}",
                estimate(row["measured_speedup"], row["measured_low"], row["measured_high"]),
            ]
        )
    headings = ["removed", "parameters", "KV", "perplexity", "held out", "speedup, predicted", "measured"]
    return _shown(Table(headings, (), lines), result)


def _same(share: float, loss_ratio: float) -> str:
    more = f", loss {loss_ratio - 1:+.1%}".replace("%", " %") if share < 1 else ""
    return f"{share:.0%}".replace("%", " %") + more


def _shown(table: Table, *sources: Result) -> str:
    """The table, and the files that it is from."""
    names = [Path(source.name).name for source in sources]
    links = ", ".join(f"[{name}]({RESULTS}/{name})" for name in names)
    return "\n".join([*table_lines(table), "", f"From {links}.", ""])


TABLES: dict[str, Callable[[Path], str]] = {
    "peers": peers_table,
    "throughput": throughput_table,
    "weight-formats": formats_table,
    "depths": depths_table,
    "search": search_table,
    "methods": methods_table,
    "fronts": fronts_table,
}


def fill(readme: str, results: Path) -> str:
    """The README with every table made anew. Raises ConfigError for a table that is not known, or a lone marker."""
    check_markers(readme)
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]](results)}{found[4]}", readme)


def check_markers(readme: str) -> None:
    """Raises ConfigError for markers that do not come in pairs, or that name no table."""
    markers = _MARKER.findall(readme)
    paired = [marker for found in _MARKED.finditer(readme) for marker in (found[1].strip(), found[4])]
    if markers != paired:
        raise ConfigError(
            "a marker of the README has no partner; write '<!-- table: NAME -->' on a line before a table and "
            "'<!-- end of table -->' on one after it"
        )
    for _, name, *_ in _MARKED.findall(readme):
        if name not in TABLES:
            raise ConfigError(
                f"the README marks a table '{name}', which is not known; choose from {', '.join(TABLES)}"
            )


def outdated(readme: str, results: Path) -> list[str]:
    """The names of the tables that are not what the result files say, or not in the README. Raises ConfigError."""
    check_markers(readme)
    shown: dict[str, set[str]] = {}
    for _, name, body, _ in _MARKED.findall(readme):
        shown.setdefault(name, set()).add(body)
    return [name for name, make in TABLES.items() if shown.get(name) != {make(results)}]

"""Sections that compare: engines with each other, and operators' backends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from sleb.benchmarks.reports.document import Block, Bullets, Section, Table, unrepeated
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.shown import (
    estimate,
    listed,
    number,
    plural,
    rate,
    rate_spread,
    share,
    size,
    spread,
)

Row = Mapping[str, Any]


def peers_section(result: Result) -> Section:
    """As the tables of `sleb bench peers`: all pairs, engines, memory."""
    blocks: list[Block] = [
        Table(
            ("test", "sleb", "peer"),
            ("sleb, tokens/s", "peer, tokens/s", "ratio", "interval", "runs", "sleb is"),
            unrepeated([_pair(row) for row in by_test(result)]),
        ).without_empty(),
        Bullets(_meanings(result)),
    ]
    blocks += [table for table in (_engines(result), _memory(result), _targets(result)) if table.rows]
    return Section(_peer_sentences(result), blocks)


def ratio_meaning(rows: Iterable[Row]) -> tuple[str, str]:
    """What ratios of engines are, and what the ends of their intervals."""
    levels = {row.get("ratio_level") for row in rows}
    few = "the median of the ratios", "the least and the greatest"
    many = "the Hodges–Lehmann estimate of the ratios", "the ends of its 95 % interval"
    if None not in levels:
        return many
    if levels == {None}:
        return few
    return f"{many[0]}, of fewer than six {few[0]}", f"{many[1]}, of fewer than six {few[1]}"


def _meanings(result: Result) -> list[str]:
    value, ends = ratio_meaning(result.rows)
    lines = [
        "sleb: by its weights; http: behind its own server; after a colon the depth, where pruned. tokens/s: medians.",
        f"ratio: {value}, each of two turns of one repetition; above 1 sleb is faster. interval: {ends}.",
        "decode-N: N streams; one stream without its first token. prompt-N: a prompt of N tokens and one new token.",
    ]
    for label, shares in (result.data.get("floor_shares") or {}).items():
        if shares:
            shown = estimate(median(shares), min(shares), max(shares), num_runs=len(shares))
            lines.append(
                f"decode-1, {label}: {shown} of the speed at which memory gives the weights, read beside it."
            )
    return lines


def words_of_test(test: str) -> str:
    """As "8 streams" and "prompt of 512 tokens"."""
    name, _, count = test.partition("-")
    if name == "decode" and count.isdigit():
        return plural(int(count), "stream")
    return f"prompt of {int(count):,} tokens" if name == "prompt" and count.isdigit() else test


def by_test(result: Result) -> list[Row]:
    """The rows of peers test by test, in each by format and peer, in the order of their first appearance."""
    places = [
        list(dict.fromkeys(row[key] for row in result.rows)) for key in ("test", "weight_format", "peer")
    ]
    tests, formats, peers = places
    formats.sort(key=lambda name: (name != "bf16", name))
    return sorted(
        result.rows,
        key=lambda row: (
            tests.index(row["test"]), formats.index(row["weight_format"]), peers.index(row["peer"]),
        ),
    )  # fmt: skip


def _pair(row: Row) -> list[str]:
    disturbed = f" ({row['disturbed']} disturbed)" if row.get("disturbed") else ""
    return [
        *(str(row[key]) for key in ("test", "weight_format", "peer")),
        number(row["rate"], ",.1f"),
        number(row["peer_rate"], ",.1f"),
        number(row["ratio"], ".2f"),
        spread(row.get("ratio_low"), row.get("ratio_high"), ".2f"),
        f"{row.get('repetitions', '')}{disturbed}",
        str(row.get("verdict") or ""),
    ]


def _engines(result: Result) -> Table:
    keys = ("version", "dtype", "weights", "kernels", "attention", "compiled", "threads", "transport")
    rows = [
        [name, *(_fact(facts.get(key)) for key in keys)]
        for name, facts in (result.data.get("engines") or {}).items()
    ]
    return Table(("engine", *keys), (), rows).without_empty()


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def _memory(result: Result) -> Table:
    rows = [
        [
            name,
            size(facts["peak_rss"]),
            size(facts.get("pss") or None),
            str(facts.get("processes", "")),
        ]
        for name, facts in (result.data.get("memory") or {}).items()
    ]
    return Table(("engine",), ("peak memory", "shared pages once", "processes"), rows).without_empty()


def _targets(result: Result) -> Table:
    rows = []
    for target in result.data.get("targets") or ():
        bound = f"{'≤' if target.get('at_most') else '≥'} {target['target']:.2f}"
        met = {True: "yes", False: "no", None: "not measured"}[target["met"]]
        ends = spread(target["low"], target["high"], ".2f")
        rows.append([target["what"], bound, number(target["measured"], ".2f"), ends, met])
    return Table(("target",), ("aim", "measured", "low–high", "met"), rows)


def _peer_sentences(result: Result) -> list[str]:
    """For each format of ours, how it compares with each peer over all tests."""
    pairs: dict[str, dict[str, list[float]]] = {}
    for row in by_test(result):
        pairs.setdefault(row["weight_format"], {}).setdefault(row["peer"], []).append(row["ratio"])
    sentences = []
    for weight_format, peers in pairs.items():
        first, *others = [(peer, _range(ratios)) for peer, ratios in peers.items()]
        shown = [
            f"{first[1]} times as fast as {first[0]}",
            *(f"{ratios} as {peer}" for peer, ratios in others),
        ]
        sentences.append(f"From test to test, sleb ({weight_format}) is {listed(shown)}.")
    return sentences


def _range(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def kernels_section(result: Result) -> Section:
    """As the table of `sleb bench kernels`."""
    lines = [[row["op"], row["shape"], row["backend"], *_kernel_cells(row)] for row in result.rows]
    blocks: list[Block] = [
        Table(
            ("operator", "shape", "backend"),
            ("µs", "low–high", "GB/s", "TFLOP/s", "limit", "of limit", "timed by"),
            unrepeated(lines, 2),
        ),
        Bullets(_kernel_notes(result)),
    ]
    shares: dict[str, list[float]] = {}
    for row in result.rows:
        if row.get("roofline_share") is not None:
            shares.setdefault(row["backend"], []).append(row["roofline_share"])
    summary = [
        f"{backend} reaches {median(found):.0%} of the limit in the median of {len(found)} cases "
        f"({min(found):.0%} to {max(found):.0%})."
        for backend, found in shares.items()
    ]
    return Section(summary, blocks)


def _kernel_notes(result: Result) -> list[str]:
    """What the columns mean, as `sleb bench kernels` says it."""
    lines = [
        "GB/s: every input read once and every output written once, over the median time. of limit: the least time "
        "that these bytes or the operations take at the ceilings, over the median time."
    ]
    if any(row.get("timing") == "interpreted" for row in result.rows):
        lines.append("interpreted: Triton ran its kernels in Python; the times mean nothing.")
    if str(result.environment.get("device")).startswith("cpu"):
        lines.append("On a CPU the inputs stay in its caches, so small shapes can pass the memory's limit.")
    return lines


def _kernel_cells(row: Row) -> list[str]:
    if row.get("microseconds") is None:
        return ["", "", "", "", "", "", f"not run: {row.get('reason') or 'for no reason that is known'}"]
    return [
        rate(row["microseconds"]),
        rate_spread(row.get("microseconds_low"), row.get("microseconds_high")),
        rate(row.get("gb_per_second")),
        rate(row.get("tflops")),
        str(row.get("bound") or ""),
        share(row.get("roofline_share")),
        str(row.get("timing") or ""),
    ]

"""Workloads of throughput in words, and what a reader of their table must know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.results import NOISY
from sleb.benchmarks.throughput_report import notes
from sleb.benchmarks.workloads import describe_workload

Row = Mapping[str, Any]


def workload(row: Row) -> str:
    """The test of a row, batch and tokens, as `sleb bench throughput` prints it."""
    return describe_workload(row["test"], row["batch"], row["prompt_tokens"], row["output_tokens"])


def num_counted(row: Row) -> int:
    """New tokens of a request that its tokens/s counts: decoding begins with the second."""
    counted: int = row["output_tokens"] - (row["test"] == "decode")
    return counted


def is_noisy(row: Row) -> bool:
    """Whether half the spread of its repetitions is a large share of their median."""
    return (row.get("relative_spread") or 0) > NOISY


def throughput_notes(result: Result) -> list[str]:
    """What the columns mean, and what `sleb bench throughput` says to be doubtful or missing."""
    return [*_meanings(result.rows), *notes(result.data)]


def _meanings(rows: Sequence[Row]) -> Iterator[str]:
    counts = sorted({row["repetitions"] for row in rows if "repetitions" in row})
    shown = "–".join(map(str, dict.fromkeys((*counts[:1], *counts[-1:]))))
    yield (
        f"tokens/s: median of {shown or 'all'} repetitions, low–high the slowest and the fastest. generate counts new "
        "tokens over the whole run, prompts too; decode those after each request's first, without the prompts' time."
    )
    yield (
        "speedup: over the baseline depth, from ratios of two times of one repetition, in which what slows the "
        "machine down for a while cancels."
    )
    yield (
        "ideal: modelled from floating point operations for prompts, and from the bytes of weights and KV otherwise. "
        "of gain: (speedup − 1) / (ideal − 1)."
    )
    if any(row.get("variant") == "control" for row in rows):
        yield (
            'again: the baseline a second time, in turns with the others; its verdict should be "no difference".'
        )
    if any(row.get("variant") == "mixed" for row in rows):
        yield "Depths with a plus: one batch of all of them; its speedup is over their time alone, 1 at best."
    if any(row.get("roofline_share") is not None for row in rows):
        yield (
            "roofline: the least time that the ceilings, measured in the same run, allow for the bytes and the "
            "operations, over the time taken."
        )

"""`sleb bench serve --compare`: two servers in turns, so that what slows the machine down for a while meets both alike.

A round sends both requests of the same lengths at the same times, one server after the other, in the order A B or B A;
the order alternates as in `sleb.benchmarks.harness.alternated_orders`. Random words differ, since both may be one
server with a prefix cache; rows of a dataset are the same. What is compared is paired within rounds. One server is idle
while the other is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

from sleb.benchmarks.harness import alternated_orders
from sleb.benchmarks.load.events import Outcome
from sleb.benchmarks.serving import (
    OnProgress,
    ServeProgress,
    conditions,
    describe_client,
    run_load,
    teller,
)
from sleb.benchmarks.serving_metrics import measure
from sleb.benchmarks.serving_options import Level, ServeOptions, side_options
from sleb.benchmarks.serving_rows import Row, make_row, row_notices
from sleb.benchmarks.serving_target import Target, check_alive, num_warmups, prepare, run_level, warm_up
from sleb.benchmarks.stats import ratio_interval, verdict

SIDES = ("A", "B")
# Metric -> whether more of it is better.
COMPARED = {
    "output_throughput": True,
    "request_throughput": True,
    "median_ttft_ms": False,
    "median_tpot_ms": False,
}


@dataclass
class _Side:
    """What one server did at one level, over all complete rounds."""

    outcomes: list[Outcome] = field(default_factory=list)
    duration: float = 0.0
    cpu_seconds: float = 0.0
    rounds: list[dict[str, Any]] = field(default_factory=list)


def run_comparison(
    options: ServeOptions, command: Sequence[str] = (), on_progress: OnProgress = lambda progress: None
) -> dict[str, Any]:
    """Measures both servers level by level and gives the result, with "comparisons". Raises SlebError.

    Ctrl-C keeps complete rounds, as does a server that answers no more, which "problem" then tells. command: as it was
    typed, program first.
    """
    environment = describe_client(options, command)
    on_progress(ServeProgress("asking the servers"))
    targets = [prepare(side_options(options, side)) for side in range(len(SIDES))]
    rows: list[Row] = []
    comparisons: list[dict[str, Any]] = []
    notices = [
        f"{name}: {text}" for name, target in zip(SIDES, targets, strict=True) for text in target.notices
    ]
    ending = run_load(_compare(options, targets, rows, comparisons, notices, on_progress), notices)
    names = [",".join(target.models) for target in targets]
    return {
        "kind": "serve",
        "environment": environment,
        "model": {"name": " and ".join(dict.fromkeys(names)), "models": names},
        "servers": {name: target.facts for name, target in zip(SIDES, targets, strict=True)},
        "settings": options.settings(),
        "rows": rows,
        "comparisons": comparisons,
        "conditions": conditions(options, notices),
        **ending,
    }


async def _compare(
    options: ServeOptions,
    targets: Sequence[Target],
    rows: list[Row],
    comparisons: list[dict[str, Any]],
    notices: list[str],
    on_progress: OnProgress,
) -> bool:
    """Adds two rows and the comparisons of a level; whether all levels were whole. Raises ServerStallsError."""
    rng = Random(options.seed)
    try:
        for level in options.levels:
            sides = [_Side() for _ in SIDES]
            try:
                whole = await _run_rounds(options, level, targets, sides, rng, on_progress)
            finally:
                if sides[0].rounds:
                    for name, target, side in zip(SIDES, targets, sides, strict=True):
                        row = make_row(target, level, side.outcomes, side.duration, side.cpu_seconds, name)
                        rows.append(row)
                        notices += row_notices(row, side.outcomes)
                    comparisons += compare_rounds(level, *(side.rounds for side in sides))
            if not whole:
                return False
    finally:
        for target in targets:
            target.client.close()
    return True


async def _run_rounds(
    options: ServeOptions,
    level: Level,
    targets: Sequence[Target],
    sides: Sequence[_Side],
    rng: Random,
    on_progress: OnProgress,
) -> bool:
    """Adds complete rounds to `sides`; whether all were. Raises ServerStallsError."""
    for name, target in zip(SIDES, targets, strict=True):
        what, warmups = f"{level}: warming up {name}", num_warmups(options, target.models)
        if await warm_up(target, level, warmups, what, teller(on_progress, what, warmups)):
            return False
    orders = alternated_orders(range(len(SIDES)), options.num_rounds, rng)
    for number, order in enumerate(orders, 1):
        results = {}
        for side in order:
            what = f"{level}: {SIDES[side]}, round {number} of {options.num_rounds}"
            tell = teller(on_progress, what, options.requests_of(level))
            # Both sides meet the same arrivals.
            results[side] = await run_level(targets[side], level, f"{options.seed} {level} {number}", tell)
            if results[side].interrupted:
                return False
            check_alive(targets[side], what, results[side])
        for index, done in enumerate(sides):
            result = results[index]
            done.outcomes += result.outcomes
            done.duration += result.duration
            done.cpu_seconds += result.cpu_seconds
            done.rounds.append(measure(result.outcomes, result.duration, options.goodput))
    return True


def compare_rounds(
    level: Level, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """B over A for every metric, from what was measured in each round on A (`first`) and on B.

    speedup is above 1 where B is better: of rates B / A, of times A / B. A round in which either side has no value is
    left out, and a metric without any round has no entry.
    """
    found = []
    for metric, more_is_better in COMPARED.items():
        pairs = [
            (a[metric], b[metric]) for a, b in zip(first, second, strict=True) if a[metric] and b[metric]
        ]
        if not pairs:
            continue
        ratios = [b / a if more_is_better else a / b for a, b in pairs]
        interval = ratio_interval(ratios)
        found.append(
            {
                "level": str(level),
                "metric": metric,
                "a": median(a for a, _ in pairs),
                "b": median(b for _, b in pairs),
                "a_samples": [a for a, _ in pairs],
                "b_samples": [b for _, b in pairs],
                "speedup": interval.estimate,
                "speedup_low": interval.low,
                "speedup_high": interval.high,
                "speedup_level": interval.level,
                "speedup_samples": ratios,
                "verdict": verdict(interval),
            }
        )
    return found

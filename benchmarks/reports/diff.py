"""Two results of one kind side by side: what changed in what was measured, and in what it was measured on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sleb.benchmarks.report import widen
from sleb.benchmarks.reports.facts import fact_name, flat_environment
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.measure import Measure
from sleb.benchmarks.reports.measures import measures
from sleb.benchmarks.reports.shown import number, rate
from sleb.errors import ConfigError

_MOST_NAMES = 8  # of rows without match, in a line; the JSON has them all
# Facts that always differ, or that say nothing about what was compared.
_PASSING = ("date", "load_average", "ceilings")

MEANING = (
    "ratio: B over A, turned so that above 1 B is better. overlap: whether the 95 % intervals do, of the samples' "
    "median by ranks, or those that the results tell; if so, chance may explain the difference. It is blank where "
    "either has fewer than six samples, which say nothing about chance. speedup: how far the row's own ratio moved."
)


@dataclass(frozen=True)
class Change:
    """One thing that both results measured.

    Attributes:
        ratio: of the values, above 1 where B is better.
        overlap: whether their intervals do; None where one has none.
        speedup_change: B's own ratio less A's; None where they tell none.
    """

    name: str
    unit: str
    a: float
    b: float
    ratio: float
    overlap: bool | None
    speedup_change: float | None


@dataclass(frozen=True)
class Difference:
    """Two results, and what is in both.

    Attributes:
        environment: by fact its values in A and B, where they differ; None where one does not tell it.
        only_a, only_b: names of what the other has not measured.
        without_ratio: names of what both measured, but one of them as 0, which nothing is a multiple of.
    """

    kind: str
    a: str
    b: str
    environment: Mapping[str, tuple[str | None, str | None]]
    rows: list[Change]
    only_a: list[str]
    only_b: list[str]
    without_ratio: list[str]

    def below(self, bound: float) -> list[Change]:
        """Where B is worse than `bound` times A."""
        return [row for row in self.rows if row.ratio < bound]

    def to_json(self, bound: float | None = None) -> str:
        """One object of kind "diff"; below: the names of what is worse than `bound`."""
        found = {"kind": "diff", "of": self.kind} | {
            key: value for key, value in asdict(self).items() if key != "kind"
        }
        below = None if bound is None else [row.name for row in self.below(bound)]
        found |= {"fail_below": bound, "below": below}
        return json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def compare(a: Result, b: Result) -> Difference:
    """Raises ConfigError for results of different kinds, that are not whole, or that measured nothing in common."""
    if a.kind != b.kind:
        raise ConfigError(
            f"{a.name} is a {a.kind} result and {b.name} a {b.kind} one; give two results of the same kind"
        )
    of_a, of_b = measures(a), measures(b)
    common = [name for name in of_a if name in of_b]
    if not common:
        raise ConfigError(
            f"{a.name} and {b.name} measured nothing in common ({_some(of_a)} against {_some(of_b)}); "
            "measure both with the same options"
        )
    changes = {name: _change(of_a[name], of_b[name]) for name in common}
    return Difference(
        a.kind,
        a.name,
        b.name,
        environment_changes(a, b),
        [change for change in changes.values() if change is not None],
        [name for name in of_a if name not in of_b],
        [name for name in of_b if name not in of_a],
        [name for name, change in changes.items() if change is None],
    )


def _some(found: Mapping[str, Measure]) -> str:
    return next(iter(found), "nothing")


def _change(a: Measure, b: Measure) -> Change | None:
    """None where there is no ratio: more than nothing is better, but not so many times as good."""
    better, worse = (b.value, a.value) if a.higher_is_better else (a.value, b.value)
    ratio = better / worse if worse else math.inf
    if not math.isfinite(ratio):
        return None
    overlap = None
    if a.interval is not None and b.interval is not None:
        overlap = a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]
    moved = None if a.speedup is None or b.speedup is None else b.speedup - a.speedup
    return Change(a.name, a.unit, a.value, b.value, ratio, overlap, moved)


def environment_changes(a: Result, b: Result) -> dict[str, tuple[str | None, str | None]]:
    """Facts of the environment, the model and its weights that differ, each with A's and B's. Raises ConfigError."""
    facts_a, facts_b = _facts(a), _facts(b)
    found = {
        fact_name(key): (facts_a.get(key), facts_b.get(key))
        for key in dict.fromkeys((*facts_a, *facts_b))
        if facts_a.get(key) != facts_b.get(key)
    }
    return found | _order_changes(_removal_orders(a), _removal_orders(b))


def _facts(result: Result) -> dict[str, str]:
    model = result.data.get("model")
    named = {
        "model": result.model,
        "model fingerprint": model.get("fingerprint") if isinstance(model, Mapping) else None,
        "weights": result.settings.get("weights"),
    }
    facts = {key: str(value) for key, value in named.items() if value}
    with result.reading():
        facts |= flat_environment(result.environment)
        for name, server in result.servers.items():
            facts |= {
                f"server {name} {key}".replace("  ", " "): value
                for key, value in flat_environment(server).items()
            }
    return {key: value for key, value in facts.items() if key not in _PASSING}


def _removal_orders(result: Result) -> dict[str, list[str]]:
    """What layer maps remove, in their order, by the name of the map, which is empty where there is one."""
    model, maps = result.data.get("model"), result.data.get("maps")
    found: dict[str, Any] = {"": model.get("removed") if isinstance(model, Mapping) else None}
    with result.reading():
        if result.kind == "prune":
            found[""] = result.data["removed"]
        elif result.kind == "fronts" and maps:
            found = {name: each.get("removed") for name, each in maps.items()}
        return {name: list(map(str, removed)) for name, removed in found.items() if removed is not None}


def _order_changes(
    a: Mapping[str, Sequence[str]], b: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str | None, str | None]]:
    """Of maps that both tell. A longer order that begins as the other is no other one: it reaches deeper."""
    changes: dict[str, tuple[str | None, str | None]] = {}
    for name in a:
        if any(one != other for one, other in zip(a[name], b.get(name, ()), strict=False)):
            changes[f"layer map {name}".strip()] = (", ".join(a[name]), ", ".join(b[name]))
    return changes


def print_difference(found: Difference, console: Console, bound: float | None = None) -> None:
    """What differs around the measurement first, then every row, then what only one has."""
    widen(console)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"A: {found.a}")
    say(f"B: {found.b}")
    for name, (a, b) in found.environment.items():
        say(f"{name}: {a or 'not told'} in A, {b or 'not told'} in B")
    if not found.environment:
        say("The environments are the same.")
    console.print(_table(found, bound))
    say(MEANING)
    for what, names in (
        ("Without a ratio, as it would be over 0", found.without_ratio),
        ("Only in A", found.only_a),
        ("Only in B", found.only_b),
    ):
        if names:
            more = f"; and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            say(f"{what}: {'; '.join(names[:_MOST_NAMES])}{more}.")
    if bound is not None and (below := found.below(bound)):
        say(f"Below {bound:g}: {'; '.join(f'{row.name} ({row.ratio:.3f})' for row in below)}.")


def _table(found: Difference, bound: float | None) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("measured")
    table.add_column("unit")
    for heading in ("A", "B", "ratio", "overlap", "speedup"):
        table.add_column(heading, justify="right")
    for row in found.rows:
        overlap = {True: "yes", False: "no", None: ""}[row.overlap]
        moved = number(row.speedup_change, "+.3f")
        style = "red" if bound is not None and row.ratio < bound else None
        cells = (row.unit, rate(row.a), rate(row.b), f"{row.ratio:.3f}", overlap, moved)
        table.add_row(Text(row.name), *cells, style=style)
    return table

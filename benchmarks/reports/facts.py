"""What results were measured on and with, as tables and sentences: environment, conditions, notices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sleb.benchmarks.reports.document import Table
from sleb.benchmarks.reports.kinds import Result
from sleb.benchmarks.reports.shown import size

# Key of `sleb.benchmarks.environment` -> what people call it, in the order of the table.
_NAMES = {
    "cpu": "processor",
    "cpu_flags": "instruction sets",
    "cores": "logical processors",
    "threads": "threads",
    "memory_bytes": "memory",
    "gpu": "GPU",
    "device": "device",
    "dtype": "dtype",
    "kernels": "kernels",
    "ceilings": "ceilings",
    "system": "system",
    "sleb": "sleb",
    "commit": "commit",
    "python": "Python",
    "torch": "torch",
    "transformers": "transformers",
    "triton": "Triton",
    "cuda": "CUDA",
    "load_average": "load average",
    "date": "date",
}
_ELSEWHERE = ("command",)


def environment_tables(results: Sequence[tuple[str, Result]]) -> list[Table]:
    """What all results, each with its title, have in common, a row a fact; and a row a result of what differs.

    Raises ConfigError.
    """
    facts = {}
    for title, result in results:
        with result.reading():
            facts[title] = flat_environment(result.environment)
    keys = list(dict.fromkeys([*_NAMES, *(key for each in facts.values() for key in each)]))
    found = {key: {each[key] for each in facts.values() if key in each} for key in keys}
    told = [each for each in facts.values() if each]
    shared = [key for key in keys if len(found[key]) == 1 and all(key in each for each in told)]
    common = [[fact_name(key), *found[key]] for key in shared]
    differing = [key for key in keys if found[key] and key not in shared]
    tables = [Table(("environment", "value"), (), common)] if common else []
    if differing:
        rows = [[title, *(each.get(key, "") for key in differing)] for title, each in facts.items()]
        tables.append(Table(("result", *map(fact_name, differing)), (), rows))
    return tables


def fact_name(key: str) -> str:
    """What people call a fact."""
    return _NAMES.get(key, key)


def flat_environment(environment: Mapping[str, Any]) -> dict[str, str]:
    """Every fact as text, those of objects inside by "outer inner"; what is null, or too long to read, is left out."""
    found = {}
    for key, value in environment.items():
        if key in _ELSEWHERE or value is None:
            continue
        if key == "ceilings":
            found[key] = _ceilings(value)
        elif isinstance(value, Mapping):
            found |= {f"{key} {inner}": text for inner, text in flat_environment(value).items()}
        elif key == "commit":
            found[key] = _short_commit(str(value))
        elif key == "memory_bytes":
            found[key] = size(value)
        elif isinstance(value, list):
            found[key] = ", ".join(map(str, value))
        else:
            found[key] = str(value)
    return found


def _short_commit(commit: str) -> str:
    name, dash, edited = commit.partition("-")
    return f"{name[:12]}{dash}{edited}"


def _ceilings(found: Mapping[str, Any]) -> str:
    reading = found.get("read_bytes_per_second")
    read = f"reading gives {reading / 1e9:,.3g} GB/s, " if reading else ""
    return (
        f"{read}a copy moves {found['copy_bytes_per_second'] / 1e9:,.3g} GB/s (read and written), a matrix product of "
        f"{found['dtype']} computes {found['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s"
    )


def notices(result: Result) -> list[str]:
    """What a reader must know of the run: whether it was whole, what others took, how steady the clock was."""
    lines = []
    if result.data.get("complete") is False:
        lines.append("Interrupted: only what was complete by then is shown.")
    if result.data.get("problem"):
        lines.append(f"It ended early: {result.data['problem']}")
    lines += [
        f"{name} took no part, or not to the end: {text}"
        for name, text in (result.data.get("failures") or {}).items()
    ]
    conditions = result.data.get("conditions") or {}
    lines += map(str, conditions.get("notices") or ())
    others, clock = conditions.get("others_share"), conditions.get("clock")
    if others:
        lines.append(
            f"Other processes took {others['median']:.1%} of the processors in the median repetition, "
            f"{others['high']:.1%} in the worst."
        )
    if clock:
        lines.append(_clock(clock))
    return lines


def _clock(clock: Mapping[str, Any]) -> str:
    part = clock.get("of") or "processor"
    if clock["unit"] == "relative":
        ends = f"between {clock['low']:.2f} and {clock['high']:.2f} of its median"
        return f"The {part}'s pace, by a piece of work that is always the same, was {ends}."
    ends = f"{clock['low']:,.0f} to {clock['high']:,.0f} {clock['unit']}"
    return f"The {part}'s clock was {clock['median']:,.0f} {clock['unit']} in the median ({ends})."

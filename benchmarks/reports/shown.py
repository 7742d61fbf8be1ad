"""How numbers are shown in reports; nothing is shown for None."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sleb.benchmarks.report import format_rate, format_size

Item = TypeVar("Item")

# Parts of blocks among the units of a layer map -> what one of its units is called.
_UNITS: dict[tuple[str, ...], str] = {
    ("block",): "block",
    ("attention",): "attention sublayer",
    ("mlp",): "MLP",
    ("attention", "mlp"): "sublayer",
}


def number(value: float | None, form: str = ".3g") -> str:
    """By a format specification."""
    return "" if value is None else format(value, form)


def rate(value: float | None) -> str:
    """A figure of which three digits or all before the point count."""
    return "" if value is None else format_rate(value)


def share(value: float | None, form: str = ".0%") -> str:
    """In percent."""
    return number(value, form)


def spread(low: float | None, high: float | None, form: str = ".3f") -> str:
    """The two ends of an interval."""
    return "" if low is None or high is None else f"{low:{form}}–{high:{form}}"


def rate_spread(low: float | None, high: float | None) -> str:
    """As `spread`, the ends as `rate`."""
    return "" if low is None or high is None else f"{rate(low)}–{rate(high)}"


def estimate(
    value: float | None, low: float | None, high: float | None, form: str = ".2f", num_runs: int | None = None
) -> str:
    """A value with its interval in brackets, as 1.25 (1.23–1.28); the value alone where there is none.

    num_runs: given where the ends are no interval but the least and the greatest of so many, as 1.25 (1.23–1.28 of 3
    runs).
    """
    if value is None:
        return ""
    ends = "" if low == high else spread(low, high, form)
    runs = "" if num_runs is None else plural(num_runs, "run")
    inside = " of ".join(filter(None, (ends, runs)))
    return f"{number(value, form)} ({inside})" if inside else number(value, form)


def size(num_bytes: float | None) -> str:
    """Bytes in B, KiB, MiB or GiB."""
    return "" if num_bytes is None else format_size(num_bytes)


def seconds(value: float | None) -> str:
    """A time in ms below a second, else in s."""
    if value is None:
        return ""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def listed(words: Iterable[str]) -> str:
    """Words with commas between, and the last after "and"."""
    *first, last = list(words) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def plural(count: int, noun: str) -> str:
    """A count and its noun, which takes an s for many."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def unit_noun(removed: Iterable[Any]) -> str:
    """What one of the units that a layer map removes is called; "unit" where blocks and parts of blocks are mixed."""
    parts = {str(unit).partition(".")[2] or "block" for unit in removed}
    return _UNITS.get(tuple(sorted(parts)), "unit")


def spaced(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, the first and the last among them, at distances as equal as can be."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]

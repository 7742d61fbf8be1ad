"""How numbers are shown in reports; nothing is shown for None."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def number(value: float | None, form: str = ".3g") -> str:
    """By a format specification."""
    return "" if value is None else format(value, form)


def rate(value: float | None) -> str:
    """A figure of which three digits or all before the point count."""
    return number(value, ",.0f" if value is not None and value >= 100 else ".3g")


def share(value: float | None, form: str = ".0%") -> str:
    """In percent."""
    return number(value, form)


def spread(low: float | None, high: float | None, form: str = ".3f") -> str:
    """The two ends of an interval."""
    return "" if low is None or high is None else f"{low:{form}}–{high:{form}}"


def rate_spread(low: float | None, high: float | None) -> str:
    """As `spread`, the ends as `rate`."""
    return "" if low is None or high is None else f"{rate(low)}–{rate(high)}"


def estimate(value: float | None, low: float | None, high: float | None, form: str = ".2f") -> str:
    """A value with its interval in brackets, as 1.25 (1.23–1.28); the value alone where there is none."""
    ends = "" if low == high else spread(low, high, form)
    return f"{number(value, form)} ({ends})" if ends and value is not None else number(value, form)


def size(num_bytes: float | None) -> str:
    """Bytes in B, KiB, MiB or GiB."""
    if num_bytes is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"


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


def spaced(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, the first and the last among them, at distances as equal as can be."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]

"""What the benchmarks' reports share: files written whole, numbers in a few digits."""

from __future__ import annotations

from rich.console import Console

_MIN_WIDTH = 160  # where standard output is no terminal, a line may be as long as it needs to be


def widen(console: Console) -> None:
    """Lets a table that goes to no terminal be as wide as it needs to be."""
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)


def format_rate(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_size(num_bytes: float) -> str:
    """Three digits and a unit of powers of 1,024."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 1000 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} GiB"

"""What the benchmarks' reports share: files written whole, numbers in a few digits; and the table of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sleb.benchmarks.kernels import KernelReport, KernelRow

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


def print_kernels(report: KernelReport, console: Console) -> None:
    """The table, under a line that says what ran on what, and above what its columns mean."""
    widen(console)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    environment = report.environment
    ceilings = environment["ceilings"]
    where = environment.get("gpu") or environment.get("cpu") or environment.get("system")
    say(
        f"{environment['dtype']} on {where}: a copy moves {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s "
        f"(read and written), a matrix product computes {ceilings['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s"
    )
    console.print(_kernel_table(report.rows))
    for note in kernel_notes(report):
        say(note)


def kernel_notes(report: KernelReport) -> list[str]:
    """What a reader of the table must know."""
    lines = []
    if not report.complete:
        lines.append("Interrupted: only complete cases are shown.")
    lines.append(
        "GB/s: every input read once and every output written once, over the median time. of limit: the least time "
        "that these bytes or the operations take at the ceilings above, over the median time."
    )
    if any(row.timing == "interpreted" for row in report.rows):
        lines.append("interpreted: Triton ran its kernels in Python; the times mean nothing.")
    if str(report.environment["device"]).startswith("cpu"):
        lines.append("On a CPU the inputs stay in its caches, so small shapes can pass the memory's limit.")
    return lines


def _kernel_table(rows: Sequence[KernelRow]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("operator", "shape", "backend"):
        table.add_column(heading)
    for heading in ("µs", "low–high", "GB/s", "TFLOP/s", "limit", "of limit"):
        table.add_column(heading, justify="right")
    table.add_column("timed by")
    previous = None
    for row in rows:
        case = (row.op, row.shape)
        if previous is not None and previous != case:
            table.add_section()
        shown = ("", "") if case == previous else case
        table.add_row(*shown, row.backend, *_kernel_cells(row))
        previous = case
    return table


def _kernel_cells(row: KernelRow) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else format_rate(value)

    if row.microseconds is None:
        return ["", "", "", "", "", "", f"not run: {row.reason}"]
    return [
        number(row.microseconds),
        f"{number(row.microseconds_low)}–{number(row.microseconds_high)}",
        number(row.gb_per_second),
        number(row.tflops),
        row.bound,
        "" if row.roofline_share is None else f"{row.roofline_share:.0%}",
        str(row.timing),
    ]

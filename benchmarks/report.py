"""What a benchmark reports: a table for people, JSON for everything else."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks.results import NOISY, Row
from sleb.errors import ConfigError

if TYPE_CHECKING:
    from sleb.benchmarks.kernels import KernelReport, KernelRow

_MIN_WIDTH = 160  # where standard output is no terminal, a line may be as long as it needs to be


@dataclass(frozen=True)
class Report:
    """All that a run found. complete: whether it was not interrupted."""

    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    complete: bool

    def to_json(self) -> str:
        """One object with the keys environment, model, settings, rows, complete; ends with a newline."""
        return json.dumps(asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def check_writable(path: Path) -> None:
    """Raises ConfigError, before hours are spent, if a file cannot be written at `path`. Leaves nothing behind."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name a file in it")
    probe = _beside(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def write_text(path: Path, text: str) -> None:
    """Writes atomically: a reader, or a crash, sees the old file or the new one. Raises ConfigError."""
    temporary = _beside(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path.resolve())
    except OSError as error:
        raise _not_writable(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    target = path.resolve()
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written ({error.strerror}); name a file in a folder that exists and is yours"
    )


def widen(console: Console) -> None:
    """Lets a table that goes to no terminal be as wide as it needs to be."""
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)


def print_report(report: Report, console: Console) -> None:
    """The table, under a line that says what ran on what, and above what its columns mean."""
    environment, rows = report.environment, report.rows
    widen(console)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    where = environment.get("gpu") or environment.get("cpu") or environment.get("system")
    threads = f", threads: {environment.get('threads')}" if environment.get("device") == "cpu" else ""
    say(f"{report.model.get('name')}, {environment.get('dtype')} on {where}{threads}")
    console.print(_table(rows))
    for note in notes(report):
        say(note)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("test")
    headings = (
        "depth",
        "tokens/s",
        "low–high",
        "time",
        "speedup",
        "low–high",
        "ideal",
        "of gain",
        "roofline",
        "weights",
        "KV",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    previous = ""
    for row in rows:
        workload = describe_workload(row)
        if previous and workload != previous:
            table.add_section()
        table.add_row("" if workload == previous else workload, *_cells(row))
        previous = workload
    return table


def describe_workload(row: Row) -> str:
    """The test of a row in a few words: batch × tokens."""
    if row.test == "prompt":
        return f"prompt {row.batch} × {row.prompt_tokens}"
    new_tokens = row.output_tokens - (row.test == "decode")
    return f"{row.test} {row.batch} × {new_tokens} after {row.prompt_tokens}"


def _cells(row: Row) -> list[str]:
    cells = [
        str(row.depth),
        _rate(row.tokens_per_second) + ("*" if row.noisy else ""),
        f"{_rate(row.tokens_per_second_low)}–{_rate(row.tokens_per_second_high)}",
        f"{row.seconds:.3g} s",
    ]
    if row.depth == row.baseline_depth:
        cells += ["1", "", "1", ""]
    else:
        cells += [
            f"{row.speedup:.3f}",
            f"{row.speedup_low:.3f}–{row.speedup_high:.3f}",
            f"{row.ideal_speedup:.3f}",
            "" if row.ideal_gain_share is None else f"{row.ideal_gain_share:.0%}",
        ]
    cells.append("" if row.roofline_share is None else f"{row.roofline_share:.0%}")
    return [*cells, _size(row.weight_bytes), _size(row.kv_bytes)]


def notes(report: Report) -> list[str]:
    """What a reader of the table must know."""
    rows = report.rows
    lines = []
    if not report.complete:
        lines.append("Interrupted: only complete repetitions are counted, and tests without one are missing.")
    if report.model.get("layer_map") == "stand-in":
        lines.append(
            "The layer map is a stand-in: no map of this shape comes with sleb, so blocks evenly spaced over the "
            "middle are removed. Speed does not depend on which; quality does."
        )
    if not rows:
        return lines
    noisy = [
        f"{describe_workload(row)}, depth {row.depth}: ±{row.relative_spread:.0%}"
        for row in rows
        if row.noisy
    ]
    if noisy:
        lines.append(
            f"* Noisy: half the spread is above {NOISY:.0%} of the median ({'; '.join(noisy)}). "
            "Is the machine doing something else? Speedups suffer less, as they are ratios within a repetition."
        )
    counts = sorted({row.repetitions for row in rows})
    if counts[0] == 1:
        lines.append("One repetition says nothing about spread; give --repetitions 5 or more.")
    shown = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    plural = "" if counts == [1] else "s"
    lines.append(
        f"tokens/s: median of {shown} repetition{plural}; generate counts new tokens over the whole run, prompts too, "
        "decode those after each request's first, and their time alone."
    )
    if any(row.depth != row.baseline_depth for row in rows):
        lines += [
            f"speedup: over depth {rows[0].baseline_depth}, median of the ratios within each repetition.",
            "ideal: modelled from FLOPs for prompts; for generate from the bytes of weights and KV that the decode "
            "steps read, which is a bound where memory is what limits: at a large batch a CPU computes as well. "
            "of gain: (speedup − 1) / (ideal − 1).",
        ]
    ceilings = report.environment.get("ceilings")
    if ceilings:
        lines.append(
            f"roofline: the least time over the time, at a copy's {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s "
            "(read and written) for decode's weights and KV, and at a matrix product's "
            f"{ceilings['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s ({ceilings['dtype']}) for a prompt."
        )
    return lines


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(num_bytes: float) -> str:
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
        return "" if value is None else _rate(value)

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

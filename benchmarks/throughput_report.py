"""What `sleb bench throughput` reports: a table for people, and below it what the table's reader must know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sleb.benchmarks.paper import describe_paper, print_paper
from sleb.benchmarks.report import format_rate, format_size, widen
from sleb.benchmarks.results import NOISY, Row
from sleb.benchmarks.stats import LEAST_FOR_LEVEL, UNTIL_NARROW
from sleb.benchmarks.workloads import describe_workload

_HEADINGS = (
    *("depth", "tokens/s", "low–high", "time", "speedup", "interval", "verdict", "ideal", "of gain"),
    *("roofline", "weights", "KV"),
)
_CEILING_ERROR = 0.02
# Why a workload whose intervals are wide was not repeated further.
_STOPPED = {
    "repetitions": "the most repetitions",
    "time": "the time for it was over",
    "interrupt": "interrupted",
}
_STAND_IN = (
    "The layer map is a stand-in: no map of this shape comes with sleb, so blocks evenly spaced over the middle are "
    "removed. Speed does not depend on which; quality does."
)


@dataclass(frozen=True)
class Report:
    """All that a run found. complete: whether it was not interrupted. conditions: see `ConditionsWatch.summary`."""

    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    complete: bool
    conditions: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON has it: its kind and the fields; with --paper the paper's rows."""
        result = {"kind": "throughput", **asdict(self)}
        return result | {"paper": describe_paper()} if self.settings.get("paper") else result

    def to_json(self) -> str:
        """`to_dict` as text, which ends with a newline."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def print_report(report: Report, console: Console) -> None:
    """The table, under a line that says what ran on what, and above what its columns mean."""
    environment, rows = report.environment, report.rows
    widen(console)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    where = environment.get("gpu") or environment.get("cpu") or environment.get("system")
    threads = f", threads: {environment.get('threads')}" if environment.get("device") == "cpu" else ""
    weights = report.settings.get("weights", "auto")
    computed = f"{environment.get('dtype')}" + ("" if weights == "auto" else f", {weights} weights")
    say(f"{report.model.get('name')}, {computed} on {where}{threads}")
    console.print(_table(rows))
    if not report.complete:
        say("Interrupted: only complete repetitions are counted, and tests without one are missing.")
    for note in (*notes(report.to_dict()), *(meanings(report) if rows else ())):
        say(note)
    for notice in report.conditions.get("notices", ()):
        say(notice)
    if report.settings.get("paper") and rows:
        print_paper(rows, report.model, f"{where}{threads}", console)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("test")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    previous = ""
    for row in rows:
        workload = workload_of(row)
        if previous and workload != previous:
            table.add_section()
        table.add_row("" if workload == previous else workload, *_cells(row))
        previous = workload
    return table


def workload_of(row: Row) -> str:
    """The workload of a row in a few words."""
    return describe_workload(row.test, row.batch, row.prompt_tokens, row.output_tokens)


def _workload(row: Mapping[str, Any]) -> str:
    return describe_workload(row["test"], row["batch"], row["prompt_tokens"], row["output_tokens"])


def variant_label(row: Row) -> str:
    """A depth as "6"; "0 again" for the control; "0 + 6" for a mixed batch."""
    if row.depths is not None:
        return " + ".join(map(str, row.depths))
    return f"{row.depth} again" if row.variant == "control" else str(row.depth)


def _cells(row: Row) -> list[str]:
    cells = [
        variant_label(row),
        format_rate(row.tokens_per_second) + ("*" if row.noisy else ""),
        f"{format_rate(row.tokens_per_second_low)}–{format_rate(row.tokens_per_second_high)}",
        f"{row.seconds:.3g} s",
    ]
    if row.verdict == "baseline":
        cells += ["1", "", "", "1", ""]
    else:
        cells += [
            f"{row.speedup:.3f}",
            f"{row.speedup_low:.3f}–{row.speedup_high:.3f}",
            "" if row.speedup_level is None else row.verdict,
            f"{row.ideal_speedup:.3f}",
            "" if row.ideal_gain_share is None else f"{row.ideal_gain_share:.0%}",
        ]
    cells.append("" if row.roofline_share is None else f"{row.roofline_share:.0%}")
    return [*cells, format_size(row.weight_bytes), format_size(row.kv_bytes)]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the rows must know, beside what columns mean and what the conditions were.

    result: `Report.to_dict`, or a result file; what an older one does not have is passed over.
    """
    rows: Sequence[Mapping[str, Any]] = result.get("rows") or ()
    settings: Mapping[str, Any] = result.get("settings") or {}
    model = result.get("model")
    lines = []
    if isinstance(model, Mapping) and model.get("layer_map") == "stand-in":
        lines.append(_STAND_IN)
    if rows:
        lines += [*_noise_notes(rows), *_repetition_notes(rows, settings), *_rest_notes(rows, settings)]
    return lines


def _noise_notes(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    noisy = [
        f"{_workload(row)}, {row.get('variant') or row['depth']}: ±{row['relative_spread']:.0%}"
        for row in rows
        if (row.get("relative_spread") or 0) > NOISY
    ]
    if noisy:
        yield (
            f"* Noisy: half the spread is above {NOISY:.0%} of the median ({'; '.join(noisy)}). "
            "Is the machine doing something else? Speedups suffer less, as they are ratios within a repetition."
        )


def _repetition_notes(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[str]:
    """How often it was repeated, which intervals stayed wider than they were to be, and what they are worth."""
    if any((row.get("repetitions") or LEAST_FOR_LEVEL) < LEAST_FOR_LEVEL for row in rows):
        yield (
            f"An interval of 95 % takes {LEAST_FOR_LEVEL} repetitions. With fewer, the column has the least and the "
            "greatest ratio, and there is no verdict."
        )
    interval = settings.get("interval") or 0.0
    wide: dict[str, float] = {}
    for row in rows:
        half_width = _half_width(row)
        if row.get("stopped") != "interval" and half_width is not None and half_width > interval:
            key = f"{_workload(row)}, {_STOPPED.get(row.get('stopped') or '', 'interrupted')}"
            wide[key] = max(wide.get(key, 0.0), half_width)
    if wide and interval:
        shown = "; ".join(f"{workload}: ±{width:.1%}" for workload, width in wide.items())
        yield f"Intervals wider than ±{interval:.1%} ({shown}): give --max-repetitions or --time-budget more."
    chosen = (settings.get("max_repetitions") or 0) > (settings.get("repetitions") or 0)
    if chosen and any(row.get("stopped") == "interval" for row in rows):
        yield (
            "Where repetitions went on until intervals were narrow, those of 95 % hold the true value in "
            f"{UNTIL_NARROW} of runs, and about one control in twelve differs by chance."
        )


def _half_width(row: Mapping[str, Any]) -> float | None:
    """As `Row.half_width`."""
    if row.get("speedup_level") is None:
        return None
    return float((row["speedup_high"] - row["speedup_low"]) / 2 / row["speedup"])


def _rest_notes(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[str]:
    skipped = settings.get("not_mixed") or ()
    if skipped:
        yield f"Not mixed, since the batch has fewer requests than there are depths: {', '.join(skipped)}."
    if any((row.get("roofline_share") or 0) > 1 + _CEILING_ERROR for row in rows):
        yield (
            "A share of the roofline above 100 % says that the ceiling was measured too low: the machine was slower at "
            "that moment, or its library's matrix product is slower than the model's own kernels."
        )


def meanings(report: Report) -> Iterator[str]:
    """What the columns are."""
    rows = report.rows
    counts = sorted({row.repetitions for row in rows})
    shown = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    plural = "" if counts == [1] else "s"
    yield (
        f"tokens/s: median of {shown} repetition{plural}; generate counts new tokens over the whole run, prompts too, "
        "decode those after each request's first, at the pace of the steps in which all requests decode."
    )
    if any(row.is_pruned for row in rows):
        yield (
            f"speedup: over depth {rows[0].baseline_depth}, from the ratios within each repetition: their "
            "Hodges–Lehmann estimate, and Wilcoxon's interval of 95 %; the verdict is what the interval shows."
        )
        yield (
            "ideal: modelled from FLOPs for prompts; for generate and decode from the bytes of weights and KV that the "
            "decode steps read. of gain: (speedup − 1) / (ideal − 1)."
        )
    if any(row.variant == "control" for row in rows):
        yield 'again: the same depth a second time, as a control; its verdict is to be "no difference".'
    if any(row.depths for row in rows):
        yield (
            "Depths with a plus: one batch of all of them in turns; its speedup is the time that its requests' depths "
            "would take alone over its own, 1 if mixing costs nothing."
        )
    if report.environment.get("ceilings"):
        yield _roofline_note(report.environment["ceilings"])


def _roofline_note(ceilings: Mapping[str, Any]) -> str:
    read = ceilings.get("read_bytes_per_second")
    copied = f"{ceilings['copy_bytes_per_second'] / 1e9:,.0f}"
    memory = f"a copy's {copied} GB/s (read and written)"
    if read:
        memory = (
            f"the {read / 1e9:,.0f} GB/s that the kernels' threads read (a copy reads and writes {copied})"
        )
    return (
        f"roofline: the least time over the time. The least time is that of the weights and KV at {memory}, or that of "
        f"the operations at a matrix product's {ceilings['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s "
        f"({ceilings['dtype']}), whichever is more; of generate, the sum for prompts and steps."
    )

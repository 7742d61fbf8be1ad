"""Measurements for people: tables in a terminal and in Markdown, reports with plots, and what changed between two.

All of it is generic: a row a case and subject, a column a metric, its ratio to the baseline and each fact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table as RichTable
from rich.text import Text

from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.errors import ConfigError
from sleb.files import check_writable, write_text
from sleb.terminal import Console

Table = tuple[list[str], list[list[str]]]
"""Headings, and rows of as many cells; the first two columns are the case and the subject."""

# Facts that are for scripts: what case, subject, value and ratio say already. So is every name with an underscore
# but those that have a heading.
_FOR_SCRIPTS = {
    *("test", "depth", "depths", "batch", "variant", "seconds", "speedup", "perplexity", "removed", "level"),
    *("concurrency", "repetitions", "stopped", "verdict", "completed", "duration"),
}
_HEADINGS = {"ideal_speedup": "ideal ×", "roofline_share": "of roofline", "goodput": "goodput, requests/s"}
# Of an environment: what changes from run to run, and is no reason for a difference.
_PASSING = {"date", "load average", "command", "ceilings", "conditions", "memory bytes"}
_MIN_WIDTH = 220  # where standard output is no terminal, a line may be as long as it needs to be


def number(value: Any) -> str:
    """A cell: four digits, or all before the point; empty for None."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def _cells(each: Measurement) -> dict[str, str]:
    value, ratio = "failed" if each.value is None else number(each.value), each.ratio
    if each.spread is not None and each.spread[0] < each.spread[1]:
        value += f" ({number(each.spread[0])}–{number(each.spread[1])})"
    if ratio is None:
        return {each.metric: value}
    ends = "" if ratio.low is None or ratio.high is None else f" ({ratio.low:.2f}–{ratio.high:.2f})"
    return {each.metric: value, f"{each.metric} ×": f"{ratio.estimate:.2f}{ends}"}


def table(measurements: Iterable[Measurement]) -> Table:
    """One table of all; a case that goes on is named once."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    metrics: dict[str, None] = {}
    facts: dict[str, None] = {}
    for each in measurements:
        shown = {
            _HEADINGS.get(name, name): number(fact)
            for name, fact in each.facts.items()
            if name in _HEADINGS or (name not in _FOR_SCRIPTS and "_" not in name)
            if not isinstance(fact, list | dict)
        }
        row = rows.setdefault((each.case, each.subject), {})
        row |= shown | _cells(each)
        metrics |= dict.fromkeys((each.metric, f"{each.metric} ×"))
        facts |= dict.fromkeys(shown)
    columns = [name for name in metrics | facts if any(row.get(name) for row in rows.values())]
    lines = [[*key, *(row.get(column, "") for column in columns)] for key, row in rows.items()]
    for before, line in reversed(list(pairwise(lines))):
        line[0] = "" if line[0] == before[0] else line[0]
    return ["case", "", *columns], lines


def tables(measurements: Sequence[Measurement]) -> list[Table]:
    """Tables that are not sparse: cases of the same metrics share one."""
    metrics: dict[str, dict[str, None]] = {}
    for each in measurements:
        metrics.setdefault(each.case, {})[each.metric] = None
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for each in measurements:
        groups.setdefault(tuple(metrics[each.case]), []).append(each)
    return [table(group) for group in groups.values()]


def facts_line(result: Result) -> str:
    """What was measured on what: model, dtype, weights, processor, threads, version, day."""
    environment, settings = result.environment, result.settings
    model, weights = settings.get("model"), settings.get("weights")
    threads = environment.get("threads") if not environment.get("gpu") else None
    facts = (
        model.get("name") if isinstance(model, Mapping) else model,
        environment.get("dtype"),
        None if weights in (None, "auto", environment.get("dtype")) else f"{weights} weights",
        environment.get("gpu") or environment.get("cpu") or environment.get("system"),
        threads and f"threads: {threads}",
        environment.get("sleb") and f"sleb {environment['sleb']}",
        str(environment.get("date") or "")[:10],
    )
    return ", ".join(str(fact) for fact in facts if fact)


def _notes(result: Result) -> list[str]:
    return [*([] if result.complete else ["Interrupted: only what was complete is here."]), *result.notes]


def print_result(result: Result, console: Console | None = None) -> None:
    """Tables and notes on `console`; None: standard output."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    console.print(Text(facts_line(result)), soft_wrap=True)
    for heads, rows in tables(result.measurements):
        drawn = RichTable(box=SIMPLE, pad_edge=False, collapse_padding=True)
        for place, head in enumerate(heads):
            drawn.add_column(Text(head), justify="left" if place < 2 else "right")
        for row in rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
    for note in _notes(result):
        console.print(Text(note), soft_wrap=True)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (heads, ["---", "---", *["---:"] * (len(heads) - 2)], *rows)
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def check_report(folder: Path) -> None:
    """Makes a report's folder. Raises ConfigError, before hours are spent, where nothing can be written or drawn."""
    from sleb.benchmarks.plots import check_plots

    check_plots("a report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"report folder {folder} cannot be made ({error.strerror}); name another") from None
    check_writable(folder / "report.md")


def write_report(folder: Path, results: Sequence[Result], title: str = "Measured with sleb") -> list[Path]:
    """Writes report.md and plots (PNG); returns what was written. Raises ConfigError for a folder that cannot be."""
    from sleb.benchmarks.plots import draw_result

    check_report(folder)
    written: list[Path] = []
    kinds, text = [result.kind for result in results], f"# {title}\n"
    for place, result in enumerate(results):
        several = kinds.count(result.kind) > 1
        name = f"{result.kind}-{kinds[: place + 1].count(result.kind)}" if several else result.kind
        command = result.environment.get("command")
        text += f"\n## {name.replace('-', ' ')}\n\n{facts_line(result)}\n" + (
            f"\n    {command}\n" if command else ""
        )
        plots = draw_result(result, folder / name)
        written += plots
        text += "".join(f"\n![{path.stem}]({path.name})\n" for path in plots)
        text += "".join("\n" + markdown(*each) for each in tables(result.measurements))
        text += "".join(f"\n- {note}" for note in _notes(result)) + "\n"
    write_text(folder / "report.md", text)
    return [*written, folder / "report.md"]


def diff(old: Result, new: Result) -> Result:
    """The figures that both have, each with a ratio, above 1 where `new` is better; the rest is told in notes.

    Raises ConfigError for results of different kinds, or without a figure in common.
    """
    if old.kind != new.kind:
        raise ConfigError(
            f"the first result is of `{old.kind}` and the second of `{new.kind}`; give two of one kind"
        )
    before, after = ({each.key: each for each in result.measurements} for result in (old, new))
    if not before.keys() & after.keys():
        named = [" / ".join(next(iter(each), ("nothing",))) for each in (before, after)]
        raise ConfigError(
            f"the two results have no figure in common ({named[0]} against {named[1]}); "
            "measure both with the same options"
        )
    changes = []
    for key, now in after.items():
        if key in before:
            was, subject = before[key], f"{now.subject}, {now.metric}"
            overlap = None
            if was.spread is not None and now.spread is not None:
                overlap = was.spread[0] <= now.spread[1] and now.spread[0] <= was.spread[1]
            facts = {"old": was.value, "intervals overlap": overlap}
            changes.append(Measurement(now.case, subject, "new", now.value, None, _change(was, now), facts))
    notes: list[str] = []
    for one, other in ((old.environment, new.environment), (old.settings, new.settings)):
        one, other = _flat(one), _flat(other)
        common = (name for name in one.keys() & other.keys() if not isinstance(one[name], float))
        notes += [
            f"{name}: {one[name]}, now {other[name]}" for name in common if not _same(one[name], other[name])
        ]
    notes.sort()
    for label, names in (("old", before.keys() - after.keys()), ("new", after.keys() - before.keys())):
        if names:
            shown = "; ".join(" / ".join(name) for name in sorted(names)[:5])
            notes.append(f"figures only in the {label} one: {len(names)}, as {shown}")
    return Result("diff", new.environment, new.settings, changes, notes)


def _change(old: Measurement, new: Measurement) -> Ratio | None:
    """Above 1 where new is better; None where one failed, or it would be over 0."""
    if old.value is None or new.value is None:
        return None
    better, worse = (old.value, new.value) if old.less_is_better else (new.value, old.value)
    return Ratio(better / worse) if worse else Ratio(1.0) if better == worse else None


def _same(one: Any, other: Any) -> bool:
    """A removal order that goes on as another begins is no other one: it reaches deeper."""
    if isinstance(one, list) and isinstance(other, list):
        return all(first == second for first, second in zip(one, other, strict=False))
    return bool(one == other)


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Nested facts under names with a blank between, without what passes."""
    found: dict[str, Any] = {}
    for name, fact in ((key.replace("_", " "), fact) for key, fact in facts.items()):
        if isinstance(fact, Mapping) and name not in _PASSING:
            found |= {f"{name} {inner}": value for inner, value in _flat(fact).items()}
        elif name not in _PASSING:
            found[name] = fact
    return found

"""Plots of measurements, with matplotlib: full words, intervals, colours that colour-blind people tell apart."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008, "Color Universal Design"; each with a marker of its own, for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#444444"

Point = tuple[float, float | None, tuple[float, float] | None]
"""x, y, and the ends of the interval around y, if there is one."""


@dataclass(frozen=True)
class Line:
    """dashed: one that is modelled, or goes with another of its `number`, which is its colour and marker."""

    name: str
    points: Sequence[Point]
    number: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over one x. ticks: names of x = 0, 1, …; empty: numbers. bottom, top: of y; None: as the lines need."""

    title: str
    y_label: str
    lines: Sequence[Line]
    x_label: str = "depth (units removed)"
    ticks: Sequence[str] = ()
    bottom: float | None = None
    top: float | None = None


@contextmanager
def _figure(
    stem: Path, title: str, names: Sequence[str], size: tuple[float, float], columns: int,
    suffixes: Sequence[str], share_y: bool,
) -> Iterator[list[Axes]]:  # fmt: skip
    """Axes for each of `names`, `size` inches; at the end they are written. Raises ConfigError if they cannot be."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    inches = (max(5.6, size[0] * columns), size[1] * rows + 0.8)  # as wide as a heading
    # A fixed salt and no date: the same figures are the same bytes. Names of models are no formulas.
    look: Any = {"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    with pyplot.rc_context(look):
        drawn, grid = pyplot.subplots(
            rows, columns, figsize=inches, layout="constrained", squeeze=False, sharey=share_y
        )
        try:
            drawn.suptitle(title, fontsize=11)
            for axes, name in zip(grid.flat, names, strict=False):
                axes.set_title(name, fontsize=9.5)
                axes.grid(alpha=0.25)
            for axes in grid.flat[len(names) :]:
                axes.remove()
            yield list(grid.flat[: len(names)])
            for suffix in suffixes:
                path = stem.with_name(stem.name + suffix)
                drawn.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"plot {stem} cannot be written: {error.strerror}") from None
        finally:
            pyplot.close(drawn)


def draw_lines(
    stem: Path,
    title: str,
    panels: Sequence[Panel],
    *,
    columns: int = 3,
    size: tuple[float, float] = (3.3, 2.9),
    suffixes: Sequence[str] = (".png",),
    share_y: bool = False,
    recommended: int | None = None,
    log: bool = False,
) -> None:
    """Panels of lines with intervals, written to `stem` with each suffix. Raises ConfigError.

    share_y: one range of y for all. recommended: a depth with a line of its own. log: of y.
    """
    named: dict[str, Any] = {}
    with _figure(stem, title, [each.title for each in panels], size, columns, suffixes, share_y) as grid:
        for axes, panel in zip(grid, panels, strict=True):
            for line in panel.lines:
                _draw_line(axes, line)
            if recommended is not None:
                label = f"recommended: {recommended}"
                axes.axvline(recommended, color=_GREY, linewidth=1, linestyle=":", label=label)
            if panel.ticks:
                axes.set_xticks(range(len(panel.ticks)), panel.ticks)
                axes.margins(x=0.08)
            axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
            if panel.bottom is not None:
                axes.set_ylim(panel.bottom, panel.top)
            if log:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter("{x:g}")
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(map(str, labels), handles, strict=True))
        grid[0].figure.legend(  # below all panels: where lines leave room is not known
            list(named.values()), list(named), frameon=False, loc="outside lower center",
            ncols=min(2, len(named)),
        )  # fmt: skip


def _draw_line(axes: Axes, line: Line) -> None:
    x, y, ends = zip(*((x, y, ends or (y, y)) for x, y, ends in line.points if y is not None), strict=True)
    number = line.number % len(COLOURS)
    if line.dashed:
        axes.plot(x, y, linewidth=1.2, linestyle="--", color=COLOURS[number], label=line.name)
        return
    label = line.name + (", 95 % interval" if any(each for *_, each in line.points) else "")
    below = [max(0.0, value - low) for value, (low, _) in zip(y, ends, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(
        x, y, yerr=[below, above], elinewidth=1.2, linewidth=1.6, markersize=4.5, color=COLOURS[number],
        marker=MARKERS[number], label=label,
    )  # fmt: skip


def draw_result(result: Result, stem: Path) -> list[Path]:
    """The plots that a result gives, as PNG, names beginning as `stem`; none of a result that has no curve to show.

    Speed by depth, quality by depth, load by level, ratios to other engines. Raises ConfigError.
    """
    kinds: Mapping[str, Callable[[Result, Path], bool]] = {
        "speed": draw_speed,
        "quality": draw_quality,
        "load": _draw_load,
        "ratios": _draw_ratios,
    }
    stems = {stem.with_name(f"{stem.name}-{name}"): draw for name, draw in kinds.items()}
    return [path.with_name(f"{path.name}.png") for path, draw in stems.items() if draw(result, path)]


def _depths(result: Result, metric: str) -> dict[str, list[tuple[int, Measurement]]]:
    """Figures of depths by case, with the depth: subjects are "depth 6"."""
    cases: dict[str, list[tuple[int, Measurement]]] = {}
    for each in result.measurements:
        depth = re.fullmatch(r"depth (\d+)", each.subject)
        if depth and each.metric == metric and each.value is not None:
            cases.setdefault(each.case, []).append((int(depth[1]), each))
    return cases


def _ends(ratio: Ratio) -> tuple[float, float] | None:
    return None if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)


def _heading(result: Result) -> str:
    environment, model = result.environment, result.settings.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    where = environment.get("gpu") or environment.get("cpu")
    return ", ".join(str(part) for part in (name, environment.get("dtype"), where) if part)


def draw_speed(result: Result, stem: Path) -> bool:
    """Speedup by depth with intervals, a panel a case; the modelled ideal as a line. False where there is none."""
    panels = []
    for case, found in _depths(result, "tokens/s").items():
        if any(each.ratio for _, each in found):
            ratios = [(depth, each.ratio or Ratio(1.0)) for depth, each in found]
            measured = [(depth, ratio.estimate, _ends(ratio)) for depth, ratio in ratios]
            ideal = [(depth, each.facts.get("ideal_speedup"), None) for depth, each in found]
            lines = [Line("measured", measured)]
            if any(y is not None for _, y, _ in ideal):
                lines.append(Line("ideal (modelled)", ideal, 6, dashed=True))
            panels.append(Panel(case, "times as fast as depth 0", lines))
    if panels:
        title = f"Speed by depth: {_heading(result)}"
        draw_lines(stem, title, panels, columns=2, size=(3.6, 2.4), share_y=True)
    return bool(panels)


_QUALITY = {
    "perplexity": "perplexity (lower is better)",
    "same token": "share of next tokens as at depth 0",
    "KL": "KL from depth 0, nats (lower is better)",
}


def draw_quality(result: Result, stem: Path, suffixes: Sequence[str] = (".png",)) -> bool:
    """Perplexity, agreement and divergence by depth with intervals, a line a text; False where there are none."""
    panels = []
    for metric, label in _QUALITY.items():
        lines = [
            Line(case, [(depth, each.value, each.spread) for depth, each in found], number)
            for number, (case, found) in enumerate(_depths(result, metric).items())
        ]
        panels.append(Panel(metric, label, lines, bottom=0, top=1 if metric == "same token" else None))
    if all(len(line.points) < 2 for line in panels[0].lines):
        return False
    panels = [panel for panel in panels if panel.lines]
    draw_lines(stem, f"Quality by depth: {_heading(result)}", panels, suffixes=suffixes)
    return True


def _draw_load(result: Result, stem: Path) -> bool:
    """Throughput, time to first token and time per token by level of load, a line a server."""
    values = {each.key: each.value for each in result.measurements if each.value is not None}
    levels, subjects, metrics = (list(dict.fromkeys(key[place] for key in values)) for place in range(3))
    if len(levels) < 2 or "TTFT p50 ms" not in metrics:
        return False
    panels = []
    for name, label in (("tokens/s", "tokens/s"), ("TTFT {} ms", "TTFT, ms"), ("TPOT {} ms", "TPOT, ms")):
        lines = []
        for number, subject in enumerate(subjects):
            for percentile in ("p50", "p99"):
                metric, dashed = name.format(percentile), percentile == "p99"
                if metric in metrics and not (dashed and metric == name):
                    points = [
                        (at, values.get((level, subject, metric)), None) for at, level in enumerate(levels)
                    ]
                    part = "99th percentile" if dashed else "median"
                    lines.append(Line(f"{subject}, {part}", points, number, dashed))
        ticks = [level.partition(",")[0] for level in levels]
        panels.append(Panel(label, "", lines, "", ticks, bottom=0))
    draw_lines(stem, f"By level of load: {_heading(result)}", panels)
    return True


def _draw_ratios(result: Result, stem: Path) -> bool:
    """How many times as fast as another engine, bars with intervals, a panel a test; a line at 1.

    The cases are "TEST beside PEER".
    """
    tests: dict[str, list[tuple[str, Ratio]]] = {}
    for each in result.measurements:
        test, beside, peer = each.case.partition(" beside ")
        if beside and each.ratio is not None and each.metric == "tokens/s":
            tests.setdefault(test, []).append((f"{each.subject} to {peer}", each.ratio))
    names = list(dict.fromkeys(name for bars in tests.values() for name, _ in bars))
    if not names:
        return False
    size = (2.7 if len(tests) > 1 else 5.5, 0.5 + 0.24 * len(names))
    title = f"Times the tokens/s of other engines: {_heading(result)}"
    with _figure(stem, title, list(tests), size, len(tests), (".png",), True) as grid:
        for axes, bars in zip(grid, tests.values(), strict=True):
            for name, ratio in bars:
                place, (low, high) = names.index(name), _ends(ratio) or (ratio.estimate, ratio.estimate)
                colour = COLOURS[0 if ratio.estimate >= 1 else 1]
                axes.barh(place, ratio.estimate, height=0.65, color=colour, alpha=0.75)
                axes.plot([low, high], [place, place], color=_GREY, linewidth=1.2)
                axes.text(high, place, f" {ratio.estimate:.2f}", va="center", fontsize=7.5)
            axes.axvline(1, color=_GREY, linewidth=1, linestyle="--")
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_xlim(0, 1.22 * axes.get_xlim()[1])
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        grid[0].set_yticks(range(len(names)), names, fontsize=8)
        grid[0].set_ylim(len(names) - 0.4, -0.6)
    return True


def draw_front(
    stem: Path,
    title: str,
    perplexities: Mapping[str, Sequence[Point]],
    speedups: Sequence[Point],
    recommended: int,
) -> None:
    """Perplexity, by name of the text, and the predicted speedup by depth, as PNG and SVG. Raises ConfigError."""
    lines = [Line(name, points, number) for number, (name, points) in enumerate(perplexities.items())]
    panels = [Panel("perplexity", "perplexity (lower is better)", lines, bottom=0)]
    if speedups:
        speed = Line("speedup, predicted", speedups, len(lines))
        panels.append(Panel("speedup", "times as fast as depth 0", [speed], bottom=1))
    draw_lines(stem, title, panels, suffixes=(".png", ".svg"), recommended=recommended)

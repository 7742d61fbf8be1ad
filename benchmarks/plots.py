"""Plots as PNG and SVG, with matplotlib: labels of full words, colours that colour-blind people tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008, "Color Universal Design"; each with a marker and a dash of its own, for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))

Point = tuple[float, float]
Bar = tuple[float, float, float, float]
"""x, y, and the ends of the interval around y."""
Measure = tuple[str, float, float, float]
"""A label, a value, and the ends of its interval."""

_GREY = "#444444"


@contextmanager
def figure(stem: Path, title: str, size: tuple[float, float] = (6.4, 4.4)) -> Iterator[Axes]:
    """Axes to draw on; at the end they are written to `stem` with .png and .svg. Raises ConfigError if not.

    The label of an axis that starts above zero says where it does.
    """
    with _canvas(stem, size) as [axes]:
        axes.set_title(title, fontsize=11)
        yield axes


@contextmanager
def panels(stem: Path, title: str, names: Sequence[str]) -> Iterator[list[Axes]]:
    """As `figure`, with axes for each of `names`, two in a row, that share their scales; `label_panels` labels them."""
    rows, columns = -(-len(names) // 2), min(2, len(names))
    with _canvas(stem, (6.4, 1.1 + 1.9 * rows), rows, columns) as found:
        found[0].figure.suptitle(title, fontsize=11)
        for axes, name in zip(found, names, strict=False):
            axes.set_title(name, fontsize=9)
        for axes in found[len(names) :]:
            axes.remove()
        yield found[: len(names)]


def label_panels(found: Sequence[Axes], x_label: str, y_label: str) -> None:
    """Labels of x below the lowest panels, of y beside those on the left."""
    for place, axes in enumerate(found):
        if place % 2 == 0:
            axes.set_ylabel(y_label)
        if place + 2 >= len(found):
            axes.set_xlabel(x_label)
            axes.tick_params(axis="x", labelbottom=True)


@contextmanager
def _canvas(
    stem: Path, size: tuple[float, float], num_rows: int = 1, num_columns: int = 1
) -> Iterator[list[Axes]]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # A fixed salt and no date: the same figures are the same bytes. Names of models are no formulas.
    with pyplot.rc_context(
        {"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 10, "text.parse_math": False}
    ):
        drawn, grid = pyplot.subplots(
            num_rows, num_columns, figsize=size, layout="constrained", squeeze=False, sharex=True, sharey=True
        )
        try:
            for axes in grid.flat:
                axes.grid(alpha=0.25)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
            yield list(grid.flat)
            _say_starts(drawn.axes)
            for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
                path = stem.with_name(stem.name + suffix)
                try:
                    drawn.savefig(path, dpi=150, metadata=metadata)
                except OSError as error:
                    raise ConfigError(f"plot {path} cannot be written: {error.strerror}") from None
        finally:
            pyplot.close(drawn)


def _say_starts(drawn: Sequence[Axes]) -> None:
    """Lets axes that do not reach down to zero start at a tick, and their labels say at which."""
    starts = []
    for axes in drawn:
        for axis, set_limits in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
            low, high = axis.get_view_interval()
            if axis.get_scale() == "linear" and low > 0 and axis.get_label_text():
                # A limit that was computed may lie a rounding error beside its tick.
                below = [float(tick) for tick in axis.get_majorticklocs() if tick <= low + 1e-9 * high]
                starts.append((axis, set_limits, max(below, default=float(low))))
    for (
        axis,
        set_limits,
        start,
    ) in starts:  # only now: panels share their scales, and new limits bring new ticks
        set_limits(start, axis.get_view_interval()[1])
        if start > 0:
            axis.set_label_text(f"{axis.get_label_text()}; starts at {start:g}")


def legend_below(axes: Axes, *, columns: int = 2, others: Sequence[Axes] = ()) -> None:
    """The names of the lines of `axes` and `others`: where lines leave room is not known, below there always is."""
    handles: list[Any] = []
    labels: list[str] = []
    for each in (axes, *others):
        found = each.get_legend_handles_labels()
        handles += found[0]
        labels += map(str, found[1])
    axes.figure.legend(
        handles, labels, frameon=False, loc="outside lower center", ncols=min(columns, len(labels)), fontsize=9
    )  # fmt: skip


def style(number: int) -> dict[str, Any]:
    """Colour, marker and dash of the n-th line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def plot_lines(
    stem: Path,
    lines: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marked: Sequence[Point] = (),
) -> None:
    """One line a name; `marked` points get a ring."""
    with figure(stem, title) as axes:
        for number, (name, points) in enumerate(lines.items()):
            axes.plot([x for x, _ in points], [y for _, y in points], label=name, **style(number))
        for x, y in marked:
            axes.plot([x], [y], marker="o", markersize=12, fillstyle="none", color=_GREY, linestyle="none")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, position: f"{value:g}")
        if len(lines) > 1:
            legend_below(axes, columns=3)


def plot_front(
    stem: Path,
    perplexities: Mapping[str, Sequence[Point]],
    speedups: Sequence[Point],
    recommended: int,
    title: str,
) -> None:
    """Perplexity (left, by name of the text) and speedup (right) against depth; the recommended depth is a line."""
    with figure(stem, title) as axes:
        number = 0
        for name, points in perplexities.items():
            axes.plot(
                [x for x, _ in points], [y for _, y in points], label=f"perplexity, {name}", **style(number)
            )
            number += 1
        axes.set_xlabel("depth (units removed)")
        axes.set_ylabel("perplexity (lower is better)")
        axes.set_ylim(bottom=0)
        axes.axvline(
            recommended, color=_GREY, linewidth=1, linestyle=":", label=f"recommended: {recommended}"
        )
        axes.locator_params(axis="x", integer=True)
        right = []
        if speedups:
            right = [axes.twinx()]
            x, y = ([point[place] for point in speedups] for place in range(2))
            right[0].plot(x, y, label="speedup, predicted", **style(number))
            right[0].set_ylabel("speedup (times as fast)")
            right[0].set_ylim(bottom=1)
            right[0].spines["top"].set_visible(False)
        legend_below(axes, others=right)


def plot_quality(stem: Path, perplexities: Sequence[Bar], agreements: Sequence[Bar], title: str) -> None:
    """Perplexity (left) and the share of tokens as the dense model's (right) against depth, with their intervals."""
    with figure(stem, title) as axes:
        axes.set_xlabel("depth (units removed)")
        axes.set_ylabel("perplexity (lower is better)")
        axes.locator_params(axis="x", integer=True)
        draw_bars(axes, perplexities, 0, "perplexity, 95 % interval")
        axes.set_ylim(bottom=0)
        others = []
        if agreements:
            right = axes.twinx()
            others = [right]
            draw_bars(right, agreements, 1, "same next token as the dense model, 95 % interval")
            right.set_ylabel("same next token as the dense model")
            right.set_ylim(0, 1)
            right.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
            right.spines["top"].set_visible(False)
        legend_below(axes, others=others)


def draw_bars(axes: Axes, bars: Sequence[Bar], number: int, label: str) -> None:
    """A line through values with whiskers to the ends of their intervals."""
    x, y, low, high = ([bar[place] for bar in bars] for place in range(4))
    axes.errorbar(x, y, yerr=_whiskers(y, low, high), capsize=3, label=label, **style(number))


def _whiskers(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """How far the ends of intervals are below and above; an end on the wrong side of its value is at it."""
    return [
        [max(0.0, value - end) for value, end in zip(values, low, strict=True)],
        [max(0.0, end - value) for value, end in zip(values, high, strict=True)],
    ]


def plot_groups(
    stem: Path,
    groups: Mapping[str, Sequence[Measure]],
    *,
    title: str,
    x_label: str,
    form: str,
    mark: float,
    mark_label: str,
) -> None:
    """Horizontal bars from zero, below a heading a group; `form` shows a value; a line at `mark` says what it is."""
    num_rows = sum(1 + len(measures) for measures in groups.values())
    with figure(stem, title, (6.4, 1.5 + 0.24 * num_rows)) as axes:
        ticks: dict[float, str] = {}
        row = 0.0
        for name, measures in groups.items():
            axes.text(0, row, f" {name}", fontsize=9, fontweight="bold", va="center")
            places = [row + 1 + index for index in range(len(measures))]
            _draw_group(axes, places, measures, form)
            # The line leaves out the headings, which it would cross.
            ends = [row + 0.5, row + len(measures) + 0.5]
            label = "" if ticks else mark_label
            axes.plot([mark, mark], ends, color=_GREY, linewidth=1, linestyle="--", label=label)
            ticks |= {place: measure[0] for place, measure in zip(places, measures, strict=True)}
            row += 1 + len(measures)
        axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
        axes.set_ylim(row - 0.3, -0.7)
        axes.set_xlim(0, 1.12 * max(mark, *(each[3] for group in groups.values() for each in group)))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(lambda value, position: format(value, form if "%" in form else "g"))
        axes.set_xlabel(x_label)
        legend_below(axes)


def _draw_group(axes: Axes, places: Sequence[float], measures: Sequence[Measure], form: str) -> None:
    values = [value for _, value, _, _ in measures]
    low = [end for _, _, end, _ in measures]
    high = [end for _, _, _, end in measures]
    whiskers = _whiskers(values, low, high)
    axes.barh(places, values, height=0.62, color=COLOURS[0], alpha=0.7)
    if any(map(any, whiskers)):
        axes.errorbar(values, places, xerr=whiskers, fmt="none", ecolor=_GREY, elinewidth=1, capsize=2)
    for place, value, end in zip(places, values, high, strict=True):
        axes.annotate(
            format(value, form), (max(value, end), place), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip

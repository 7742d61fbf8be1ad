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


@contextmanager
def figure(stem: Path, title: str, size: tuple[float, float] = (6.4, 4.4)) -> Iterator[Axes]:
    """Axes to draw on; at the end they are written to `stem` with .png and .svg. Raises ConfigError if not."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # A fixed salt and no date: the same figures are the same bytes.
    with pyplot.rc_context({"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 10}):
        drawn, axes = pyplot.subplots(figsize=size, layout="constrained")
        try:
            axes.set_title(title, fontsize=11)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            yield axes
            for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
                path = stem.with_name(stem.name + suffix)
                try:
                    drawn.savefig(path, dpi=150, metadata=metadata)
                except OSError as error:
                    raise ConfigError(f"plot {path} cannot be written: {error.strerror}") from None
        finally:
            pyplot.close(drawn)


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
            axes.plot(
                [x], [y], marker="o", markersize=12, fillstyle="none", color="#444444", linestyle="none"
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, position: f"{value:g}")
        if len(lines) > 1:
            axes.legend(frameon=False)


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
            recommended, color="#444444", linewidth=1, linestyle=":", label=f"recommended: {recommended}"
        )
        axes.locator_params(axis="x", integer=True)
        handles, labels = axes.get_legend_handles_labels()
        if speedups:
            right = axes.twinx()
            right.plot(
                [x for x, _ in speedups],
                [y for _, y in speedups],
                label="speedup, predicted",
                **style(number),
            )
            right.set_ylabel("speedup (times as fast)")
            right.set_ylim(bottom=1)
            right.spines["top"].set_visible(False)
            handles, labels = (
                one + other
                for one, other in zip((handles, labels), right.get_legend_handles_labels(), strict=True)
            )
        # Where lines leave room is not known: below the axes there is always some.
        axes.figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2, fontsize=9)


def plot_quality(stem: Path, perplexities: Sequence[Bar], agreements: Sequence[Bar], title: str) -> None:
    """Perplexity (left) and the share of tokens as the dense model's (right) against depth, with their intervals."""
    with figure(stem, title) as axes:
        axes.set_xlabel("depth (units removed)")
        axes.set_ylabel("perplexity (lower is better)")
        axes.locator_params(axis="x", integer=True)
        lines = [_bars(axes, perplexities, 0, "perplexity, 95 % interval")]
        axes.set_ylim(bottom=0)
        if agreements:
            right = axes.twinx()
            lines.append(_bars(right, agreements, 1, "same next token as the dense model, 95 % interval"))
            right.set_ylabel("same next token as the dense model")
            right.set_ylim(0, 1)
            right.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
            right.spines["top"].set_visible(False)
        # Where lines leave room is not known: below the axes there is always some.
        axes.figure.legend(
            handles=lines, frameon=False, loc="outside lower center", ncols=len(lines), fontsize=9
        )


def _bars(axes: Axes, bars: Sequence[Bar], number: int, label: str) -> Any:
    """A line through values with whiskers to the ends of their intervals."""
    x, y, low, high = ([bar[place] for bar in bars] for place in range(4))
    below = [value - end for value, end in zip(y, low, strict=True)]
    above = [end - value for value, end in zip(y, high, strict=True)]
    return axes.errorbar(x, y, yerr=[below, above], capsize=3, label=label, **style(number))

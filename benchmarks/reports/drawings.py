"""The plots that only reports have, by `sleb.benchmarks.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sleb.benchmarks.plots import (
    COLOURS,
    Bar,
    Point,
    draw_bars,
    figure,
    label_panels,
    legend_below,
    panels,
    style,
)
from sleb.benchmarks.reports.shown import spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Labelled = tuple[float, float, str]
"""x, y, and what stands beside the point."""

_MOST_STEPS = 500
_TALL = (6.4, 4.8)


def draw_tradeoff(stem: Path, lines: Mapping[str, Sequence[Labelled]], title: str, y_label: str) -> None:
    """Perplexity (y) against speedup (x), a line a test; points of one perplexity share the label of the fastest."""
    with figure(stem, title, _TALL) as axes:
        for number, (name, points) in enumerate(lines.items()):
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], label=name, **style(number))
        fastest: dict[str, Labelled] = {}
        for points in lines.values():
            for point in points:
                fastest[point[2]] = max(fastest.get(point[2], point), point)
        for x, y, label in fastest.values():
            axes.annotate(label, (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
        axes.margins(x=0.1)
        axes.set_xlabel("speedup (higher is better)")
        axes.set_ylabel(f"{y_label} (lower is better)")
        legend_below(axes)


def draw_speedups(
    stem: Path, lines: Mapping[str, Sequence[Bar]], ideals: Mapping[str, Sequence[Point]], title: str
) -> None:
    """Speedup by depth with its intervals beside the ideal, a panel a test."""
    with panels(stem, title, list(lines)) as found:
        for axes, (name, bars) in zip(found, lines.items(), strict=True):
            x, y = ([point[place] for point in ideals.get(name, ())] for place in range(2))
            axes.plot(x, y, color=COLOURS[1], linewidth=1.2, linestyle="--", label="ideal")
            draw_bars(axes, bars, 0, "measured, with its interval")
            axes.locator_params(axis="x", integer=True)
        label_panels(found, "depth (units removed)", "speedup")
        legend_below(found[0])


def draw_scaling(
    stem: Path, lines: Mapping[str, Sequence[Bar]], *, title: str, x_label: str, y_label: str
) -> None:
    """A rate from zero against a number that doubles, a line a name."""
    with figure(stem, title) as axes:
        for number, (name, bars) in enumerate(lines.items()):
            draw_bars(axes, bars, number, name)
        places = sorted({bar[0] for bars in lines.values() for bar in bars})
        if min(places) > 0:
            axes.set_xscale("log", base=2)
        axes.minorticks_off()
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_ylim(bottom=0)
        _thousands(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            legend_below(axes, columns=4)


def _thousands(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(
        lambda value, position: f"{value:,.0f}" if value == round(value) else f"{value:g}"
    )


def draw_distributions(stem: Path, samples: Mapping[str, Sequence[float]], title: str, x_label: str) -> None:
    """What share of the samples (y) is at most so large (x), a step a sample, a line a name."""
    from matplotlib.ticker import LogLocator

    values = [value for each in samples.values() for value in each]
    with figure(stem, title) as axes:
        for number, (name, each) in enumerate(samples.items()):
            line = style(number) | {"marker": "", "drawstyle": "steps-post"}
            # The plot's file holds every point, of which there may be a hundred thousand.
            steps = spaced(list(enumerate(sorted(each), start=1)), _MOST_STEPS)
            x, y = [value for _, value in steps], [rank / len(each) for rank, _ in steps]
            axes.plot([x[0], *x], [0, *y], label=f"{name} ({len(each):,})", **line)
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:,g}")
        else:
            axes.set_xlim(left=0)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:.0%}")
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of samples at or below")
        legend_below(axes, columns=3)

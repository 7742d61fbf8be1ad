"""Plots of measurements, with matplotlib: full words, intervals, colours that colour-blind people tell apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito 2008, "Color Universal Design"; each with a marker and a dash of its own, for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8c8c8c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3)))
_GREY = "#444444"

Point = tuple[float, float]
_Point = tuple[float, float, Sequence[float] | None]
"""x, y, and the ends of the interval around y, if there is one."""


@contextmanager
def panels(
    stem: Path,
    title: str,
    names: Sequence[str],
    size: tuple[float, float],
    *,
    columns: int = 2,
    share_x: bool = False,
    share_y: bool = False,
    suffixes: Sequence[str] = (".png",),
) -> Iterator[list[Axes]]:
    """Axes for each of `names`; at the end they are written to `stem` with each suffix. Raises ConfigError if not.

    size: inches of one panel.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    inches = (max(5.6, size[0] * columns), size[1] * rows + 0.8)  # as wide as a heading
    # A fixed salt and no date: the same figures are the same bytes. Names of models are no formulas.
    with pyplot.rc_context(
        {"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}
    ):
        drawn, grid = pyplot.subplots(
            rows, columns, figsize=inches, layout="constrained", squeeze=False, sharex=share_x, sharey=share_y
        )
        try:
            drawn.suptitle(title, fontsize=11)
            for axes, name in zip(grid.flat, names, strict=False):
                axes.set_title(name, fontsize=9.5)
                axes.grid(alpha=0.25)
                axes.set_axisbelow(True)
                axes.spines[["top", "right"]].set_visible(False)
            for axes in grid.flat[len(names) :]:
                axes.remove()
            yield list(grid.flat[: len(names)])
            for suffix in suffixes:
                path = stem.with_name(stem.name + suffix)
                try:
                    drawn.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
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


def _legend(axes: Axes, others: Sequence[Axes] = (), columns: int = 3) -> None:
    """The names of the lines below all panels: where lines leave room is not known, below there always is."""
    named: dict[str, Any] = {}
    for each in (axes, *others):
        handles, labels = each.get_legend_handles_labels()
        named |= dict(zip(map(str, labels), handles, strict=True))
    axes.figure.legend(
        list(named.values()), list(named), frameon=False, loc="outside lower center",
        ncols=min(columns, len(named)), fontsize=9,
    )  # fmt: skip


def _whiskers(axes: Axes, found: Sequence[_Point], name: str, number: int) -> None:
    """A line through (x, y, ends of the interval or None)."""
    x, y = [each[0] for each in found], [each[1] for each in found]
    below = [max(0.0, value - (ends[0] if ends else value)) for _, value, ends in found]
    above = [max(0.0, (ends[1] if ends else value) - value) for _, value, ends in found]
    axes.errorbar(x, y, yerr=[below, above], capsize=2.5, elinewidth=1, label=name, **style(number))


# Of results.


def draw_result(result: Result, stem: Path) -> list[Path]:
    """The plots that a result gives, as PNG, names beginning as `stem`; none of a result that has no curve to show.

    Speed by depth, quality by depth, load by level, ratios to other engines. Raises ConfigError.
    """
    drawn = []
    for name, draw in (
        ("speed", draw_speed),
        ("quality", draw_quality),
        ("load", _load),
        ("ratios", _ratios),
    ):
        path = stem.with_name(f"{stem.name}-{name}")
        if draw(result, path):
            drawn.append(path.with_name(f"{path.name}.png"))
    return drawn


def _by_case(found: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    cases: dict[str, list[Measurement]] = {}
    for each in found:
        cases.setdefault(each.case, []).append(each)
    return cases


def depth_of(subject: str) -> int | None:
    """The depth in "depth 6"; None for another subject."""
    found = re.fullmatch(r"depth (\d+)", subject)
    return None if found is None else int(found[1])


def _heading(result: Result) -> str:
    environment, model = result.environment, result.settings.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    where = environment.get("gpu") or environment.get("cpu")
    return ", ".join(str(part) for part in (name, environment.get("dtype"), where) if part)


def draw_speed(result: Result, stem: Path) -> bool:
    """Speedup by depth with intervals, a panel a case; the modelled ideal as a line."""
    found = [m for m in result.measurements if m.metric == "tokens/s" and m.value is not None]
    cases = _by_case([m for m in found if depth_of(m.subject) is not None])
    cases = {case: found for case, found in cases.items() if any(m.ratio is not None for m in found)}
    if not cases:
        return False
    title = f"Speed by depth: {_heading(result)}"
    with panels(stem, title, list(cases), (3.6, 2.4), share_x=True, share_y=True) as grid:
        for axes, found in zip(grid, cases.values(), strict=True):
            points: list[_Point] = []
            ideal: list[Point] = []
            for each in found:
                depth, ratio = depth_of(each.subject) or 0, each.ratio
                if ratio is None:
                    points.append((depth, 1.0, None))
                else:
                    ends = None if ratio.low is None or ratio.high is None else (ratio.low, ratio.high)
                    points.append((depth, ratio.estimate, ends))
                if each.facts.get("ideal_speedup") is not None:
                    ideal.append((depth, each.facts["ideal_speedup"]))
            if ideal:
                axes.plot(
                    *zip(*ideal, strict=True),
                    color=_GREY,
                    linewidth=1.2,
                    linestyle="--",
                    label="ideal (modelled)",
                )
            _whiskers(axes, points, "measured, 95 % interval", 0)
            axes.locator_params(axis="x", integer=True)
        _label(grid, 2, "depth (units removed)", "times as fast as depth 0")
        _legend(grid[0])
    return True


def _label(grid: Sequence[Axes], columns: int, x: str, y: str) -> None:
    """Labels below the lowest panels and beside those on the left."""
    for place, axes in enumerate(grid):
        if place % columns == 0:
            axes.set_ylabel(y)
        if place + columns >= len(grid):
            axes.set_xlabel(x)
            axes.tick_params(axis="x", labelbottom=True)


_QUALITY = {
    "perplexity": "perplexity (lower is better)",
    "same token": "share of next tokens as at depth 0",
    "KL": "KL from depth 0, nats (lower is better)",
}


def draw_quality(result: Result, stem: Path, suffixes: Sequence[str] = (".png",)) -> bool:
    """Perplexity, agreement and divergence by depth with intervals, a line a text; False where there are none."""
    depths = [m for m in result.measurements if m.value is not None and depth_of(m.subject) is not None]
    found = {metric: [m for m in depths if m.metric == metric] for metric in _QUALITY}
    found = {metric: each for metric, each in found.items() if each}
    if len({m.subject for m in found.get("perplexity", ())}) < 2:
        return False
    with panels(
        stem, f"Quality by depth: {_heading(result)}", list(found), (3.3, 2.9), columns=3, suffixes=suffixes
    ) as grid:
        for axes, (metric, each) in zip(grid, found.items(), strict=True):
            for number, (case, those) in enumerate(_by_case(each).items()):
                points = [(depth_of(m.subject) or 0, m.value or 0.0, m.spread) for m in those]
                _whiskers(axes, points, f"{case}, 95 % interval", number)
            axes.set_ylabel(_QUALITY[metric])
            axes.set_ylim(0, 1 if metric == "same token" else None)
            axes.locator_params(axis="x", integer=True)
            axes.set_xlabel("depth (units removed)")
        _legend(grid[0], grid[1:])
    return True


_LOAD = {
    "tokens/s": ("tokens/s",),
    "TTFT, ms": ("TTFT p50 ms", "TTFT p99 ms"),
    "TPOT, ms": ("TPOT p50 ms", "TPOT p99 ms"),
}


def _load(result: Result, stem: Path) -> bool:
    """Throughput, time to first token and time per token by level of load, a line a server."""
    measured = [m for m in result.measurements if m.value is not None]
    levels = list(_by_case(measured))
    names = {
        name: [m for m in metrics if any(each.metric == m for each in measured)]
        for name, metrics in _LOAD.items()
    }
    if len(levels) < 2 or not names["TTFT, ms"]:
        return False
    subjects = list(dict.fromkeys(m.subject for m in measured))
    values = {m.key: m.value for m in measured}
    with panels(stem, f"By level of load: {_heading(result)}", list(names), (3.3, 2.9), columns=3) as grid:
        for axes, metrics in zip(grid, names.values(), strict=True):
            for number, subject in enumerate(subjects):
                for metric in metrics:
                    upper = "p99" in metric
                    drawn = style(number) | {
                        "linestyle": "--" if upper else "-",
                        "alpha": 0.55 if upper else 1,
                    }
                    points = [
                        (place, values.get((level, subject, metric))) for place, level in enumerate(levels)
                    ]
                    part = ", 99th percentile" if upper else ", median"
                    axes.plot(*zip(*points, strict=True), label=subject + part, **drawn)
            axes.set_xticks(range(len(levels)), [level.partition(",")[0] for level in levels])
            axes.margins(x=0.08)
            axes.set_ylim(bottom=0)
        _legend(grid[1], columns=2)
    return True


def _ratios(result: Result, stem: Path) -> bool:
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
    with panels(stem, title, list(tests), size, columns=len(tests), share_y=True) as grid:
        for axes, bars in zip(grid, tests.values(), strict=True):
            for name, ratio in bars:
                place, end = names.index(name), ratio.estimate
                colour = COLOURS[0 if ratio.estimate >= 1 else 1]
                axes.barh(place, ratio.estimate, height=0.65, color=colour, alpha=0.75)
                if ratio.low is not None and ratio.high is not None:
                    axes.plot([ratio.low, ratio.high], [place, place], color=_GREY, linewidth=1.2)
                    end = max(end, ratio.high)
                label = f"{ratio.estimate:.2f}"
                axes.annotate(
                    label, (end, place), (3, 0), textcoords="offset points", va="center", fontsize=7.5
                )
            axes.axvline(1, color=_GREY, linewidth=1, linestyle="--")
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            axes.set_xlim(0, 1.22 * axes.get_xlim()[1])
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        grid[0].set_yticks(range(len(names)), names, fontsize=8)
        grid[0].set_ylim(len(names) - 0.4, -0.6)
    return True


# Of others.


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
    """One line a name, as PNG and SVG; `marked` points get a ring. Raises ConfigError."""
    with panels(stem, title, [""], (6.4, 3.6), suffixes=(".png", ".svg")) as [axes]:
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
            _legend(axes)


def plot_front(
    stem: Path,
    perplexities: Mapping[str, Sequence[Point]],
    speedups: Sequence[Point],
    recommended: int,
    title: str,
) -> None:
    """Perplexity (left, by name of the text) and speedup (right) against depth; the recommended depth is a line.

    As PNG and SVG. Raises ConfigError.
    """
    with panels(stem, title, [""], (6.4, 3.6), suffixes=(".png", ".svg")) as [axes]:
        number = 0
        for name, points in perplexities.items():
            axes.plot(*zip(*points, strict=True), label=f"perplexity, {name}", **style(number))
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
            right[0].plot(*zip(*speedups, strict=True), label="speedup, predicted", **style(number))
            right[0].set_ylabel("speedup (times as fast)")
            right[0].set_ylim(bottom=1)
            right[0].spines["top"].set_visible(False)
        _legend(axes, right, columns=2)

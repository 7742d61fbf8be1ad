"""Plots of measurements, with matplotlib: full words, intervals, colours that colour-blind people tell apart."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sleb.benchmarks.record import Measurement, Ratio, Result
from sleb.errors import ConfigError

# Okabe & Ito 2008, "Color Universal Design"; each with a marker of its own, for prints without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8c8c8c")
MARKERS = "os^DvPX*"

Point = tuple[float, float | None, tuple[float, float] | None]
"""x, y, and the ends of the interval around y, if there is one."""


@dataclass(frozen=True)
class Panel:
    """Lines, by name, over one x. ticks: names of x = 0, 1, …; empty: numbers. bottom: of y; None: as they need."""

    title: str
    y_label: str
    lines: Mapping[str, Sequence[Point]]
    x_label: str = "depth (units removed)"
    ticks: Sequence[str] = ()
    bottom: float | None = None


def check_plots(option: str, *, refuse: bool = True) -> str | None:
    """What to tell, before hours are spent, where matplotlib is missing; None where it is there. Raises ConfigError."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    missing = f"{option} draws with matplotlib, which is not installed: pip install 'sleb[plots]'"
    if refuse:
        raise ConfigError(missing)
    return f"There will be no plot: {missing}"


def draw_lines(stem: Path, title: str, panels: Sequence[Panel], suffixes: Sequence[str] = (".png",)) -> None:
    """Panels of lines with intervals, written to `stem` with each suffix. Raises ConfigError."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = min(2 if len(panels) == 4 else 3, len(panels))
    rows = -(-len(panels) // columns)
    inches = (max(5.6, 3.3 * columns), 2.7 * rows + 0.8)  # as wide as a heading
    # A fixed salt and no date: the same figures are the same bytes. Names of models are no formulas.
    look: Any = {"svg.hashsalt": "sleb", "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9.5, "grid.alpha": 0.25}
    with pyplot.rc_context(look | {"axes.grid": True, "axes.axisbelow": True}):
        drawn, grid = pyplot.subplots(rows, columns, figsize=inches, layout="constrained", squeeze=False)
        drawn.suptitle(title, fontsize=11)
        named: dict[str, Any] = {}
        for axes, panel in zip(grid.flat, panels, strict=False):
            for name, points in panel.lines.items():
                number = list(named).index(name) if name in named else len(named)
                known = [(x, y, ends or (y, y)) for x, y, ends in points if y is not None]
                named[name] = axes.errorbar(
                    [x for x, *_ in known],
                    [y for _, y, _ in known],
                    yerr=[
                        [max(0.0, y - low) for _, y, (low, _) in known],
                        [max(0.0, high - y) for _, y, (_, high) in known],
                    ],
                    color=COLOURS[number % len(COLOURS)],
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4.5,
                    zorder=3 - number / 100,  # the first on top
                )
            if panel.ticks:
                axes.set_xticks(range(len(panel.ticks)), panel.ticks)
                axes.margins(x=0.08)
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.set_ylim(bottom=panel.bottom)
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        # Below all panels: where lines leave room is not known.
        below: Any = {"loc": "outside lower center", "frameon": False, "ncols": min(2, len(named))}
        drawn.legend(list(named.values()), list(named), **below)
        try:
            for suffix in suffixes:
                path = stem.with_name(stem.name + suffix)
                drawn.savefig(path, dpi=150, metadata={"Date": None} if suffix == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"plot {stem} cannot be written: {error.strerror}") from None
        finally:
            pyplot.close(drawn)


def draw_result(result: Result, stem: Path) -> list[Path]:
    """The plots that a result gives, as PNG, names beginning as `stem`; none of a result that has no curve to show.

    Speed by depth, quality by depth, load by level. Raises ConfigError.
    """
    kinds = {"speed": draw_speed, "quality": draw_quality, "load": _draw_load}
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
            ideal = [(depth, each.facts.get("ideal_speedup"), None) for depth, each in found]
            lines: dict[str, list[Point]] = {
                "measured, 95 % interval": [
                    (depth, each.estimate, (each.low, each.high) if each.low and each.high else None)
                    for depth, each in ratios
                ],
                "ideal (modelled)": [point for point in ideal if point[1] is not None],
            }
            lines = {name: points for name, points in lines.items() if points}
            panels.append(Panel(case, "times as fast as depth 0", lines))
    if panels:
        draw_lines(stem, f"Speed by depth: {_heading(result)}", panels)
    return bool(panels)


_QUALITY = {
    "perplexity": "perplexity (lower is better)",
    "same token": "share of next tokens as at depth 0",
    "KL": "KL from depth 0, nats (lower is better)",
}


def draw_quality(result: Result, stem: Path, suffixes: Sequence[str] = (".png",)) -> bool:
    """Perplexity, agreement and divergence by depth with intervals, a line a text; False where there are none."""
    found = {metric: _depths(result, metric) for metric in _QUALITY}
    if all(len(each) < 2 for each in found["perplexity"].values()):
        return False
    panels = []
    for metric, cases in found.items():
        lines = {case: [(depth, m.value, m.spread) for depth, m in each] for case, each in cases.items()}
        if lines:
            panels.append(Panel(metric, _QUALITY[metric], lines, bottom=0))
    draw_lines(stem, f"Quality by depth, intervals of 95 %: {_heading(result)}", panels, suffixes)
    return True


def _draw_load(result: Result, stem: Path) -> bool:
    """Throughput, and median times to first token and per token, a line a server, by level of load."""
    values = {each.key: each.value for each in result.measurements if each.value is not None}
    levels, subjects, metrics = (list(dict.fromkeys(key[place] for key in values)) for place in range(3))
    if len(levels) < 2 or "TTFT p50 ms" not in metrics:
        return False
    panels = []
    for metric in ("tokens/s", "TTFT p50 ms", "TPOT p50 ms"):
        lines: dict[str, list[Point]] = {}
        for subject in subjects:
            for place, level in enumerate(levels):
                value, most = (
                    values.get((level, subject, name)) for name in (metric, metric.replace("p50", "p99"))
                )
                ends = None if value is None or most is None else (value, most)
                lines.setdefault(subject, []).append((place, value, ends))
        ticks = [level.partition(",")[0] for level in levels]
        panels.append(Panel(metric.replace("p50 ms", "p50, up to p99, ms"), "", lines, "", ticks, bottom=0))
    draw_lines(stem, f"By level of load: {_heading(result)}", panels)
    return True


def draw_front(
    stem: Path, title: str, perplexities: Mapping[str, Sequence[Point]], speedups: Sequence[Point]
) -> None:
    """Perplexity, by name of the text, and the predicted speedup by depth, as PNG and SVG. Raises ConfigError."""
    panels = [Panel("perplexity", "perplexity (lower is better)", perplexities, bottom=0)]
    if speedups:
        lines = {"speedup, predicted": speedups}
        panels.append(Panel("speedup", "times as fast as depth 0", lines, bottom=1))
    draw_lines(stem, title, panels, (".png", ".svg"))

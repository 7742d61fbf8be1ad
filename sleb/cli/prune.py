"""`sleb prune`: find the blocks that a model can do without."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sleb.cli.options import AnyModel, with_options
from sleb.cli.progress import Bar
from sleb.options import option, option_of
from sleb.pruning.options import PruneOptions
from sleb.terminal import Console

if TYPE_CHECKING:
    from sleb.layer_map.layer_map import LayerMap
    from sleb.pruning.run import PruneReport
    from sleb.pruning.search import Margin, SearchProgress

_MIN_WIDTH = 120  # where standard output is no terminal, a line may be as long as it needs to be


@dataclass(frozen=True)
class PruneCommand(PruneOptions):
    """As in Python, but speedups are predicted and drawn unless one says otherwise."""

    speedup: bool = option_of(PruneOptions, "speedup", True)
    plot: bool | None = option(
        None, "Draw the front beside the map, as PNG and SVG.", unset="where matplotlib is installed"
    )


@with_options
def prune(
    model: AnyModel,
    options: PruneCommand,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the layer map goes (JSON).", metavar="FILE")
    ],
) -> None:
    """Find the blocks, or parts of blocks, that a model can do without, and write them to a layer map.

    Ctrl-C keeps what is decided; the same command with --resume goes on from there.
    """
    from sleb.benchmarks.plots import check_plots
    from sleb.models.resolve import check_model

    if options.runtime == "engine":
        check_model(model)
    from sleb.pruning.run import run_pruning

    console = Console(stderr=True)
    missing = check_plots("--plot", refuse=options.plot is True) if options.plot is not False else None
    if missing is not None:
        console.print(missing, markup=False, highlight=False, soft_wrap=True)
    decided: LayerMap | None = None

    def keep(layer_map: LayerMap) -> None:
        nonlocal decided
        decided = layer_map
        if not console.is_terminal:  # where no bar moves
            line = f"round {layer_map.max_depth}: {layer_map.removed[-1]} goes; saved in {output}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    if options.runtime == "transformers":
        from sleb.formats.shortened import doubt

        options.check()
        if (remark := doubt(model)) is not None:
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
    try:
        with _SearchBar(console) as bar:
            report = run_pruning(
                model,
                options,
                progress=bar.show_search,
                on_round=keep,
                on_fit=lambda share: bar.show("measuring this machine", share, 1),
                on_generate=lambda share: bar.show("the model writes its text", share, 1),
                note=lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True),
            )
    except KeyboardInterrupt:
        console.print(interrupted_message(decided, output), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    print_report(report, output, Console())
    if options.plot is not False and missing is None and report.layer_map.max_depth:
        draw_front(report, output, console)


def interrupted_message(decided: LayerMap | None, output: Path) -> str:
    """What Ctrl-C left behind, and how to go on."""
    if decided is None:
        return f"Interrupted before the first new removal was decided; {output} is as it was."
    order = ", ".join(map(str, decided.removed))
    return (
        f"Interrupted with {decided.max_depth} of the removals decided ({order}) and saved in {output}. "
        "Run the same command with --resume to go on."
    )


def print_report(report: PruneReport, output: Path, console: Console) -> None:
    """The table of rounds, what the search cost beside the authors' implementation, and where the map is."""
    layer_map, num_tokens = report.layer_map, report.num_windows * report.seqlen
    losses = layer_map.losses or ()
    objective = None if layer_map.search is None else layer_map.search.objective
    removed = f"{layer_map.max_depth} of {layer_map.num_blocks} blocks"
    if any(unit.part != "block" for unit in layer_map.removed):
        removed = f"{layer_map.max_depth} units of {layer_map.num_blocks} blocks"
    table = Table(title=Text(f"{layer_map.model}: {removed} removed"))
    margins = dict(zip(range(layer_map.max_depth, 0, -1), reversed(report.result.margins), strict=False))
    with_speed = report.cost_model is not None
    headings = ["depth", "removed", "nats a token", "calibration perplexity", "change", "next best"]
    for text in layer_map.held_out:
        headings += [f"{text.record.source} perplexity", "change"]
    headings += ["speedup"] * with_speed
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    for heading in headings:  # where there is little room, the next best is what wraps: figures stay whole
        table.add_column(
            Text(heading), justify="right", overflow="fold", min_width=None if heading == "next best" else 7
        )
    for number, loss in enumerate(losses):
        unit = str(layer_map.removed[number - 1]) if number else "none"
        change = perplexity(loss - losses[0], num_tokens) - 1
        table.add_row(
            str(number),
            unit,
            f"{loss / num_tokens:.4f}",
            f"{perplexity(loss, num_tokens):.3f}",
            f"{change:+.1%}" if number else "",
            margin_text(margins[number], num_tokens, objective) if number in margins else "",
            *held_out_cells(report, number),
            *([f"{report.front[number].speedup:.3f}"] if with_speed else ()),
            style="bold" if number == layer_map.depth else None,
        )
    console.print(table)
    if report.result.cost.num_passes:
        console.print(cost_text(report), markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"Written to {output}; it recommends depth {layer_map.depth}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def held_out_cells(report: PruneReport, depth: int) -> list[str]:
    """Of each held-out text its perplexity, and the change against the dense model's."""
    cells: list[str] = []
    for now, before in zip(report.front[depth].held_out, report.front[0].held_out, strict=True):
        change = f"{now / before - 1:+.1%}" if now and before and depth else ""
        cells += ["" if now is None else f"{now:.3f}", change]
    return cells


def draw_front(report: PruneReport, output: Path, console: Console) -> None:
    """The front as PNG and SVG beside the map; says where, in words."""
    from sleb.benchmarks import plots

    layer_map, points = report.layer_map, report.front
    texts: dict[str, list[plots.Point]] = {}
    told = [(f"{text.record.source} (held out)", text) for text in layer_map.held_out]
    told.append((f"{layer_map.calibration_losses.record.source} (calibration)", layer_map.calibration_losses))
    for name, text in told:
        values: list[plots.Point] = [(point.depth, text.perplexity(point.depth), None) for point in points]
        if all(value is not None and math.isfinite(value) for _, value, _ in values):
            texts[f"perplexity, {name}"] = values
    speedups: list[plots.Point] = [
        (point.depth, point.speedup, None) for point in points if point.speedup is not None
    ]
    stem = output.with_suffix("")
    title = f"{layer_map.model}: quality and speed by depth, {layer_map.depth} recommended"
    plots.draw_front(stem, title, texts, speedups)
    console.print(f"Plotted to {stem}.png and {stem}.svg.", markup=False, highlight=False, soft_wrap=True)


def margin_text(margin: Margin, num_tokens: int, objective: str | None = None) -> str:
    """How much worse the next best candidate was: "7 +1.2% (3.4 s.e.)", or "7 +0.012 nats" of divergence a token; z is
    of paired differences between texts."""
    if margin.runner_up is None:
        return "none"
    sign = "≥" if margin.at_least else ""
    clear = "" if margin.z is None else f" ({margin.z:.1f} s.e.)"
    if objective == "kl":
        return f"{margin.runner_up} {sign}{margin.difference / num_tokens:+.4f} nats{clear}"
    return f"{margin.runner_up} {sign}{perplexity(margin.difference, num_tokens) - 1:+.2%}{clear}"


def cost_text(report: PruneReport) -> str:
    """What the search took, beside the authors' implementation for the same rounds."""
    cost, num_tokens = report.result.cost, report.num_windows * report.seqlen
    return (
        f"{cost.num_passes:g} block passes and {cost.num_evaluations:g} heads a window, over {report.num_windows} "
        f"windows of {report.seqlen} tokens, in {report.seconds:.1f} s "
        f"({cost.num_evaluations * num_tokens / max(report.seconds, 1e-9):.0f} tokens/s). The authors' implementation "
        f"takes {cost.reference_passes:g} block passes and {cost.reference_evaluations:g} heads for these rounds "
        f"({cost.reference_passes / cost.num_passes:.2f} times as many passes)."
    )


def perplexity(loss: float, num_tokens: int) -> float:
    """exp of the loss a token, infinite where that is too large for a float."""
    try:
        return math.exp(loss / num_tokens)
    except OverflowError:
        return math.inf


class _SearchBar(Bar):
    """The share that is done, the round, the best candidate so far."""

    def __init__(self, console: Console) -> None:
        columns = (
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, transient=False)

    def show_search(self, at: SearchProgress) -> None:
        best = "none yet" if at.best is None else f"{at.best} ({at.best_loss:.4f} nats a token)"
        self.show(f"round {at.round}/{at.num_rounds}, best {best}", at.share, 1)

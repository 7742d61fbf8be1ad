"""`sleb prune`: find the blocks that a model can do without."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sleb.layer_map.layer_map import LayerMap
from sleb.pruning.options import PruneOptions, set_threads
from sleb.pruning.run import PruneReport, run_pruning
from sleb.pruning.search import Margin, SearchProgress

_MIN_WIDTH = 120  # where standard output is no terminal, a line may be as long as it needs to be


def prune(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the layer map goes (JSON).")],
    remove: Annotated[
        str | None,
        typer.Option(
            help="How many units: 6, or a share like 20%.",
            show_default="20%; with a target, as many as it needs",
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(help="Recommend the shallowest depth that is so many times as fast, as 1.25."),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None, typer.Option(help="Recommend no depth that raises the perplexity by more, as 5%.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(help="A second text: its loss is told too, since the calibration text flatters."),
    ] = None,
    units: Annotated[
        str, typer.Option(help="blocks; sublayers (attention and MLP apart); attention (alone).")
    ] = "blocks",
    mode: Annotated[
        str, typer.Option(help="exact: the paper's algorithm; fast: fewer candidates.")
    ] = "exact",
    screen: Annotated[str, typer.Option(help="How fast finds them: race or gradient.")] = "race",
    calibration: Annotated[
        str,
        typer.Option(
            help="wikitext2, c4, a text file, a column of texts or conversations (data.jsonl:text, "
            "data.parquet:messages), self (the model writes it), or a mix with weights (wiki.txt=0.7,self=0.3)."
        ),
    ] = "wikitext2",
    sampler: Annotated[
        str, typer.Option(help="packed: the text cut into windows; rows: the paper's.")
    ] = "packed",
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens a window.", show_default="2048, or the model's context")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Number of windows.", show_default="up to 128")] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Shuffle the windows, or the rows.", show_default="not shuffled; rows, self: 0"),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help="Weigh the added loss by what a removal saves: params, latency or kv.",
            show_default="not weighed",
        ),
    ] = None,
    speedup: Annotated[
        bool, typer.Option(help="Measure this machine and predict the speedup of every depth.")
    ] = True,
    speedup_batch: Annotated[int, typer.Option(help="Requests at once, for the predicted speedup.")] = 1,
    plot: Annotated[bool, typer.Option(help="Draw the front beside the map, as PNG and SVG.")] = True,
    depth: Annotated[
        int | None, typer.Option(help="Depth that the map recommends.", show_default="all removed")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the map in --output.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the map in --output.")] = False,
) -> None:
    """Find the blocks, or parts of blocks, that a model can do without, and write them to a layer map.

    Ctrl-C keeps what is decided; the same command with --resume goes on from there.
    """
    options = PruneOptions(
        remove=remove,
        calibration=calibration,
        output=output,
        depth=depth,
        sampler=sampler,
        seqlen=seqlen,
        windows=windows,
        seed=seed,
        dtype=dtype,
        device=device,
        target_speedup=target_speedup,
        max_perplexity_increase=max_perplexity_increase,
        held_out=held_out,
        cost=cost,
        speedup=speedup,
        speedup_batch=speedup_batch,
        units=units,
        mode=mode,
        screen=screen,
        resume=resume,
        force=force,
    )
    set_threads(threads)
    console = Console(stderr=True)
    decided: LayerMap | None = None

    def keep(layer_map: LayerMap) -> None:
        nonlocal decided
        decided = layer_map

    try:
        with _ProgressBar(console) as bar:
            report = run_pruning(
                model,
                options,
                progress=bar.update,
                on_round=keep,
                on_fit=bar.show_fit,
                on_generate=bar.show_generated,
                note=lambda message: console.print(message, markup=False, highlight=False, soft_wrap=True),
            )
    except KeyboardInterrupt:
        console.print(interrupted_message(decided, output), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    print_report(report, output, Console())
    if plot and report.layer_map.max_depth:
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
    kind = "units" if any(unit.part != "block" for unit in layer_map.removed) else "blocks"
    table = Table(
        title=Text(
            f"{layer_map.model}: {layer_map.max_depth} {kind} of {layer_map.num_blocks} blocks removed"
        )
    )
    margins = dict(zip(range(layer_map.max_depth, 0, -1), reversed(report.result.margins), strict=False))
    with_speed, with_held_out = report.cost_model is not None, layer_map.held_out is not None
    headings = ["depth", "removed", "loss", "perplexity", "change", "next best"]
    headings += ["held-out perplexity", "change"] * with_held_out + ["speedup"] * with_speed
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    for heading in headings:  # where there is little room, the next best is what wraps: figures stay whole
        table.add_column(heading, justify="right", min_width=None if heading == "next best" else 7)
    for number, loss in enumerate(losses):
        unit = str(layer_map.removed[number - 1]) if number else "none"
        change = perplexity(loss - losses[0], num_tokens) - 1
        table.add_row(
            str(number),
            unit,
            f"{loss:.2f}",
            f"{perplexity(loss, num_tokens):.3f}",
            f"{change:+.1%}" if number else "",
            margin_text(margins[number], num_tokens) if number in margins else "",
            *(held_out_cells(report, number) if with_held_out else ()),
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
    """Perplexity of the held-out text, and its change against the dense model's."""
    now, before = (report.front[each].held_out_perplexity for each in (depth, 0))
    if now is None or before is None:
        return ["", ""]
    return [f"{now:.3f}", f"{now / before - 1:+.1%}" if depth else ""]


def draw_front(report: PruneReport, output: Path, console: Console) -> None:
    """The front as PNG and SVG beside the map; says where, in words."""
    from sleb.benchmarks.plots import plot_front

    layer_map, points = report.layer_map, report.front
    texts: dict[str, list[tuple[float, float]]] = {}
    for record, name in ((layer_map.held_out, "held_out_perplexity"), (layer_map.calibration, "perplexity")):
        values = [(float(point.depth), getattr(point, name)) for point in points]
        if record is not None and all(value is not None and math.isfinite(value) for _, value in values):
            kind = "held out" if name == "held_out_perplexity" else "calibration"
            texts[f"{record.source} ({kind})"] = values
    speedups = [(float(point.depth), point.speedup) for point in points if point.speedup is not None]
    stem = output.with_suffix("")
    plot_front(stem, texts, speedups, layer_map.depth, f"{layer_map.model}: quality and speed by depth")
    console.print(f"Plotted to {stem}.png and {stem}.svg.", markup=False, highlight=False, soft_wrap=True)


def margin_text(margin: Margin, num_tokens: int) -> str:
    """How much worse the next best candidate was: "7 +1.2% (3.4 s.e.)"; z is of paired differences between texts."""
    if margin.runner_up is None:
        return "none"
    sign = "≥" if margin.at_least else ""
    clear = "" if margin.z is None else f" ({margin.z:.1f} s.e.)"
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


class _ProgressBar:
    """The share that is done, the round, the best candidate so far; appears with the first report."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=1)

    def __enter__(self) -> _ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show_fit(self, share: float) -> None:
        """Shows how much of the machine's measurement is done."""
        self._show(share, "measuring this machine")

    def show_generated(self, share: float) -> None:
        """Shows how much of a text the model has written."""
        self._show(share, "the model writes its text")

    def update(self, at: SearchProgress) -> None:
        best = "none yet" if at.best is None else f"{at.best} (loss {at.best_loss:.4f} a token)"
        self._show(at.share, f"round {at.round}/{at.num_rounds}, best {best}")

    def _show(self, share: float, description: str) -> None:
        self._progress.start()  # does nothing once it is started
        self._progress.update(self._task, completed=share, description=description)

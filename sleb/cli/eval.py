"""`sleb eval`: what every depth costs in quality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from sleb.cli.bench.shared import parse_integers, parse_names
from sleb.errors import ConfigError, SlebError


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    layer_map: Annotated[
        str | None,
        typer.Option(help="Layer map (JSON), or none.", show_default="none; for smollm2 the shipped one"),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Depths to compare, as 0,2,4,6; 0 is always there.", show_default="what the map recommends"
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text for perplexity: a file, wikitext2 or c4; repeatable.", show_default="no perplexity"
        ),
    ] = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens of a window.", show_default="2048, or the model's context")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows of each text.", show_default="all")] = None,
    windows_like: Annotated[
        str, typer.Option(help="sleb: as in the paper; lm-eval: rolling, after a prefix token.")
    ] = "sleb",
    generate: Annotated[
        bool, typer.Option("--generate/--no-generate", help="Compare greedy answers to some prompts.")
    ] = True,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt a line.", show_default="16 built in")
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="New tokens of an answer at most.")] = 128,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, as arc_easy,piqa; needs lm_eval\\[api].", show_default="none"),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.", show_default="all")] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with more lm-eval tasks.", show_default="none")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(help="lm_eval of another environment.", show_default="beside this Python, or on PATH"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="auto (as --dtype), int8 or int4 (quantised when loaded), or a dtype.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="one a physical core")
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything here; `sleb serve --bench-result` reads it."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw quality by depth to this name with .png and .svg.", show_default="no plot"),
    ] = None,
) -> None:
    """Measure what each depth costs in quality: perplexity, agreement with the dense model, answers, lm-eval tasks.

    Ctrl-C reports what is complete.
    """
    from sleb.benchmarks.quality.evaluate import run_quality
    from sleb.benchmarks.quality.options import QualityOptions
    from sleb.benchmarks.quality.report import draw_quality, print_quality
    from sleb.files import check_writable, write_text

    options = QualityOptions(
        model=model,
        layer_map=layer_map,
        depths=None if depths is None else parse_integers("--depths", depths),
        texts=text or (),
        windows_like=windows_like,
        seqlen=seqlen,
        windows=windows,
        generate=generate,
        prompts=prompts,
        output_tokens=output_tokens,
        tasks=parse_names(tasks or ""),
        limit=limit,
        include_path=include_path,
        lm_eval=lm_eval,
        dtype=dtype,
        weights=weights,
        device=device,
        threads=threads,
    )
    if tasks is not None and not options.tasks:
        raise ConfigError(f"--tasks '{tasks}' names no task; write it like arc_easy,piqa")
    if plot is not None and not text:
        raise ConfigError("--plot draws perplexity by depth; name a --text")
    for path in (json_path, plot and plot.with_name(f"{plot.name}.png")):
        if path is not None:
            check_writable(path)
    with _EvalBar() as bar:
        report = run_quality(options, ["sleb", *sys.argv[1:]], bar.show)
    if report.is_empty:  # an early Ctrl-C must not replace an older result by nothing
        typer.echo("Interrupted before anything was complete; nothing is written.", err=True)
        raise typer.Exit(130)
    print_quality(report, Console())
    if json_path is not None:
        write_text(json_path, report.to_json())
    if plot is not None and report.rows[0].perplexity is not None:
        draw_quality(report, plot)
    if report.problem is not None:
        raise SlebError(report.problem)
    if not report.complete:
        raise typer.Exit(130)


class _EvalBar:
    """What is being done, on standard error; appears with the first report."""

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("")

    def __enter__(self) -> _EvalBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """As `sleb.benchmarks.quality.evaluate.OnProgress`."""
        self._bar.start()  # does nothing once it is started
        self._bar.update(self._task, description=what, completed=done, total=total or None)

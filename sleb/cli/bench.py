"""`sleb bench`: what pruning gives on this machine, and how near the kernels come to its limits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from sleb.errors import ConfigError

if TYPE_CHECKING:
    from sleb.benchmarks.harness import Progress

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _bench() -> None:
    """Measure speed: dense against pruned, and operator by operator."""


@app.command()
def throughput(
    model: Annotated[
        str | None, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            help="Instead of MODEL: a shape that comes with sleb, as llama-2-7b, with random weights.",
            show_default=False,
        ),
    ] = None,
    layer_map: Annotated[
        str | None,
        typer.Option(
            help="Layer map (JSON), or none.",
            show_default="the one shipped with the model; of a --config without one, a stand-in",
        ),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(help="Depths to compare, as 0,6.", show_default="0 and the map's recommended one"),
    ] = None,
    tests: Annotated[
        str,
        typer.Option(help="Of prompt, generate and decode (generate without the prompts)."),
    ] = "prompt,generate",
    batches: Annotated[str, typer.Option(help="Requests at once in generate and decode.")] = "64,1",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt.", show_default="prompt: 2048, or what the model holds; others: 64"
        ),
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="New tokens of a request.")] = 128,
    repetitions: Annotated[int, typer.Option(help="Times that each depth is measured.")] = 5,
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")
    ] = "auto",
    weights: Annotated[
        str, typer.Option(help="auto (as --dtype), int8 or int4 (quantised when loaded), or a dtype.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    load_format: Annotated[
        str, typer.Option(help="auto, safetensors, or dummy: random weights, only a config is needed.")
    ] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="one a physical core")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order of the runs.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write environment, samples and results here.")
    ] = None,
) -> None:
    """Measure prompt processing and token generation, several depths in turns.

    Ctrl-C reports the repetitions that are complete.
    """
    from sleb.benchmarks.report import check_writable, print_report, write_text
    from sleb.benchmarks.throughput import run_throughput
    from sleb.benchmarks.workloads import ThroughputOptions

    options = ThroughputOptions(
        model=model or "",
        config=config,
        layer_map=layer_map,
        depths=None if depths is None else parse_integers("--depths", depths),
        tests=parse_names(tests),
        batches=parse_integers("--batches", batches),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        repetitions=repetitions,
        dtype=dtype,
        weights=weights,
        device=device,
        load_format=load_format,
        threads=threads,
        seed=seed,
    )
    if json_path is not None:
        check_writable(json_path)
    with _RunsBar() as bar:
        report = run_throughput(
            options, ["sleb", *sys.argv[1:]], on_progress=bar.update, on_load=bar.show_loading
        )
    print_report(report, Console())
    if json_path is not None and report.rows:  # an early Ctrl-C must not replace an older result by nothing
        write_text(json_path, report.to_json())
    if not report.complete:
        raise typer.Exit(130)


@app.command()
def kernels(
    ops: Annotated[
        str | None, typer.Option(help="Operators, as add_norm,linear.", show_default="all")
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Of torch, triton, flash and varlen (attention alone).",
            show_default="all that the device may run",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="auto (bfloat16; float32 on a CPU), float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    repetitions: Annotated[int, typer.Option(help="Samples of each backend.")] = 7,
    scale: Annotated[
        str, typer.Option(help="auto, full (a card's default) or small (a CPU's): the size of the shapes.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the random inputs and the order of the runs.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write environment, samples and results here.")
    ] = None,
) -> None:
    """Measure every operator, several backends in turns, against the device's own limits.

    Ctrl-C reports what is complete.
    """
    from sleb.benchmarks.environment import shown_command
    from sleb.benchmarks.kernels import KernelOptions, run_kernels
    from sleb.benchmarks.report import check_writable, print_kernels, write_text

    options = KernelOptions(
        ops=None if ops is None else parse_names(ops),
        backends=None if backends is None else parse_names(backends),
        dtype=dtype,
        device=device,
        repetitions=repetitions,
        scale=scale,
        seed=seed,
    )
    if json_path is not None:
        check_writable(json_path)
    with _RunsBar("measuring the device") as bar:
        report = run_kernels(options, shown_command(["sleb", *sys.argv[1:]], ""), on_progress=bar.show)
    print_kernels(report, Console())
    if json_path is not None and report.rows:
        write_text(json_path, report.to_json())
    if not report.complete:
        raise typer.Exit(130)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    calibration: Annotated[str, typer.Option(help="As for sleb prune.")] = "wikitext2",
    remove: Annotated[int, typer.Option(help="How many units.")] = 6,
    units: Annotated[str, typer.Option(help="blocks, sublayers or attention.")] = "blocks",
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of a draw.")] = 8,
    draws: Annotated[int, typer.Option(help="Draws of the windows, each searched exactly and fast.")] = 5,
    reference_draws: Annotated[
        int, typer.Option(help="In how many of them the authors' algorithm runs beside (blocks only).")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")] = None,
    seed: Annotated[int, typer.Option(help="Of the first draw, and of the order of the runs.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write environment, samples and results here.")
    ] = None,
) -> None:
    """Measure the search, exact and fast, beside the authors' algorithm, and how often fast agrees with exact.

    Ctrl-C reports the draws that are complete.
    """
    from sleb.benchmarks.command import write_result
    from sleb.benchmarks.report import check_writable
    from sleb.benchmarks.search import SearchBenchOptions, print_search, run_search_bench
    from sleb.prune_options import set_threads

    options = SearchBenchOptions(
        model, calibration, remove, units, seqlen, windows, draws, reference_draws, dtype, device, seed
    )
    if json_path is not None:
        check_writable(json_path)
    set_threads(threads)
    with _RunsBar() as bar:
        result = run_search_bench(
            options, ["sleb", *sys.argv[1:]], lambda share, text: bar.show(int(share * 100), 100, text)
        )
    print_search(result, Console())
    if json_path is not None and result["runs"]:
        write_result(json_path, result)
    if not result["complete"]:
        raise typer.Exit(130)


@app.command()
def methods(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    calibration: Annotated[str, typer.Option(help="The text that every method sees.")],
    held_out: Annotated[str, typer.Option(help="A second text, that none sees.")],
    counts: Annotated[str, typer.Option(help="Blocks to remove, as 3,6.")] = "3,6",
    layer_map: Annotated[
        Path | None, typer.Option(help="SLEB's order.", show_default="searched for on the calibration text")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    windows: Annotated[int, typer.Option(help="Windows of each text.")] = 8,
    random_seeds: Annotated[int, typer.Option(help="Draws of the random method.")] = 3,
    answers: Annotated[bool, typer.Option(help="Compare greedy answers too.")] = True,
    speed: Annotated[
        int, typer.Option(help="Compare the speed of so many blocks with width and 2:4 pruning; 0: do not.")
    ] = 0,
    repetitions: Annotated[int, typer.Option(help="Of the speed measurements.")] = 5,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the losses.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[
        Path | None, typer.Option(help="Draw to this name with .png and .svg.", show_default=False)
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write environment and results here.")
    ] = None,
) -> None:
    """Compare rules for which blocks to remove, on two texts and on answers; and ways to remove weights, on speed."""
    from sleb.benchmarks.command import write_result
    from sleb.benchmarks.method_speed import MethodSpeedOptions, print_method_speed, run_method_speed
    from sleb.benchmarks.methods import MethodsOptions, plot_methods, print_methods, run_methods
    from sleb.benchmarks.report import check_writable
    from sleb.layer_map import LayerMap

    if json_path is not None:
        check_writable(json_path)
    command = ["sleb", *sys.argv[1:]]
    options = MethodsOptions(
        model=model,
        calibration=calibration,
        held_out=held_out,
        counts=parse_integers("--counts", counts),
        layer_map=None if layer_map is None else LayerMap.load(layer_map),
        seqlen=seqlen,
        windows=windows,
        random_seeds=random_seeds,
        answers=answers,
        dtype=dtype,
        device=device,
    )
    console = Console()
    with _RunsBar() as bar:
        result = run_methods(options, command, lambda share, text: bar.show(int(share * 100), 100, text))
    print_methods(result, console)
    if speed and result["complete"]:
        asked = MethodSpeedOptions(model, count=speed, repetitions=repetitions, device=device)
        with _RunsBar() as bar:
            result["speed"] = run_method_speed(asked, command, bar.update)
        print_method_speed(result["speed"], console)
    if json_path is not None and result["rows"]:
        write_result(json_path, result)
    if plot is not None and result["complete"]:
        plot_methods(result, plot)
        console.print(f"Plotted to {plot}.png and {plot}.svg.", markup=False, highlight=False)
    if not (result["complete"] and result.get("speed", result)["complete"]):
        raise typer.Exit(130)


def parse_names(text: str) -> list[str]:
    """The words in a list like "prompt,generate"."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_integers(option: str, text: str) -> list[int]:
    """The integers in a list like "0,6". Raises ConfigError naming `option`."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{option} is '{text}'; it must be integers with commas between, as 0,6") from None


class _RunsBar:
    """Runs done of all, on standard error.

    It is drawn between runs only: a thread that redraws it would take its time from the runs.
    """

    def __init__(self, description: str = "loading the model") -> None:
        self._bar = Bar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task(description, total=None)

    def __enter__(self) -> _RunsBar:
        self._bar.start()
        self._bar.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show_loading(self, num_done: int, num_weights: int) -> None:
        """Shows how much of the model is loaded, in percent."""
        self._bar.update(self._task, total=100, completed=100 * num_done // num_weights, refresh=True)

    def update(self, progress: Progress) -> None:
        """Shows what has been done and what runs next."""
        self.show(progress.num_done, progress.num_runs, progress.next_run)

    def show(self, num_done: int, num_runs: int, next_run: str) -> None:
        """As `update`."""
        self._bar.update(self._task, total=num_runs, completed=num_done, description=next_run, refresh=True)

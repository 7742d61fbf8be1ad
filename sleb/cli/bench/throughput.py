"""`sleb bench throughput`: prompt processing and token generation, dense against pruned."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder, RunsBar, parse_integers, parse_names

if TYPE_CHECKING:
    from sleb.benchmarks.results import Row


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
        str | None,
        typer.Option(
            help="Tokens of a prompt, or several numbers, as 128,512,2048.",
            show_default="prompt: 2048, or what the model holds; others: 64",
        ),
    ] = None,
    output_tokens: Annotated[str, typer.Option(help="New tokens of a request, or several numbers.")] = "128",
    context: Annotated[
        str | None,
        typer.Option(
            help="Run decode after so many tokens, as 0,1024,4096 (0: one token), instead of --prompt-tokens.",
            show_default=False,
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="The SLEB paper's settings, depths too, and its own rows beside."),
    ] = False,
    repetitions: Annotated[int, typer.Option(help="Times that each depth is measured, at least.")] = 6,
    max_repetitions: Annotated[
        int | None, typer.Option(help="At most.", show_default="30, or --repetitions where that is more")
    ] = None,
    interval: Annotated[
        str,
        typer.Option(help="Repeat until the half width of each speedup's 95 % interval is this share of it."),
    ] = "1%",
    time_budget: Annotated[
        float,
        typer.Option(
            help="Seconds for all workloads, loading not counted: the least repetitions first, then narrower "
            "intervals. 0: no limit."
        ),
    ] = 0.0,
    control: Annotated[
        bool,
        typer.Option(help="Measure the baseline a second time, to see how far off equal variants come out."),
    ] = True,
    mixed: Annotated[
        bool, typer.Option(help="In generate, measure a batch of all depths against the depths alone.")
    ] = True,
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit with status 1 if the speedup of a depth is below this.", show_default=False),
    ] = None,
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
    json_path: JsonPath = None,
    report: ReportFolder = None,
) -> None:
    """Measure prompt processing and token generation, several depths in turns.

    Ctrl-C reports the repetitions that are complete.
    """
    from sleb.benchmarks.throughput import run_throughput
    from sleb.benchmarks.throughput_checks import parse_share
    from sleb.benchmarks.throughput_report import print_report
    from sleb.benchmarks.workloads import ThroughputOptions

    options = ThroughputOptions(
        model=model or "",
        config=config,
        layer_map=layer_map,
        depths=None if depths is None else parse_integers("--depths", depths),
        tests=parse_names(tests),
        batches=parse_integers("--batches", batches),
        prompt_tokens=None if prompt_tokens is None else parse_integers("--prompt-tokens", prompt_tokens),
        output_tokens=parse_integers("--output-tokens", output_tokens),
        contexts=None if context is None else parse_integers("--context", context),
        repetitions=repetitions,
        max_repetitions=max_repetitions,
        interval=parse_share("--interval", interval),
        time_budget=time_budget,
        control=control,
        mixed=mixed,
        paper=paper,
        fail_below=fail_below,
        dtype=dtype,
        weights=weights,
        device=device,
        load_format=load_format,
        threads=threads,
        seed=seed,
    )
    outputs = Outputs(json_path, report)
    outputs.check()
    with RunsBar() as bar:
        found = run_throughput(
            options, ["sleb", *sys.argv[1:]], on_progress=bar.update, on_load=bar.show_loading
        )
    console = Console()
    print_report(found, console)
    outputs.write(json.loads(found.to_json()), console)
    if not found.complete:
        raise typer.Exit(130)
    if fail_below is not None:
        _check_speedups(found.rows, fail_below)


def _check_speedups(rows: Sequence[Row], bound: float) -> None:
    """Exit status 1, after one line on standard error, if a depth's speedup is below `bound`."""
    from sleb.benchmarks.results import rows_below
    from sleb.benchmarks.throughput_report import workload_of

    slow = [f"{workload_of(row)}, depth {row.depth}: {row.speedup:.3f}" for row in rows_below(rows, bound)]
    if slow:
        typer.secho(f"below --fail-below {bound:g}: {'; '.join(slow)}", fg=typer.colors.RED, err=True)
        raise typer.Exit(1)

"""`sleb bench throughput`: prompt processing and token generation, dense against pruned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sleb.cli.bench.shared import RunsBar, parse_integers, parse_names


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
    with RunsBar() as bar:
        report = run_throughput(
            options, ["sleb", *sys.argv[1:]], on_progress=bar.update, on_load=bar.show_loading
        )
    print_report(report, Console())
    if json_path is not None and report.rows:  # an early Ctrl-C must not replace an older result by nothing
        write_text(json_path, report.to_json())
    if not report.complete:
        raise typer.Exit(130)

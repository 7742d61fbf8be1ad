"""`sleb bench serve`: load on any OpenAI-compatible server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder
from sleb.cli.chat import API_KEY_VARIABLES

if TYPE_CHECKING:
    from sleb.benchmarks.load.load import LoadProgress
    from sleb.benchmarks.serving import ServeProgress
    from sleb.benchmarks.serving_options import ServeOptions

_DEFAULT_URL = "http://127.0.0.1:8000/v1"


def serve(
    url: Annotated[str | None, typer.Option(help="The server's address.", show_default=_DEFAULT_URL)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Tiers that requests take in turns: with commas, or repeated.",
            show_default="the server's first",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            help="Instead of --url: two servers in turns. --model: one for both, or A's and B's.",
            metavar="URL_A URL_B",
            show_default=False,
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The server's key.", envvar=API_KEY_VARIABLES, show_default=False)
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    concurrency: Annotated[
        str | None,
        typer.Option(help="Requests at once; a list is a sweep.", show_default="1,8,32 without --rate"),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(help="Instead: requests a second at random times, as 0.5,2,inf.", show_default=False),
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(help="Requests of --rate that may be open.", show_default="no bound")
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            help="Of a level.", show_default="10 × concurrency or 30 seconds' worth, at least 20; 100 at inf"
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Instead: seconds of a level in which requests begin.", show_default=False),
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Requests before a level that do not count.", show_default="one a tier")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a prompt, by the server's count, its template included.", show_default="64"
        ),
    ] = None,
    output_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    length_spread: Annotated[
        float | None, typer.Option(help="Both lengths vary evenly by this share, as 0.2.", show_default="0")
    ] = None,
    prefix_tokens: Annotated[
        int | None, typer.Option(help="Tokens before each prompt that others have too.", show_default="0")
    ] = None,
    num_prefixes: Annotated[
        int | None, typer.Option(help="How many such beginnings there are.", show_default="1")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help="Instead: a file with a prompt, messages or ShareGPT's conversations a line.",
            show_default=False,
        ),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Limits in milliseconds, as ttft:200,tpot:50,e2el:3000.", show_default=False),
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Of --compare.", show_default="6")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for a request; more is a failure.")] = 600.0,
    label: Annotated[str | None, typer.Option(help="A name for the rows.", show_default=False)] = None,
    seed: Annotated[
        int, typer.Option(help="Of lengths, arrivals and orders. Random words are new in every run.")
    ] = 0,
    vllm_json: Annotated[
        Path | None,
        typer.Option(help="Write each row into this folder, as vllm bench serve does.", show_default=False),
    ] = None,
    json_path: JsonPath = None,
    report: ReportFolder = None,
) -> None:
    """Load an OpenAI-compatible server, and measure throughput and latencies; or compare two.

    Prompts are random words, new in every run, so that no prefix cache helps. Ctrl-C reports what is complete.
    """
    from sleb.benchmarks.serving_options import ServeOptions, make_lengths, make_levels, parse_goodput
    from sleb.benchmarks.serving_rows import check_folder
    from sleb.client.connection import base_url
    from sleb.errors import ConfigError

    if compare is not None and url is not None:
        raise ConfigError("--compare names both servers, so --url would do nothing; leave one of them out")
    options = ServeOptions(
        urls=[base_url(each) for each in compare or (_DEFAULT_URL if url is None else url,)],
        models=[name.strip() for names in model or () for name in names.split(",") if name.strip()],
        levels=make_levels(concurrency, rate, max_concurrency),
        api_key=api_key,
        endpoint=endpoint,
        num_requests=num_requests,
        duration=duration,
        warmup=warmup,
        lengths=make_lengths(
            output_tokens,
            prompt_tokens=prompt_tokens,
            spread=length_spread,
            prefix_tokens=prefix_tokens,
            num_prefixes=num_prefixes,
            has_dataset=dataset is not None,
        ),
        dataset=dataset,
        goodput=parse_goodput(goodput or ()),
        rounds=rounds,
        timeout=timeout,
        seed=seed,
        label=label,
    )
    outputs = Outputs(json_path, report)
    outputs.check()
    if vllm_json is not None:
        check_folder(vllm_json)
    result = _measure(options)
    _tell(result, outputs, vllm_json)
    _exit(result)


def _measure(options: ServeOptions) -> dict[str, Any]:
    from sleb.benchmarks.serving import run_serving
    from sleb.benchmarks.serving_compare import run_comparison

    command = ["sleb", *sys.argv[1:]]
    with _LoadBar() as bar:
        if options.is_comparison:
            return run_comparison(options, command, bar.show)
        return run_serving(options, command, bar.show)


def _tell(result: Mapping[str, Any], outputs: Outputs, vllm_json: Path | None) -> None:
    """Files first: what cannot be shown must not cost them. What cannot be written must not cost the tables."""
    from sleb.benchmarks.serving_report import print_serving
    from sleb.benchmarks.serving_rows import write_vllm_files

    console = Console()
    try:
        outputs.write(result, console)
        if vllm_json is not None and result["rows"]:
            write_vllm_files(vllm_json, result["rows"])
    finally:
        print_serving(result, console)


def _exit(result: Mapping[str, Any]) -> None:
    """130 for an interrupted load; 1 where nothing was answered, or a server answered no more."""
    from sleb.benchmarks.serving_report import printable
    from sleb.benchmarks.serving_rows import nothing_due

    if "problem" in result:
        problem = result["problem"]
    elif not result["complete"]:
        raise typer.Exit(130)
    elif any(row["completed"] for row in result["rows"]):
        return
    elif result["rows"]:
        reasons = {reason for row in result["rows"] for reason in row["failures"]}
        problem = f"all requests failed: {'; '.join(sorted(reasons))}"
    else:
        problem = nothing_due(result["settings"]["duration"])
    typer.secho(f"error: {printable(problem)}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


class _LoadBar:
    """Requests done of all, how many run and how fast, on standard error; drawn only when told: twice a second."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            auto_refresh=False,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> _LoadBar:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, progress: ServeProgress) -> None:
        """What is under way, and how its load stands."""
        load = progress.load
        if load is None:
            self._bar.reset(self._task)
        self._bar.update(
            self._task,
            total=progress.num_requests,
            completed=0 if load is None else load.num_done,
            description=progress.what if load is None else f"{progress.what}: {_standing(load)}",
            refresh=True,
        )


def _standing(load: LoadProgress) -> str:
    parts = [f"{load.num_running} running", f"{load.tokens_per_second:,.0f} tokens/s"]
    if load.first_seconds is not None:
        parts.append(f"TTFT {load.first_seconds * 1000:,.0f} ms")
    if load.num_failed:
        parts.append(f"{load.num_failed} failed")
    return ", ".join(parts)

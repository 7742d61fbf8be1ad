"""`sleb bench peers`: this engine beside others that are installed, or served."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sleb.cli.bench.shared import JsonPath, Outputs, ReportFolder, RunsBar, parse_integers
from sleb.cli.chat import API_KEY_VARIABLES

if TYPE_CHECKING:
    from sleb.benchmarks.peer_options import PeerOptions


def _print_how(wanted: bool) -> None:
    if wanted:
        from sleb.benchmarks.peer_install import advice

        typer.echo(advice())
        raise typer.Exit


def peers(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="transformers, NAME=PYTHON\\[:MODEL] (transformers, vllm, openvino), or "
            "llamacpp=FOLDER:bf16=FILE,q8_0=FILE,q4_1=FILE; once a peer.",
            show_default="transformers, if there is no --server",
        ),
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=URL\\[#MODEL]: a server that runs already; repeatable. It meets ours behind HTTP. SLEB_API_KEY "
            "or OPENAI_API_KEY may hold its key.",
            show_default="none",
        ),
    ] = None,
    tests: Annotated[
        str, typer.Option(help="decode-STREAMS and prompt-TOKENS.")
    ] = "decode-1,decode-8,decode-32,prompt-512,prompt-1024",
    depths: Annotated[str, typer.Option(help="Of ours, each a contestant, as 0,6.")] = "0",
    layer_map: Annotated[
        str | None,
        typer.Option(help="Layer map (JSON), or none.", show_default="the one shipped with the model"),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Of our weights: bf16, int8, int4.", show_default="those that the peers have too"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Of every engine.", show_default="all processors", min=1)
    ] = None,
    repetitions: Annotated[
        int, typer.Option(help="Times that each peer runs a test; a verdict takes six.", min=1)
    ] = 6,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order.")] = 0,
    kv_gib: Annotated[
        int, typer.Option(help="Whole GiB of KV cache for engines that want to know.", min=1)
    ] = 4,
    wait: Annotated[float, typer.Option(help="Seconds that a run waits for an idle machine.", min=0)] = 20,
    retries: Annotated[int, typer.Option(help="Times that a disturbed run is made anew.", min=0)] = 3,
    peer_version: Annotated[
        list[str] | None,
        typer.Option(help="llamacpp=VERSION, where the build does not know.", show_default="what it says"),
    ] = None,
    json_path: JsonPath = None,
    report: ReportFolder = None,
    how: Annotated[
        bool,
        typer.Option(
            "--how", help="Say how the others are installed, and end.", callback=_print_how, is_eager=True
        ),
    ] = False,
) -> None:
    """Measure this engine against others on this machine's processors, in turns.

    Nothing is installed: --how says how. Ctrl-C reports the repetitions that are complete.
    """
    from sleb.benchmarks.idle import QuietPolicy
    from sleb.benchmarks.peer_options import (
        FORMATS,
        PeerOptions,
        PeerSpec,
        PeerTest,
        ServerSpec,
        parse_list,
        parse_versions,
    )
    from sleb.benchmarks.peer_public import shown_arguments
    from sleb.errors import ConfigError
    from sleb.models.resolve import resolve_model

    if not hasattr(os, "sched_getaffinity"):
        raise ConfigError("sleb bench peers runs on Linux only: it reads /proc to see what others take")
    outputs = Outputs(json_path, report)
    outputs.check()
    servers = [ServerSpec.parse(text) for text in server or ()]
    texts = peer or ([] if servers else ["transformers"])
    found = resolve_model(model)
    options = PeerOptions(
        model=model,
        folder=found.path.absolute(),
        model_name=found.name,
        peers=[PeerSpec.parse(text) for text in texts],
        servers=servers,
        tests=[PeerTest.parse(name) for name in parse_list("--tests", tests)],
        layer_map=layer_map,
        formats=None if formats is None else parse_list("--formats", formats, FORMATS),
        depths=parse_integers("--depths", depths),
        threads=threads or len(os.sched_getaffinity(0)),
        repetitions=repetitions,
        seed=seed,
        kv_gib=kv_gib,
        versions=parse_versions(peer_version or ()),
        api_key=next(filter(None, map(os.environ.get, API_KEY_VARIABLES)), None),
        policy=QuietPolicy(wait_seconds=wait, retries=retries),
        command=shown_arguments(["sleb", *sys.argv[1:]], model),
    )
    _measure(options, outputs)


def _end_on_signals() -> None:
    """SIGTERM and the end of the terminal are as Ctrl-C, which ends the engines too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # shell and system may both tell of a closed terminal
    raise KeyboardInterrupt


def _measure(options: PeerOptions, outputs: Outputs) -> None:
    """Runs, reports, and ends with the exit status that says how it went."""
    from sleb.benchmarks.command import write_result
    from sleb.benchmarks.peer_tables import print_peers
    from sleb.benchmarks.peers import run_peers
    from sleb.errors import SlebError

    errors = Console(stderr=True)

    def say(text: str) -> None:
        if text:
            errors.print(text, markup=False, highlight=False, soft_wrap=True)

    def save(result: dict[str, Any]) -> None:
        if outputs.json_path is not None and result["rows"]:
            write_result(outputs.json_path, result)

    _end_on_signals()
    with RunsBar("starting") as bar:
        result = run_peers(options, bar.update, say, save)
        save(result)  # before anything is shown: the terminal may be gone
    console = Console()
    try:
        outputs.write(result, console)
    finally:
        print_peers(result, console)
    if "problem" in result:
        raise SlebError(result["problem"])
    if not result["complete"]:
        raise typer.Exit(130)

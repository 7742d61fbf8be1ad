"""`sleb serve`: an OpenAI-compatible server for every depth of a pruned model."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from sleb.errors import ConfigError

if TYPE_CHECKING:
    from sleb.engine.config import EngineConfig
    from sleb.engine.engine import Engine


_LISTS = ("tiers", "cpu_affinity")  # options whose text is a list with commas


def _use_settings(context: typer.Context, config_file: str | None) -> str | None:
    """Makes the environment and the settings file the defaults of all other options."""
    from sleb.cli.settings import PREFIX, gather, settings_of

    file = config_file or os.environ.get(f"{PREFIX}CONFIG_FILE") or None
    if not context.resilient_parsing:  # else a shell only asks how to complete a line
        settings = settings_of(serve, joined=_LISTS, without="config_file")
        context.default_map = gather(settings, os.environ, file, "serve")
    return file


def serve(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    config_file: Annotated[
        str | None,
        typer.Option(
            help="TOML file with a table \\[serve] of these options. Each can also be a variable of the environment, "
            "SLEB_PORT for --port; flags go before those, and those before the file.",
            callback=_use_settings,
            is_eager=True,
        ),
    ] = None,
    layer_map: Annotated[
        str | None,
        typer.Option(help="Layer map (JSON), or none.", show_default="none; for smollm2 the shipped one"),
    ] = None,
    tiers: Annotated[
        str | None,
        typer.Option(
            help="Depths to serve, such as 0,3,6.", show_default="what the map recommends; smollm2: 0,3,6"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for any free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="A key that opens the API; repeatable. Other users see flags: prefer SLEB_API_KEY or a file.",
            show_default="open to all",
        ),
    ] = None,
    api_key_file: Annotated[
        str | None, typer.Option(help="File with a key a line, beside those of --api-key.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Origin of web pages that may use the API, or *; repeatable.", show_default="none"),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name of the model; repeatable. Depth k is then NAME:sleb-k too.",
            show_default="none",
        ),
    ] = None,
    bench_result: Annotated[
        list[str] | None,
        typer.Option(
            help="JSON of `sleb bench throughput` or `sleb eval`: what /v1/models tells of each tier; repeatable.",
            show_default="none",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    weights: Annotated[
        str, typer.Option(help="auto (as --dtype), int8 or int4 (quantised when loaded), or a dtype.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    load_format: Annotated[str, typer.Option(help="auto, safetensors, or dummy (random weights).")] = "auto",
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and answer.", show_default="what the model and the memory allow"),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests computed at once.")] = 64,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of one step: how long a prompt makes other answers wait.",
            show_default="256 on a CPU, 2048 on a card",
        ),
    ] = None,
    kv_cache_memory: Annotated[
        float | None, typer.Option(help="GiB for the KV cache.", show_default="from the free memory")
    ] = None,
    prefix_caching: Annotated[
        bool, typer.Option("--prefix-caching/--no-prefix-caching", help="Reuse the KV of equal beginnings.")
    ] = True,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Share of the card's memory for weights, KV cache and everything else.")
    ] = 0.9,
    kernels: Annotated[
        str, typer.Option(help="auto, triton (on a card), cpu (C kernels) or torch.")
    ] = "auto",
    attention: Annotated[
        str, typer.Option(help="On a card: auto, triton, flash (flash-attn, if installed) or torch.")
    ] = "auto",
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs/--no-cuda-graphs", help="On a card: capture decode steps at start.")
    ] = True,
    overlap: Annotated[
        bool | None,
        typer.Option(
            "--overlap/--no-overlap",
            help="Launch a step before the tokens of the one before are read.",
            show_default="on a card",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="one a physical core")
    ] = None,
    cpu_affinity: Annotated[
        str | None,
        typer.Option(
            help="Processors that the threads are tied to, such as 0,1 or 0-3.", show_default="none"
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 1024,
    request_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds after which a request ends with an error.", show_default="never"),
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="MiB of a request's body.")] = 32.0,
    drain_timeout: Annotated[float, typer.Option(help="Seconds to finish open requests on SIGTERM.")] = 30.0,
    warm_up: Annotated[
        bool,
        typer.Option("--warm-up/--no-warm-up", help="Let every tier answer once before /ready says so."),
    ] = True,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a model, at one depth or several, behind an OpenAI-compatible API."""
    _check_range("port", port, 0, 65535, "0 for any free one")
    _check_range("max-queue", max_queue, 0, 10**6, "requests")
    _check_range("drain-timeout", drain_timeout, 0, 86400, "seconds")
    _check_range("request-timeout", request_timeout, 0.001, 86400, "seconds")
    _check_range("max-body-mb", max_body_mb, 0.001, 1024, "MiB")
    depths = None if tiers is None else parse_tiers(tiers)

    from sleb.cli.settings import check_alias, check_origin, read_keys
    from sleb.server.bench_result import BenchResult
    from sleb.server.context import ServerOptions
    from sleb.server.logs import FORMATS, LEVELS
    from sleb.server.run import bind_socket
    from sleb.server.run import serve as run_server

    _check_choice("log-format", log_format, FORMATS)
    _check_choice("log-level", log_level, LEVELS)
    keys = (*(api_key or ()), *(read_keys(api_key_file) if api_key_file is not None else ()))
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key is empty; give a key, or leave the flag out")
    options = ServerOptions(
        host=host,
        port=port,
        api_keys=keys,
        max_queue=max_queue,
        drain_timeout=drain_timeout,
        max_body_bytes=int(max_body_mb * 2**20),
        log_format=log_format,
        log_level=log_level,
        request_timeout=request_timeout,
        cors_origins=tuple(map(check_origin, cors_origin or ())),
        served_model_names=tuple(map(check_alias, served_model_name or ())),
        bench_results=tuple(map(BenchResult.load, bench_result or ())),
        warm_up=warm_up,
    )
    sock = bind_socket(host, port)

    # Torch takes seconds to import: not before the flags and the port are right.
    from sleb.engine.config import EngineConfig

    config = EngineConfig(
        model=model,
        layer_map=layer_map,
        tiers=depths,
        dtype=dtype,
        weights=weights,
        device=device,
        load_format=load_format,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_memory=kv_cache_memory,
        prefix_caching=prefix_caching,
        gpu_memory_utilization=gpu_memory_utilization,
        kernels=kernels,
        attention=attention,
        cuda_graphs=cuda_graphs,
        overlap=overlap,
        threads=threads,
        cpu_affinity=None if cpu_affinity is None else parse_cpus(cpu_affinity),
    )
    code = run_server(sock, config, options, make_engine=_load_engine if log_format == "text" else None)
    if code:
        raise typer.Exit(code)


def _load_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, under a progress bar on standard error."""
    from sleb.cli.progress import LoadingBar
    from sleb.engine.engine import Engine

    with LoadingBar() as bar:
        return Engine(
            replace(config, on_progress=bar.update, on_tuning=bar.show_tuning, on_capture=bar.update_capture)
        )


def parse_tiers(text: str) -> list[int]:
    """Depths from "0,3,6". Raises ConfigError for anything else."""
    try:
        return [int(depth) for depth in text.split(",")]
    except ValueError:
        raise ConfigError(f"--tiers '{text}' is not a list of depths; write it like 0,3,6") from None


def parse_cpus(text: str) -> list[int]:
    """Processors from "0,2" or "0-3". Raises ConfigError for anything else."""
    cpus: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) - int(first) > 4096:
            raise ConfigError(
                f"--cpu-affinity '{text}' is not a list of processors; write it like 0,2 or 0-3"
            )
        cpus.extend(range(int(first), int(last or first) + 1))
    return cpus


def _check_range(name: str, value: float | None, low: float, high: float, what: str) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"--{name} is {value:g}; it must be from {low:g} to {high:g} ({what})")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{name} '{value}' is not known; choose one of: {', '.join(allowed)}")

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


def serve(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
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
            help="A key that opens the API; repeatable. Also from SLEB_API_KEY.", show_default="open to all"
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
    max_num_batched_tokens: Annotated[int, typer.Option(help="Tokens of one step.")] = 2048,
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
    drain_timeout: Annotated[float, typer.Option(help="Seconds to finish open requests on SIGTERM.")] = 30.0,
) -> None:
    """Serve a model, at one depth or several, behind an OpenAI-compatible API."""
    _check(port, max_queue, drain_timeout)
    keys = (*(api_key or ()), *_environment_key())
    if any(not key.strip() for key in keys):
        raise ConfigError("--api-key is empty; give a key, or leave the flag out")
    depths = None if tiers is None else parse_tiers(tiers)

    from sleb.server.context import ServerOptions
    from sleb.server.run import bind_socket
    from sleb.server.run import serve as run_server

    options = ServerOptions(
        host=host, port=port, api_keys=keys, max_queue=max_queue, drain_timeout=drain_timeout
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
        enable_prefix_caching=prefix_caching,
        gpu_memory_utilization=gpu_memory_utilization,
        kernels=kernels,
        attention=attention,
        cuda_graphs=cuda_graphs,
        overlap=overlap,
        num_threads=threads,
        cpu_affinity=None if cpu_affinity is None else parse_cpus(cpu_affinity),
    )
    code = run_server(sock, config, options, make_engine=_load_engine)
    if code:
        raise typer.Exit(code)


def _load_engine(config: EngineConfig) -> Engine:
    """The engine of `config`, under a progress bar on standard error."""
    from sleb.cli.loading import LoadingBar
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


def _environment_key() -> list[str]:
    key = os.environ.get("SLEB_API_KEY")
    return [key] if key else []


def _check(port: int, max_queue: int, drain_timeout: float) -> None:
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; it must be from 0 (any free one) to 65535")
    if max_queue < 0:
        raise ConfigError(f"--max-queue is {max_queue}; it must be at least 0")
    if not 0 <= drain_timeout <= 86400:
        raise ConfigError(f"--drain-timeout is {drain_timeout:g}; it must be from 0 to 86400 seconds")

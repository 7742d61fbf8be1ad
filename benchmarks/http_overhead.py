"""What HTTP costs: streamed completions of many clients at once against `LLM.generate` on the same prompts, in turns.

    python -m sleb.benchmarks.http_overhead MODEL [--streams 32] [--json FILE]

One engine serves both: within a repetition it first generates directly and then behind the server, or the other way
round. The clients are one process that does as little as it can (`sleb.benchmarks.peer_http`); it runs on the same
machine, so what it takes counts as HTTP's. The ratio is the direct time over the time over HTTP, from sending the
requests to the last token.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console

from sleb.benchmarks.command import run_command, write_result
from sleb.benchmarks.environment import describe_environment, shown_command
from sleb.benchmarks.harness import alternated_orders
from sleb.benchmarks.throughput import greedy_params, plain_token_ids
from sleb.engine.llm import LLM
from sleb.files import check_writable

TARGET = 0.9
_DIRECT, _HTTP = 0, 1


@dataclass(frozen=True)
class OverheadOptions:
    """What to measure; the engine's options are as in EngineConfig."""

    model: str
    streams: int = 32
    prompt_tokens: int = 64
    output_tokens: int = 128
    repetitions: int = 5
    dtype: str = "auto"
    weights: str = "auto"
    threads: int | None = None
    seed: int = 0


class _Clients:
    """The process of the clients."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "sleb.benchmarks.peer_http", url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, bodies: Sequence[dict[str, Any]]) -> float:
        """Seconds until the last token of all. Raises RuntimeError when the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(bodies) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients' process has ended")
        return float(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


@contextmanager
def _served(llm: LLM, streams: int) -> Iterator[_Clients]:
    """The engine behind a server on a free port, and the clients; both gone afterwards."""
    from sleb.server.context import ServerContext, ServerOptions
    from sleb.server.run import base_url, bind_socket, make_server

    context = ServerContext.create(llm.engine, ServerOptions(port=0), streams)
    sock = bind_socket("127.0.0.1", 0)
    server = make_server(context)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    clients = _Clients(f"{base_url(sock)}/v1")
    try:
        yield clients
    finally:
        clients.close()
        server.should_exit = True
        thread.join(10)
        sock.close()


def run_overhead(
    options: OverheadOptions,
    command: Sequence[str] = (),
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loads the model, measures, and gives the result file; Ctrl-C keeps complete repetitions. Raises SlebError."""
    context = options.prompt_tokens + options.output_tokens
    llm = LLM(
        options.model,
        dtype=options.dtype,
        weights=options.weights,
        threads=options.threads,
        seed=options.seed,
        max_model_len=max(512, context),
        max_num_seqs=options.streams,
        prefix_caching=False,
    )
    environment = describe_environment(llm.engine, shown_command(command, options.model))
    samples: list[dict[str, float]] = []
    complete = True
    try:
        _measure(llm, options, samples, on_progress)
    except KeyboardInterrupt:
        complete = False
    settings = {key: value for key, value in asdict(options).items() if key != "model"}
    result = {
        "kind": "http-overhead",
        "environment": environment,
        "model": llm.engine.model_name,
        "settings": settings,
    }
    return result | summarise(options, samples) | {"complete": complete}


def summarise(options: OverheadOptions, samples: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Medians, spread and samples of seconds; nothing but samples where no repetition is complete."""
    found: dict[str, Any] = {"repetitions": list(samples)}
    if samples:
        ratios = [each["direct"] / each["http"] for each in samples]
        tokens = options.streams * options.output_tokens
        found |= {
            "ratio": median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "target": TARGET,
            "met": median(ratios) >= TARGET,
            "tokens_per_second": {
                side: median(tokens / each[side] for each in samples) for side in ("direct", "http")
            },
        }
    return found


def _measure(
    llm: LLM, options: OverheadOptions, samples: list[dict[str, float]], on_progress: Callable[[str], None]
) -> None:
    token_ids = plain_token_ids(llm.engine)
    params = greedy_params(options.output_tokens)
    orders = alternated_orders((_DIRECT, _HTTP), options.repetitions, random.Random(options.seed))
    for number, order in enumerate([(_DIRECT, _HTTP), *orders]):
        on_progress(f"repetition {number} of {options.repetitions}" if number else "warm-up")
        rng = random.Random(f"{options.seed} {number}")
        prompts = [rng.choices(token_ids, k=options.prompt_tokens) for _ in range(options.streams)]
        seconds = {}
        for side in order:
            if side == _DIRECT:
                started = time.perf_counter()
                llm.generate(prompts, params)
                seconds["direct"] = time.perf_counter() - started
            else:
                with _served(llm, options.streams) as clients:
                    bodies = [_body(prompt, options.output_tokens) for prompt in prompts]
                    clients.run([_body(prompts[0], 1)])  # the first request of a server, uncounted
                    seconds["http"] = clients.run(bodies)
        if number:
            samples.append(seconds)


def _body(prompt: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """As `greedy_params`."""
    fields = {"temperature": 0, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "ignore_eos": True}
    return {"prompt": list(prompt), "max_tokens": num_tokens, "stream": True} | fields


def main(
    model: Annotated[str, typer.Argument(help="Folder, hub id, .gguf file, or smollm2.")],
    streams: Annotated[int, typer.Option(help="Clients at once.", min=1)] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(help="New tokens of a request.", min=1)] = 128,
    repetitions: Annotated[int, typer.Option(help="Times that each side is measured.", min=1)] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    weights: Annotated[str, typer.Option(help="auto (as --dtype), int8 or int4.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="the engine's choice")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts and the order.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Measure streaming over HTTP against generating directly, in turns."""
    if json_path is not None:
        check_writable(json_path)
    console = Console(stderr=True, highlight=False)
    model = os.path.expanduser(model)
    options = OverheadOptions(
        model, streams, prompt_tokens, output_tokens, repetitions, dtype, weights, threads, seed
    )
    result = run_overhead(
        options, ["python", "-m", "sleb.benchmarks.http_overhead", *sys.argv[1:]], console.print
    )
    if result["repetitions"]:
        rates, spread = result["tokens_per_second"], f"{result['ratio_low']:.3f}–{result['ratio_high']:.3f}"
        met = "met" if result["met"] else "not met"
        console.print(f"direct {rates['direct']:,.0f}, HTTP {rates['http']:,.0f} tokens/s")
        console.print(f"ratio {result['ratio']:.3f} ({spread}), target {TARGET}: {met}")
        if json_path is not None:
            write_result(json_path, result)
    if not result["complete"]:
        raise typer.Exit(130)


if __name__ == "__main__":
    run_command(main)

"""`sleb bench serve` against a second client, written for this test alone, that drives the same load.

Two servers: a scripted one, whose pace does not depend on who else uses the processor, and sleb's own over a model.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import pytest

from sleb.benchmarks.load_prompts import Lengths
from sleb.benchmarks.serving import run_serving
from sleb.benchmarks.serving_options import Level, ServeOptions

WORDS = (
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "red",
    "green",
    "blue",
    "north",
)


def load_scripted():
    path = Path(__file__).with_name("scripted_server.py")
    spec = importlib.util.spec_from_file_location("sleb_tests_scripted_server", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


async def plain_request(url: str, body: dict) -> tuple[float, int]:
    """Seconds to the first text, and the tokens of one answer, over a connection of its own, line by line."""
    host, port = re.fullmatch(r"http://(.*):(\d+)/v1", url).groups()
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    begun = time.perf_counter()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    first, num_tokens = None, 0
    while True:
        line = await reader.readline()
        assert line, "the stream ended early"
        if line.startswith(b"data: [DONE]"):
            break
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
            first = time.perf_counter() - begun
        if chunk.get("usage"):
            num_tokens = chunk["usage"]["completion_tokens"]
    writer.close()
    assert first is not None
    return first, num_tokens


@dataclass(frozen=True)
class Shape:
    """A closed loop. words: of the plain client's prompts, about as long as our prompt_tokens."""

    concurrency: int
    num_requests: int
    prompt_tokens: int
    words: int
    tokens: int


async def plain_load(url: str, model: str, shape: Shape, seed: int) -> dict:
    """Tokens a second and the median TTFT."""
    waiting, answers, rng = list(range(shape.num_requests)), [], Random(seed)

    async def client() -> None:
        while waiting:
            waiting.pop()
            text = " ".join(rng.choices(WORDS, k=shape.words))
            body = {
                "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": shape.tokens,
                "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            answers.append(await plain_request(url, body))

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(shape.concurrency)))
    seconds = time.perf_counter() - begun
    rate = sum(num_tokens for _, num_tokens in answers) / seconds
    return {"rate": rate, "ttft": median(first for first, _ in answers)}


def our_load(url: str, model: str, shape: Shape, seed: int) -> dict:
    options = ServeOptions(
        [url],
        models=[model],
        levels=[Level(shape.concurrency)],
        num_requests=shape.num_requests,
        lengths=Lengths(shape.prompt_tokens, shape.tokens),
        warmup=0,
        seed=seed,
    )
    (row,) = run_serving(options)["rows"]
    assert row["failed"] == 0 and set(row["output_lens"]) == {shape.tokens}
    return {"rate": row["output_throughput"], "ttft": row["median_ttft_ms"] / 1000}


def both_loads(url: str, model: str, shape: Shape, rounds: int) -> list[tuple[dict, dict]]:
    """The plain client's figures and ours, in turns that alternate, after a warm-up."""
    asyncio.run(plain_load(url, model, replace(shape, num_requests=shape.concurrency), rounds))
    found = []
    for number in range(rounds):
        if number % 2:
            ours = our_load(url, model, shape, number)
            plain = asyncio.run(plain_load(url, model, shape, number))
        else:
            plain = asyncio.run(plain_load(url, model, shape, number))
            ours = our_load(url, model, shape, number)
        found.append((plain, ours))
    return found


def ratio(pairs: list[tuple[dict, dict]], name: str) -> float:
    """Ours over the plain client's, the median of the rounds."""
    return median(ours[name] / plain[name] for plain, ours in pairs)


def test_on_a_scripted_server() -> None:
    scripted = load_scripted()
    server = scripted.ScriptedServer(scripted.Script(first=0.05, gap=0.01))
    shape = Shape(concurrency=4, num_requests=8, prompt_tokens=30, words=23, tokens=16)
    try:
        pairs = both_loads(server.url, "small", shape, rounds=2)
    finally:
        server.close()
    ideal = 4 * 16 / (0.05 + 15 * 0.01)
    assert 0.75 < ratio(pairs, "rate") < 1.33
    assert 0.75 < ratio(pairs, "ttft") < 1.33
    assert all(ours["rate"] <= ideal and ours["ttft"] >= 0.05 for _, ours in pairs)


@contextmanager
def tiny_server(folder: Path) -> Iterator[str]:
    """The address of sleb's server over a tiny model, in a thread."""
    from sleb.engine.config import EngineConfig
    from sleb.engine.engine import Engine
    from sleb.server.context import ServerContext, ServerOptions
    from sleb.server.run import base_url, bind_socket, make_server

    engine = Engine(EngineConfig(model=str(folder), dtype="float32", device="cpu", kv_cache_memory=0.01))
    context = ServerContext.create(engine, ServerOptions(port=0), 16)
    sock = bind_socket("127.0.0.1", 0)
    server = make_server(context)
    thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"{base_url(sock)}/v1"
    server.handle_exit(signal.SIGTERM, None)
    thread.join(10)
    sock.close()


def test_on_sleb_itself(tiny_model_dir: Path) -> None:
    """Bytes are tokens there, so a word is five or so; the model is no work, so only HTTP is compared."""
    shape = Shape(concurrency=4, num_requests=8, prompt_tokens=120, words=17, tokens=16)
    with tiny_server(tiny_model_dir) as url:
        result = run_serving(
            ServeOptions([url], levels=[Level(2)], num_requests=4, lengths=Lengths(120, 8), warmup=0)
        )
        pairs = both_loads(url, "tiny-llama", shape, rounds=2)
    (row,) = result["rows"]
    assert row["input_lens"] == [120] * 4 and row["output_lens"] == [8] * 4  # by a tokenizer of bytes
    assert result["server"]["owned_by"] == "sleb" and result["model"]["name"] == "tiny-llama"
    assert 0.5 < ratio(pairs, "rate") < 2
    assert 0.4 < ratio(pairs, "ttft") < 2.5


@pytest.mark.slow
def test_on_the_demo_model_within_three_percent() -> None:
    """Needs a machine that does nothing else, as any such figure does."""
    command = [sys.executable, "-m", "sleb", "serve", "smollm2", "--port", "0", "--tiers", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "80"})
    try:
        found = next(
            filter(None, (re.search(r"Serving at (http://\S+)/v1", line) for line in process.stderr))
        )
        threading.Thread(target=process.stderr.read, daemon=True).start()
        shape = Shape(concurrency=8, num_requests=24, prompt_tokens=64, words=33, tokens=64)
        pairs = both_loads(f"{found[1]}/v1", "smollm2", shape, rounds=6)
    finally:
        process.terminate()
        process.wait(30)
    assert ratio(pairs, "rate") == pytest.approx(1, abs=0.03)
    assert ratio(pairs, "ttft") == pytest.approx(1, abs=0.15)

"""`sleb bench serve` against a second client, written for this test alone, that drives the same load.

Two servers: a scripted one, whose pace does not depend on who else uses the processor, and sleb's own over a model.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.request import Request, urlopen

import pytest
import sleb_tests_scripted_server as scripted

from sleb.benchmarks.load.options import ServeLoadOptions
from sleb.benchmarks.prompts import Lengths, Prompt, RandomPrompts, calibrate
from sleb.benchmarks.serve import run_serve


class PlainConnection:
    """Requests one after another over a kept connection, answers read line by line."""

    def __init__(self, url: str) -> None:
        self._host, self._port = re.fullmatch(r"http://(.*):(\d+)/v1", url).groups()

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(self._host, int(self._port))

    async def ask(self, body: dict) -> tuple[float, int]:
        """Seconds to the first text, and the tokens of the answer."""
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        )
        begun = time.perf_counter()
        self._writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        first, num_tokens = None, 0
        while (line := await self._reader.readline()) != b"0\r\n":  # the last chunk of an HTTP answer
            assert line, "the stream ended early"
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                first = time.perf_counter() - begun
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
        await self._reader.readline()
        assert first is not None
        return first, num_tokens

    def close(self) -> None:
        self._writer.close()


@dataclass(frozen=True)
class Shape:
    """A closed loop.

    spread: of the lengths. Where all answers are of one length they end together, the next prompts come together, and
    how many of them the server takes at once is chance, by which the time to the first token varies twofold.
    """

    concurrency: int
    num_requests: int
    prompt_tokens: int
    tokens: int
    spread: float

    @property
    def lengths(self) -> Lengths:
        return Lengths(self.prompt_tokens, self.tokens, self.spread)


def plain_body(model: str, text: str, num_tokens: int) -> dict:
    return {
        "model": model, "messages": [{"role": "user", "content": text}], "max_tokens": num_tokens,
        "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


def equal_prompts(url: str, model: str, shape: Shape, seed: int) -> list[Prompt]:
    """As long as ours, and answers too, but of other words: a prefix cache would know the same ones."""

    async def count_tokens(text: str) -> int:
        body = plain_body(model, text, 1) | {"stream": False, "stream_options": None}
        request = Request(
            f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=30) as answer:
            return json.load(answer)["usage"]["prompt_tokens"]

    source = RandomPrompts(shape.lengths, asyncio.run(calibrate(count_tokens)), seed, salt="plain")
    return [source.make(number) for number in range(shape.num_requests)]


async def plain_load(url: str, model: str, shape: Shape, prompts: list[Prompt]) -> dict:
    """Tokens a second and the median TTFT."""
    waiting, answers = list(reversed(prompts)), []

    async def client(connection: PlainConnection) -> None:
        while waiting:
            prompt = waiting.pop()
            answers.append(await connection.ask(plain_body(model, prompt.text, prompt.output_tokens)))

    connections = [PlainConnection(url) for _ in range(shape.concurrency)]
    await asyncio.gather(*(connection.open() for connection in connections))
    begun = time.perf_counter()
    await asyncio.gather(*map(client, connections))
    seconds = time.perf_counter() - begun
    for connection in connections:
        connection.close()
    rate = sum(num_tokens for _, num_tokens in answers) / seconds
    return {"rate": rate, "ttft": median(first for first, _ in answers)}


def our_load(url: str, model: str, shape: Shape, seed: int) -> dict:
    options = ServeLoadOptions(
        url=url,
        model=[model],
        concurrency=[shape.concurrency],
        num_requests=shape.num_requests,
        prompt_tokens=shape.prompt_tokens,
        output_tokens=shape.tokens,
        length_spread=shape.spread,
        seed=seed,
    )
    found = {each.metric: each for each in run_serve(options, {}).measurements}
    assert found["tokens/s"].facts["failed"] == 0
    return {"rate": found["tokens/s"].value, "ttft": found["TTFT p50 ms"].value / 1000}


def both_loads(url: str, model: str, shape: Shape, rounds: int) -> list[tuple[dict, dict]]:
    """The plain client's figures and ours, in turns that alternate, after a warm-up."""
    prompts = [equal_prompts(url, model, shape, number) for number in range(rounds + 1)]
    asyncio.run(plain_load(url, model, shape, prompts.pop()))
    turns = [
        lambda number: asyncio.run(plain_load(url, model, shape, prompts[number])),
        lambda number: our_load(url, model, shape, number),
    ]
    found = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        figures = {which: turns[which](number) for which in order}
        found.append((figures[0], figures[1]))
    return found


def ratio(pairs: list[tuple[dict, dict]], name: str) -> float:
    """Ours over the plain client's, the median of the rounds."""
    return median(ours[name] / plain[name] for plain, ours in pairs)


def scripted_loads(rounds: int, num_requests: int) -> list[tuple[dict, dict]]:
    """Four requests at once to a server whose first token takes 50 ms and whose others 10 ms."""
    server = scripted.ScriptedServer(scripted.Script(first=0.05, gap=0.01))
    shape = Shape(concurrency=4, num_requests=num_requests, prompt_tokens=30, tokens=16, spread=0)
    try:
        return both_loads(server.url, "small", shape, rounds)
    finally:
        server.close()


def test_on_a_scripted_server() -> None:
    """However busy the machine is, nothing can come out faster than the script goes."""
    ideal = 4 * 16 / (0.05 + 15 * 0.01)
    for plain, ours in scripted_loads(rounds=2, num_requests=8):
        assert 0 < ours["rate"] <= ideal and ours["ttft"] >= 0.05
        assert 0 < plain["rate"] <= ideal and plain["ttft"] >= 0.05


@pytest.mark.slow
def test_on_a_scripted_server_within_three_percent() -> None:
    """On a machine that does much else the bounds may be too narrow, as for any such figure."""
    pairs = scripted_loads(rounds=6, num_requests=32)
    assert ratio(pairs, "rate") == pytest.approx(1, abs=0.03)
    assert ratio(pairs, "ttft") == pytest.approx(1, abs=0.03)


@contextmanager
def sleb_server(*arguments: object) -> Iterator[str]:
    """The address of `sleb serve`. In a process of its own: threads of one would wait for each other's turn."""
    command = [sys.executable, "-m", "sleb", "serve", *map(str, arguments), "--port", "0"]
    environment = os.environ | {"COLUMNS": "80"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = (re.search(r"Serving at (http://\S+)/v1", line) for line in process.stderr)
            address = next(filter(None, lines))[1]
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait(30)


def test_on_sleb_itself(tiny_model_dir: Path) -> None:
    """Bytes are tokens there, so a word is five or so."""
    with sleb_server(tiny_model_dir, "--dtype", "float32", "--kv-cache-memory", "0.01") as url:
        asked = ServeLoadOptions(
            url=url,
            concurrency=[2],
            num_requests=4,
            prompt_tokens=130,
            output_tokens=8,
            length_spread=0.2,
            seed=9,
        )
        result = run_serve(asked, {})
    rate = next(each for each in result.measurements if each.metric == "tokens/s")
    assert rate.facts["completed"] == 4 and not any("length" in each for each in result.notes)
    assert result.settings["servers"]["software"] == "sleb" and rate.subject == "tiny-llama"


@pytest.mark.slow
def test_on_the_demo_model_within_three_percent() -> None:
    """On a machine that does much else the bounds may be too narrow, as for any such figure."""
    shape = Shape(concurrency=8, num_requests=48, prompt_tokens=64, tokens=64, spread=0.5)
    with sleb_server("smollm2", "--tiers", "0") as url:
        pairs = both_loads(url, "smollm2", shape, rounds=6)
    assert ratio(pairs, "rate") == pytest.approx(1, abs=0.03)
    assert ratio(pairs, "ttft") == pytest.approx(1, abs=0.03)

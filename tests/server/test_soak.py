"""Many clients at once: answers, aborts at random moments, malformed requests, mixed tiers; nothing is lost."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter

import httpx
import psutil
import pytest

from sleb import LLM

TIERS = ("tiny-llama", "tiny-llama:sleb-2", "tiny-llama:sleb-3")
MALFORMED = (
    b"{",
    b"\xff\xfe{}",
    json.dumps({"messages": "no"}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "x"}], "model": "nobody"}).encode(),
    json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode(),  # past the context
)
EXPECTED = {400, 404}


class Soak:
    """`count` requests of which a third are aborted and a tenth malformed; `outcomes` counts exactly one each."""

    def __init__(self, url, count, seed=0):
        self.url, self.count = url, count
        self.rng = random.Random(seed)
        self.outcomes = Counter()
        self.memory = []

    async def run(self, concurrency):
        limits = httpx.Limits(max_connections=concurrency)
        gate = asyncio.Semaphore(concurrency)
        async with httpx.AsyncClient(base_url=self.url, limits=limits, timeout=60) as client:

            async def one(number):
                async with gate:
                    self.outcomes[await self.request(client)] += 1
                    self.outcomes["all"] += 1
                    if number % 100 == 0:
                        gc.collect()
                        self.memory.append((number, psutil.Process().memory_info().rss))

            await asyncio.gather(*(one(number) for number in range(self.count)))

    async def request(self, client):
        kind = self.rng.random()
        if kind < 0.1:
            answer = await client.post("/v1/chat/completions", content=self.rng.choice(MALFORMED))
            assert answer.status_code in EXPECTED and answer.json()["error"]["message"]
            return "refused"
        length = self.rng.choice([1, 5, 40, 150])
        body = {
            "model": self.rng.choice(TIERS),
            "messages": [{"role": "user", "content": "".join(self.rng.choices("abcdef ", k=length))}],
            "max_tokens": self.rng.choice([1, 8, 60]),
            "temperature": self.rng.choice([0, 1.0]),
            "n": self.rng.choice([1, 1, 1, 2]),
            "stream": True,
            "ignore_eos": True,
        }
        return await self.stream(client, body, self.rng.randrange(6) if kind < 0.1 + 1 / 3 else None)

    async def stream(self, client, body, abort_after):
        finished, lines = 0, 0
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            if abort_after == 0:
                return "aborted"
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    assert finished == body["n"], f"{finished} of {body['n']} choices ended"
                    return "finished"
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                finished += sum(choice["finish_reason"] is not None for choice in chunk["choices"])
                lines += 1
                if lines == abort_after:
                    return "aborted"
        raise AssertionError("the stream ended without [DONE]")


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_soak(count, tiny_model_dir, tiny_chain, serve_engine):
    llm = LLM(
        tiny_model_dir,
        tiny_chain,
        (0, 2, 3),
        device="cpu",
        dtype="float32",
        max_num_seqs=16,
        kv_cache_memory=0.001,
    )
    server = serve_engine(llm.engine, max_num_seqs=16)
    soak = Soak(server.url, count)
    asyncio.run(soak.run(64))
    outcomes = soak.outcomes
    assert outcomes["all"] == count == outcomes["finished"] + outcomes["aborted"] + outcomes["refused"]
    assert outcomes["aborted"] > count / 6 and outcomes["refused"] > count / 30
    server.wait_idle()
    llm.engine.check_integrity()
    stats = llm.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_preemptions > 0  # the cache is small enough to matter
    assert server.http.get("/health").status_code == 200
    assert server.chat(max_tokens=2).status_code == 200
    settled = [memory for number, memory in soak.memory if number >= 500]
    if settled:
        assert max(settled) < 1.05 * settled[0], [memory >> 20 for memory in settled]

"""An engine behind HTTP, as `sleb bench peers` drives it: any server that streams completions, ours too."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from sleb.benchmarks.engines import RUN_SECONDS, PeerError, PeerTest, Program, peak_memory_of
from sleb.benchmarks.load.client import LoadClient
from sleb.benchmarks.load.events import Outcome
from sleb.benchmarks.load.server import Dialect, Server
from sleb.benchmarks.prompts import UNCOUNTED, Lengths, RandomPrompts, Vocabulary, calibrate
from sleb.client.connection import ClientError

_START_SECONDS = 600.0
# Nothing of a model's own generation config, whose penalties would cost time; llama.cpp's server keeps no prompt.
_SERVER_FIELDS = {"repetition_penalty": 1}


class ServerEngine:
    """A server behind its address, asked for streamed completions of random words.

    model: its id; None: the server's first. program: the one that was started for it, ours, which has an id a depth.
    """

    def __init__(
        self,
        name: str,
        url: str,
        seed: int,
        *,
        model: str | None = None,
        depths: Sequence[int] = (0,),
        api_key: str | None = None,
        salt: str = "",
        program: Program | None = None,
    ) -> None:
        """Asks what it is and what it takes. Raises PeerError."""
        self.name, self._program, self._seed, self._salt = name, program, seed, salt
        self.pid: int | None = None if program is None else program.pid
        self._runner = asyncio.Runner()
        self._dialects: dict[int, Dialect] = {}
        self._vocabulary: Vocabulary = UNCOUNTED
        self._sources: dict[PeerTest, RandomPrompts] = {}
        try:
            self._client = LoadClient(url, api_key, RUN_SECONDS)
            self._server = Server(self._client)
            self.facts: Mapping[str, Any] = self._runner.run(self._find(model, depths))
        except BaseException as error:
            self.close()
            if isinstance(error, ClientError):
                raise PeerError(f"{name}: {error}") from None
            raise
        self.notes = [f"{name}: {each}" for each in self._server.notices]

    async def _find(self, model: str | None, depths: Sequence[int]) -> dict[str, Any]:
        server = self._server
        chosen = await server.choose_models([] if model is None else [model])
        if len(depths) > 1 or depths[0]:  # ours, whose ids are in the order of its depths
            chosen = server.listed[: len(depths)]
        facts = await server.describe()
        more = {"cache_prompt": False} if facts["software"] == "llamacpp" else {}
        for depth, model in zip(depths, chosen, strict=True):
            self._dialects[depth] = await server.negotiate("completions", model, {**_SERVER_FIELDS, **more})
        counted = await calibrate(partial(server.count_tokens, next(iter(self._dialects.values()))))
        self._vocabulary = counted or UNCOUNTED
        return facts

    def generate(self, test: PeerTest, turn: int, depth: int = 0) -> float:
        """Every run has new prompts, since a server may remember; all servers get the same."""
        if self._program is not None:
            self._program.signal(signal.SIGCONT)
        try:
            return median(self._runner.run(self._run(test, turn, run, depth)) for run in range(test.num_runs))
        finally:
            if self._program is not None:
                self._program.signal(signal.SIGSTOP)

    async def _run(self, test: PeerTest, turn: int, run: int, depth: int) -> float:
        if test not in self._sources:
            lengths = Lengths(test.prompt_tokens, test.output_tokens)
            self._sources[test] = RandomPrompts(lengths, self._vocabulary, self._seed, f"{self._salt} {test}")
        dialect, first = self._dialects[depth], (turn * test.num_runs + run) * test.batch
        prompts = [self._sources[test].make(first + number) for number in range(test.batch)]
        outcomes = [Outcome(dialect.model, test.prompt_tokens, test.output_tokens) for _ in prompts]
        bodies = [dialect.body(prompt.content, test.output_tokens) for prompt in prompts]
        sending = [
            self._client.stream(dialect.path, body, outcome)
            for body, outcome in zip(bodies, outcomes, strict=True)
        ]
        await asyncio.gather(*sending)
        for outcome in outcomes:
            if outcome.error:
                raise PeerError(f"{self.name}: {outcome.error}")
            cut = outcome.num_output_tokens if "completion_tokens" in outcome.usage else test.output_tokens
            if cut != test.output_tokens or outcome.finish_reason not in ("length", ""):
                raise PeerError(
                    f"{self.name} ended an answer after {outcome.num_output_tokens} of {test.output_tokens} tokens: "
                    "it does not ignore the end of a sequence"
                )
        began = min(outcome.start for outcome in outcomes)
        rate = test.rate(max(each.chunk_times[-1] for each in outcomes) - began, outcomes[0].first_seconds)
        return rate * outcomes[0].num_prompt_tokens / test.prompt_tokens if test.kind == "prompt" else rate

    def peak_bytes(self) -> int | None:
        return None if self.pid is None else peak_memory_of(self.pid)

    def close(self) -> None:
        """A server that ran already goes on."""
        self._runner.close()
        if self._program is not None:
            self._program.close()


def wait_for_server(program: Program, url: str) -> None:
    """Until it answers. Raises PeerError if it ends instead."""

    async def answers() -> bool:
        client = LoadClient(url, None, 5.0)
        try:
            return (await client.ask("GET", "models")).status == 200
        except ClientError:
            return False
        finally:
            client.close()

    deadline = time.monotonic() + _START_SECONDS
    while not asyncio.run(answers()):
        if program.process.poll() is not None:
            raise program.failure("ended before it could be reached")
        if time.monotonic() > deadline:
            raise program.failure("could not be reached in time")
        time.sleep(0.2)

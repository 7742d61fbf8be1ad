"""An engine behind HTTP, as `sleb bench peers` drives it: any server that streams completions, ours too."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import httpx

from sleb.benchmarks.engines import RUN_SECONDS, Engine, PeerError, rate
from sleb.benchmarks.load.client import LoadClient, Outcome
from sleb.benchmarks.load.server import Dialect, Server
from sleb.benchmarks.prompts import UNCOUNTED, Lengths, RandomPrompts, Vocabulary, calibrate
from sleb.benchmarks.workloads import Workload
from sleb.client.connection import ClientError

_START_SECONDS = 600.0
# Nothing of a model's own generation config, whose penalties would cost time; of llama.cpp no prompt kept, no sampling.
_SERVER_FIELDS = {"repetition_penalty": 1}
_LLAMA_CPP_FIELDS = {"cache_prompt": False, "samplers": ["top_k"], "top_k": 1}


class ServerEngine(Engine):
    """A server behind its address, asked for streamed completions of random words: new ones in every run.

    model: its id; None: the server's first. command: starts it; without one it runs already, and goes on.
    depths: of ours, which has an id a depth. salt: of the words, the same for all servers of a run.
    """

    def __init__(
        self,
        name: str,
        url: str,
        *,
        model: str | None = None,
        depths: Sequence[int] = (0,),
        api_key: str | None = None,
        salt: str = "",
        command: Sequence[object] = (),
    ) -> None:
        """Asks what it is and what it takes. Raises PeerError."""
        self._url, self._key, self._salt = url, api_key, salt
        self._model, self._depths = model, depths
        self._dialects: dict[int, Dialect] = {}
        self._vocabulary: Vocabulary = UNCOUNTED
        self._runner = asyncio.Runner()
        super().__init__(name, command)

    def _load(self) -> Mapping[str, Any]:
        deadline = time.monotonic() + _START_SECONDS
        while self._process is not None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self._url}/health", trust_env=False).status_code == 200:
                    break
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self.failure()
            time.sleep(0.2)
        try:
            return self._runner.run(self._find())
        except ClientError as error:
            raise PeerError(f"{self.name}: {error}") from None

    async def _find(self) -> dict[str, Any]:
        self._client = LoadClient(self._url, self._key, RUN_SECONDS)
        server = Server(self._client)
        chosen = await server.choose_models([] if self._model is None else [self._model])
        if any(self._depths):  # ours, whose ids are in the order of its depths
            chosen = server.listed[: len(self._depths)]
        facts = await server.describe()
        more = _LLAMA_CPP_FIELDS if facts["software"] == "llamacpp" else {}
        for depth, model in zip(self._depths, chosen, strict=True):
            self._dialects[depth] = await server.negotiate("completions", model, {**_SERVER_FIELDS, **more})
        counted = await calibrate(partial(server.count_tokens, next(iter(self._dialects.values()))))
        self._vocabulary = counted or UNCOUNTED
        self.notes = [f"{self.name}: {each}" for each in server.notices]
        return facts

    def _run(self, test: Workload, number: int, depth: int) -> float:
        return self._runner.run(self._stream(test, number, self._dialects[depth]))

    async def _stream(self, test: Workload, number: int, dialect: Dialect) -> float:
        lengths = Lengths(test.prompt_tokens, test.output_tokens)
        source = RandomPrompts(lengths, self._vocabulary, 0, f"{self._salt} {test}")
        outcomes, sending = [], []
        for place in range(test.batch):
            outcomes.append(Outcome(dialect.model, test.prompt_tokens, test.output_tokens))
            body = dialect.body(source.make(number * test.batch + place).text, test.output_tokens)
            sending.append(self._client.stream(dialect.path, body, outcomes[-1]))
        await asyncio.gather(*sending)
        for outcome in outcomes:
            if outcome.error:
                raise PeerError(f"{self.name}: {outcome.error}")
            if outcome.finish_reason not in ("length", ""):
                raise PeerError(
                    f"{self.name} ended an answer after {outcome.num_output_tokens} of {test.output_tokens} tokens: "
                    "it does not ignore the end of a sequence"
                )
        seconds = max(each.chunk_times[-1] for each in outcomes) - min(each.start for each in outcomes)
        found = rate(test, seconds, outcomes[0].first_seconds)
        return found * outcomes[0].num_prompt_tokens / test.prompt_tokens if test.test == "prompt" else found

    def close(self) -> None:
        """A server that ran already goes on."""
        self._runner.close()
        super().close()

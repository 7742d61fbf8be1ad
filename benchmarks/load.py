"""Load: requests sent by so many clients that each wait for their answer, or at random times that wait for none."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from statistics import median

from sleb.benchmarks.load_client import LoadClient
from sleb.benchmarks.load_events import Outcome

_PROGRESS_SECONDS = 0.5
_RECENT = 500  # answers whose first tokens the progress counts


@dataclass(frozen=True)
class LoadRequest:
    """A request ready to be sent. body: JSON; prompt_tokens: asked for, 0 if unknown; output_tokens: asked for."""

    model: str
    body: bytes
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class LoadProgress:
    """Where a load stands. tokens_per_second: chunks with text a second so far; first_seconds: median TTFT so far."""

    num_done: int
    num_failed: int
    num_running: int
    tokens_per_second: float
    first_seconds: float | None


OnLoad = Callable[[LoadProgress], None]


@dataclass(frozen=True)
class LoadResult:
    """outcomes: of requests that ended, in the order of their sending. duration: seconds until the last one's end.

    cpu_seconds: what this process computed meanwhile. interrupted: whether Ctrl-C ended it.
    """

    outcomes: list[Outcome]
    duration: float
    cpu_seconds: float
    interrupted: bool


def arrival_times(rate: float, seed: str) -> Iterator[float]:
    """Seconds from the start at which requests of a Poisson process come, `rate` a second: without end, and ascending.

    The gaps are independent and exponential with the mean 1 / rate; at the rate inf all come at once.
    """
    rng, now = Random(seed), 0.0
    while True:
        now += 0.0 if math.isinf(rate) else rng.expovariate(rate)
        yield now


class Load:
    """One load on a server.

    seconds: in which requests begin, those begun are waited for; None: until none is left.
    """

    def __init__(self, client: LoadClient, seconds: float | None = None) -> None:
        self._client = client
        self._deadline = math.inf if seconds is None else seconds
        self._outcomes: list[Outcome] = []
        self._num_running = self._num_failed = 0
        self._recent: list[float] = []

    async def closed(self, requests: Iterable[LoadRequest], concurrency: int, on_load: OnLoad) -> LoadResult:
        """`concurrency` requests at once; each is followed by the next when it ends."""
        shared = iter(requests)

        async def work() -> None:
            for request in shared:
                await self._send(request)
                if time.perf_counter() - self._started >= self._deadline:
                    return

        async def work_all() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())

        return await self._run(work_all, on_load)

    async def open(
        self,
        requests: Iterable[LoadRequest],
        arrivals: Iterable[float],
        max_concurrency: int | None,
        on_load: OnLoad,
    ) -> LoadResult:
        """Each request at its time, seconds from the start; at most `max_concurrency` open, others wait their turn."""
        slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None

        async def work_all() -> None:
            async with asyncio.TaskGroup() as group:
                for due, request in zip(arrivals, requests, strict=False):
                    if due >= self._deadline:
                        return
                    await asyncio.sleep(max(0.0, self._started + due - time.perf_counter()))
                    group.create_task(self._send(request, self._started + due, slots))

        return await self._run(work_all, on_load)

    async def _run(self, work_all: Callable[[], Awaitable[None]], on_load: OnLoad) -> LoadResult:
        """Ctrl-C, which cancels, leaves what is complete."""
        self._started, cpu_started = time.perf_counter(), time.process_time()
        interrupted = False
        async with self._ticking(on_load):
            try:
                await work_all()
            except asyncio.CancelledError:
                interrupted = True
        now = time.perf_counter()
        outcomes = sorted(self._outcomes, key=lambda outcome: outcome.start)
        return LoadResult(outcomes, now - self._started, time.process_time() - cpu_started, interrupted)

    async def _send(
        self, request: LoadRequest, due: float | None = None, slots: asyncio.Semaphore | None = None
    ) -> None:
        due = time.perf_counter() if due is None else due
        outcome = Outcome(request.model, request.prompt_tokens, request.output_tokens, due)
        if slots is not None:
            async with slots:
                await self._stream(request, outcome)
        else:
            await self._stream(request, outcome)

    async def _stream(self, request: LoadRequest, outcome: Outcome) -> None:
        self._num_running += 1
        try:
            await self._client.stream(request.body, outcome)
        finally:
            self._num_running -= 1
        self._outcomes.append(outcome)
        if outcome.error:
            self._num_failed += 1
        else:
            self._recent.append(outcome.first_seconds)

    @asynccontextmanager
    async def _ticking(self, on_load: OnLoad) -> AsyncIterator[None]:
        """Tells the progress twice a second: more often it would take its time from the client."""
        num_before = self._client.num_chunks

        async def tick() -> None:
            while True:
                await asyncio.sleep(_PROGRESS_SECONDS)
                on_load(self._progress(num_before))

        ticker = asyncio.create_task(tick())
        try:
            yield
        finally:
            ticker.cancel()

    def _progress(self, num_before: int) -> LoadProgress:
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        return LoadProgress(
            len(self._outcomes),
            self._num_failed,
            self._num_running,
            (self._client.num_chunks - num_before) / elapsed,
            median(self._recent[-_RECENT:]) if self._recent else None,
        )

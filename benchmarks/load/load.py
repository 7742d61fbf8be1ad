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

from sleb.benchmarks.load.client import LoadClient
from sleb.benchmarks.load.events import Outcome

_PROGRESS_SECONDS = 0.5
_RECENT = 500  # answers whose first tokens the progress counts
_LEAST_TIMEOUTS = 3  # in a row, before a server is taken to stall


@dataclass(frozen=True)
class LoadRequest:
    """A request ready to be sent to `path`. body: JSON; the tokens are those asked for, 0 if unknown."""

    path: str
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

    cpu_seconds: what this process computed meanwhile. interrupted: whether Ctrl-C ended it. num_unsent: requests that
    were due but had no turn within the seconds of the load. has_stalled: whether it ended early, since nothing came.
    """

    outcomes: list[Outcome]
    duration: float
    cpu_seconds: float = 0.0
    interrupted: bool = False
    num_unsent: int = 0
    has_stalled: bool = False


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

    seconds: in which requests begin, those begun are waited for; None: until none is left. Where only so many may be
    open, it ends when as many in a row, and no fewer than three, had no answer in time: a server that stalls would
    else hold it for the time of each.
    """

    def __init__(self, client: LoadClient, seconds: float | None = None) -> None:
        self._client = client
        self._deadline = math.inf if seconds is None else seconds
        self._outcomes: list[Outcome] = []
        self._num_running = self._num_failed = self._num_unsent = 0
        self._most_timeouts = math.inf
        self._num_timeouts = 0  # since the last that was none
        self._has_stalled = False
        self._recent: list[float] = []

    async def closed(self, requests: Iterable[LoadRequest], concurrency: int, on_load: OnLoad) -> LoadResult:
        """`concurrency` requests at once; each is followed by the next when it ends."""
        self._most_timeouts = max(_LEAST_TIMEOUTS, concurrency)
        shared = iter(requests)

        async def work() -> None:
            for request in shared:
                await self._send(request)
                if self._is_over() or self._has_stalled:
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
        slots = None
        if max_concurrency is not None:
            slots = asyncio.Semaphore(max_concurrency)
            self._most_timeouts = max(_LEAST_TIMEOUTS, max_concurrency)

        async def work_all() -> None:
            async with asyncio.TaskGroup() as group:
                for due, request in zip(arrivals, requests, strict=False):
                    if due >= self._deadline or self._has_stalled:
                        return
                    await asyncio.sleep(max(0.0, self._started + due - time.perf_counter()))
                    group.create_task(self._send(request, self._started + due, slots))

        return await self._run(work_all, on_load)

    def _is_over(self) -> bool:
        return time.perf_counter() - self._started >= self._deadline

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
        return LoadResult(
            outcomes,
            now - self._started,
            time.process_time() - cpu_started,
            interrupted,
            self._num_unsent,
            self._has_stalled,
        )

    async def _send(
        self, request: LoadRequest, due: float | None = None, slots: asyncio.Semaphore | None = None
    ) -> None:
        due = time.perf_counter() if due is None else due
        outcome = Outcome(request.model, request.prompt_tokens, request.output_tokens, due)
        if slots is None:
            await self._stream(request, outcome)
            return
        async with slots:
            if self._has_stalled:
                return
            if self._is_over():  # it was due in time, but the others took all turns
                self._num_unsent += 1
            else:
                await self._stream(request, outcome)

    async def _stream(self, request: LoadRequest, outcome: Outcome) -> None:
        self._num_running += 1
        try:
            await self._client.stream(request.path, request.body, outcome)
        finally:
            self._num_running -= 1
        self._outcomes.append(outcome)
        self._num_timeouts = self._num_timeouts + 1 if outcome.timed_out else 0
        self._has_stalled = self._has_stalled or self._num_timeouts >= self._most_timeouts
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

"""Load: requests sent by so many clients that each wait for their answer, or at random times that wait for none."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from sleb.benchmarks.load.client import LoadClient, Outcome

_LATENCIES = ("TTFT p50", "TPOT p50", "TTFT p99", "TPOT p99", "ITL p99", "latency p50", "latency p99")
_PROGRESS_SECONDS = 0.5  # more often it would take its time from the client
# Path, body (JSON), and the outcome that it fills in.
Request = tuple[str, bytes, Outcome]
# How many requests are done, and how the load goes, in words.
OnLoad = Callable[[int, str], None]


@dataclass(frozen=True)
class LoadResult:
    """outcomes: of requests that ended, in the order of their sending. duration: seconds until the last one's end.

    cpu_seconds: what this process computed meanwhile. interrupted: whether Ctrl-C ended it. has_stalled: whether the
    server answered no more at its end.
    """

    outcomes: list[Outcome]
    duration: float
    cpu_seconds: float = 0.0
    interrupted: bool = False
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
    """One load on a server, until no request is left."""

    def __init__(self, client: LoadClient) -> None:
        self._client = client
        self._sent: list[Outcome] = []
        self._outcomes: list[Outcome] = []  # as they ended

    async def closed(self, requests: Iterable[Request], concurrency: int, on_load: OnLoad) -> LoadResult:
        """`concurrency` requests at once; each is followed by the next when it ends.

        It ends when as many in a row, and no fewer than three, had no answer in time: a server that stalls would else
        hold it for the time of each.
        """
        shared, enough = iter(requests), max(3, concurrency)

        async def work() -> None:
            for request in shared:
                await self._send(request)
                if len(self._outcomes) >= enough and self._has_stalled(enough):
                    return

        async def work_all() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(work())

        return await self._run(work_all, on_load, enough)

    async def open(
        self, requests: Iterable[Request], arrivals: Iterable[float], on_load: OnLoad
    ) -> LoadResult:
        """Each request at its time, seconds from the start, whatever becomes of the others."""

        async def work_all() -> None:
            async with asyncio.TaskGroup() as group:
                for due, request in zip(arrivals, requests, strict=False):
                    await asyncio.sleep(max(0.0, self._started + due - time.perf_counter()))
                    group.create_task(self._send(request))

        return await self._run(work_all, on_load, sys.maxsize)  # it stalls where nothing came at all

    async def _run(self, work_all: Callable[[], Awaitable[None]], on_load: OnLoad, enough: int) -> LoadResult:
        """Ctrl-C, which cancels, leaves what is complete."""
        self._started, cpu_started, interrupted = time.perf_counter(), time.process_time(), False
        ticker = asyncio.create_task(self._tick(on_load))
        try:
            await work_all()
        except asyncio.CancelledError:
            interrupted = True
        finally:
            ticker.cancel()
        seconds, cpu_seconds = time.perf_counter() - self._started, time.process_time() - cpu_started
        outcomes = sorted(self._outcomes, key=lambda outcome: outcome.start)
        has_stalled = not interrupted and self._has_stalled(enough)
        return LoadResult(outcomes, seconds, cpu_seconds, interrupted, has_stalled)

    def _has_stalled(self, enough: int) -> bool:
        """Whether the last so many had no answer in time."""
        return bool(self._outcomes) and all(each.timed_out for each in self._outcomes[-enough:])

    async def _send(self, request: Request) -> None:
        path, body, outcome = request
        self._sent.append(outcome)
        await self._client.stream(path, body, outcome)
        self._outcomes.append(outcome)

    async def _tick(self, on_load: OnLoad) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS)
            rate = sum(len(each.chunk_times) for each in self._sent) / (time.perf_counter() - self._started)
            num_running = len(self._sent) - len(self._outcomes)
            on_load(len(self._outcomes), f"{num_running} running, {rate:,.0f} tokens/s")


def measure(
    outcomes: Sequence[Outcome], duration: float, goodput: Mapping[str, float] | None = None
) -> dict[str, float | None]:
    """Figures by metric, as `vllm bench serve` defines them; None for what has no value, as the latency of no answer.

    TTFT: from the sending of a request to its first chunk with text. ITL: between chunks with text. Latency: from the
    sending to the end of the answer. TPOT: (latency − TTFT) / (tokens − 1). Rates are of the whole duration, the last
    answers' included. Percentiles are interpolated as numpy does it. goodput: limits in milliseconds.
    """
    whole = [outcome for outcome in outcomes if not outcome.error]
    seconds = {
        "TTFT": [outcome.first_seconds for outcome in whole],
        "TPOT": [each.token_seconds for each in whole if each.token_seconds is not None],
        "ITL": [gap for outcome in whole for gap in outcome.gaps],
        "latency": [outcome.seconds for outcome in whole],
    }
    figures: dict[str, float | None] = {
        "tokens/s": sum(outcome.num_output_tokens for outcome in whole) / duration,
        "requests/s": len(whole) / duration,
    }
    for each in _LATENCIES:
        name, percent = each.split(" p")
        found = float(np.percentile(seconds[name], int(percent))) * 1000 if seconds[name] else None
        figures[f"{each} ms"] = found
    good = sum(is_good(each, goodput) for each in whole) / duration if goodput else None
    return figures | {"goodput requests/s": good}


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many requests failed by reason, the most frequent first."""
    return dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common())


def is_good(outcome: Outcome, goodput: Mapping[str, float]) -> bool:
    """Whether an answer that came whole keeps to all limits, in milliseconds."""
    tpot = outcome.token_seconds or 0.0
    seconds = {"ttft": outcome.first_seconds, "tpot": tpot, "e2el": outcome.seconds}
    return all(seconds[name] * 1000 <= limit for name, limit in goodput.items())

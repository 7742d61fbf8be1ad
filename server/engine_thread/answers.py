"""What one HTTP request hands to the engine, and where its answers arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sleb.engine.depth_policy import Choice
from sleb.engine.outputs import StepOutput
from sleb.engine.requests.sampling_params import SamplingParams


@dataclass(frozen=True)
class Job:
    """One answer to compute: a prompt, how to sample (n is 1) and the depth that serves it.

    conversation: see `conversation_keys`; given where the server chooses the depth, for all jobs of a request.
    """

    prompt_token_ids: Sequence[int]
    params: SamplingParams
    depth: int
    conversation: tuple[bytes, ...] | None = None


class Answers:
    """What the engine makes of the jobs of one HTTP request. Belongs to the event loop.

    Whoever holds it must call `close`, which aborts what is unfinished.
    """

    def __init__(self, request_ids: list[str], abort: Callable[[Answers], None]) -> None:
        self.request_ids = request_ids
        self._abort = abort
        self._index = {request_id: index for index, request_id in enumerate(request_ids)}
        self._unfinished = set(request_ids)
        self._arrived: list[tuple[int, StepOutput]] = []
        self._error: Exception | None = None
        self.depth: Choice | None = None  # that was chosen, once they are accepted
        self._accepted = False
        self._wake = asyncio.Event()
        self._on_arrival: Callable[[], bool] | None = None

    @property
    def unfinished(self) -> frozenset[str]:
        """Engine request ids whose last output has not arrived."""
        return frozenset(self._unfinished)

    async def accepted(self) -> None:
        """Waits until the engine has taken all jobs. Raises RequestError for the first one that it refuses."""
        while not self._accepted:
            if self._error is not None:
                raise self._error
            await self._wake.wait()
            self._wake.clear()

    async def next(self, timeout: float | None = None) -> list[tuple[int, StepOutput]]:
        """(job index, output) pairs in order: all that have arrived, after waiting for the first.

        Empty after `timeout` seconds of silence, and at once when all jobs are finished. Raises as `take` does.
        """
        await self.wait(timeout)
        return self.take()

    async def wait(self, timeout: float | None = None, on_arrival: Callable[[], bool] | None = None) -> None:
        """Waits until `take` has something to give or to raise, all jobs are finished, or `timeout` seconds are over.

        on_arrival: called when increments come, in place of whoever waits: False lets him sleep on.
        """
        if self._arrived or self._error is not None or not self._unfinished:
            return
        self._wake.clear()
        self._on_arrival = on_arrival
        timer = None if timeout is None else asyncio.get_running_loop().call_later(timeout, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            self._on_arrival = None
            if timer is not None:
                timer.cancel()

    def take(self) -> list[tuple[int, StepOutput]]:
        """(job index, output) pairs in order: those that have arrived since it was called last.

        Raises EngineDeadError, or what `fail` was given, once everything that arrived before is taken.
        """
        if not self._arrived and self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        return arrived

    def accept(self, depth: Choice | None = None) -> None:
        """Called for the engine thread: all jobs are queued, at `depth` where the server chose it."""
        self.depth = depth
        self._accepted = True
        self._wake.set()

    def put(self, output: StepOutput) -> None:
        """Called for the engine thread: an increment; `notify` follows when all of a step are there."""
        self._arrived.append((self._index[output.request_id], output))
        if output.finish_reason is not None:
            self._unfinished.discard(output.request_id)

    def notify(self) -> None:
        """Called for the engine thread: what a step brought has been put."""
        if self._on_arrival is None or self._on_arrival():
            self._wake.set()

    def fail(self, error: Exception) -> None:
        """Ends the answers with an error, after what has arrived already."""
        self._error = self._error or error
        self._wake.set()

    def close(self) -> None:
        """Aborts what is unfinished; may be called again."""
        self._abort(self)
        self._unfinished.clear()
        self._wake.set()

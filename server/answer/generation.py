"""One HTTP request's way through the engine: prompts × n jobs in, increments, usage and timings out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sleb.engine.outputs import StepOutput
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import InvalidOutputError, RequestError
from sleb.server.answer.timings import Span, llama_timings, phases, request_metrics
from sleb.server.context import Selection, ServerContext
from sleb.server.engine_thread.answers import Answers, Job
from sleb.server.errors import ApiError
from sleb.server.exchange import EXCHANGE

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that they were made of if it was text."""

    token_ids: list[int]
    text: str | None = None

    def cut(self, limit: int | None, max_tokens: int | None, max_model_len: int) -> Prompt:
        """Its last `limit` tokens; None: all, -1: as many as fit the context beside an answer of `max_tokens`."""
        if limit == -1:
            room = max_tokens if max_tokens and 0 < max_tokens < max_model_len else 1
            limit = max_model_len - room
        if limit is None or len(self.token_ids) <= limit:
            return self
        return Prompt(self.token_ids[-limit:])


class Generation:
    """All answers that one HTTP request asked for: choice number = prompt number × n + sample number.

    `start`, then `pieces` once, then `close` in any case.

    Attributes:
        tier, model: what answers, and what the answer says of its model; where the server chooses the depth, known when
            it has started.
        chosen: whether the server chooses the depth. degraded: whether it chose a deeper cut than the shallowest.
    """

    def __init__(
        self,
        context: ServerContext,
        request_id: str,
        selection: Selection,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        conversation: tuple[bytes, ...] = (),
    ) -> None:
        """conversation: see `conversation_keys`."""
        self.tier, self.model = selection.tier, selection.model
        self.chosen, self.degraded = selection.is_auto, False
        self._conversation = conversation if selection.is_auto else None
        self.prompts = prompts
        self.request_id = request_id
        self.created = int(time.time())
        self._context = context
        self._params = params
        self._answers: Answers | None = None
        self._last: dict[int, StepOutput] = {}
        self._last_time: float | None = None  # when the newest of them came
        self._num_finished = 0
        self._arrival = time.monotonic()
        self._arrival_time = time.time()
        self._metrics = context.metrics.tier(self.tier)
        self._token_times: dict[str, float] = {}  # by the engine's request id
        self._timer: asyncio.TimerHandle | None = None
        self._outcome = "disconnected"
        self.cancelled = False
        self._failed = False
        self._closed = False

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self._params.n

    @property
    def finished(self) -> bool:
        """Whether nothing more comes: every choice has its last piece, or the request was cancelled."""
        return self.cancelled or self._num_finished == self.num_choices

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice // self._params.n]

    async def start(self) -> None:
        """Hands the jobs to the engine. Raises what `AsyncEngine.submit` raises, ApiError 504 if it takes too long."""
        n = self._params.n
        each = [self._params.for_choice(0)] * n  # without a seed they are all alike, and each costs a check
        if self._params.seed is not None:
            each = [self._params.for_choice(sample) for sample in range(n)]
        depth, conversation = self.tier.depth, self._conversation
        jobs = [
            Job(prompt.token_ids, params, depth, conversation) for prompt in self.prompts for params in each
        ]
        limit = self._context.options.request_timeout
        try:
            async with asyncio.timeout(limit):
                await self._submit(jobs)
        except TimeoutError:
            raise self._timeout_error() from None
        if limit is not None:
            spent = time.monotonic() - self._arrival
            self._timer = asyncio.get_running_loop().call_later(limit - spent, self._time_out)

    async def _submit(self, jobs: Sequence[Job]) -> None:
        """As the engine's own `submit`; the answers are known before increments of them may come."""
        answers = self._answers = self._context.engine.open(jobs, self._observe)
        try:
            await answers.accepted()
        except BaseException:
            self._answers = None
            answers.close()
            raise
        self._settle(answers)

    def _settle(self, answers: Answers) -> None:
        """Takes over the depth that the server chose."""
        choice = answers.depth
        if choice is not None and self._conversation is not None:
            self._conversation = None
            self.tier, self.degraded = self._context.engine.model.tier(choice.depth), choice.degraded
            self.model = self.tier.id
            self._metrics = self._context.metrics.tier(self.tier)

    @property
    def headers(self) -> dict[str, str]:
        """What an answer tells of its depth."""
        told = {"X-Sleb-Depth": str(self.tier.depth)}
        return told | {"X-Sleb-Degraded": "queue"} if self.degraded else told

    def _time_out(self) -> None:
        """Ends what is unfinished at once, whether or not the client reads; the error follows what has come already."""
        if self._answers is not None and self._answers.unfinished:
            self._answers.fail(self._timeout_error())
            self._context.engine.abort(self._answers)

    def _timeout_error(self) -> ApiError:
        limit = self._context.options.request_timeout
        return ApiError(
            504,
            f"the request took longer than {limit:g} seconds, which this server allows (--request-timeout)",
            type="server_error",
            code="timeout",
        )

    def _observe(self, output: StepOutput, now: float) -> None:
        """Counts an increment as it comes from the engine."""
        if self._conversation is not None and self._answers is not None:
            self._settle(self._answers)
        last = self._token_times.get(output.request_id)
        self._token_times[output.request_id] = now
        self._metrics.observe(output, self._arrival, last, now)

    async def pieces(self, read: Callable[[int, StepOutput], T]) -> AsyncIterator[list[T]]:
        """What `read` makes of each choice's increments as they come; an empty list is a spell of silence.

        When `read` is called, `usage` counts up to its increment. Raises EngineDeadError, ShuttingDownError,
        or ApiError for an answer that the engine gave up.
        """
        ended = False
        while not ended:
            await self.wait(self._context.options.keep_alive_seconds)
            pieces = self.take(read)
            ended = self.finished  # as whoever takes the pieces sees it
            yield pieces

    async def wait(self, timeout: float, on_arrival: Callable[[], bool] | None = None) -> None:
        """Waits for increments; see `Answers.wait`."""
        assert self._answers is not None
        await self._answers.wait(timeout, on_arrival)

    def take(self, read: Callable[[int, StepOutput], T]) -> list[T]:
        """What `read` makes of the increments that are there. Raises as `pieces` does."""
        assert self._answers is not None
        try:
            return [self._record(choice, output, read) for choice, output in self._answers.take()]
        except Exception as error:
            self._outcome = getattr(error, "code", None) or "error"
            self._failed = True
            raise

    def _record(self, choice: int, output: StepOutput, read: Callable[[int, StepOutput], T]) -> T:
        if output.finish_reason == "error":
            if isinstance(output.failure, InvalidOutputError | RequestError):
                raise output.failure
            raise ApiError(500, "the engine could not finish this answer", type="server_error")
        self._last[choice] = output
        self._last_time = time.monotonic()
        self._num_finished += output.finish_reason is not None
        return read(choice, output)

    def usage(self) -> dict[str, Any]:
        """Token counts so far; a prompt counts once, however many samples it has."""
        firsts = [self._last[choice] for choice in self._last if choice % self._params.n == 0]
        num_prompt = sum(len(prompt.token_ids) for prompt in self.prompts)
        num_output = sum(output.num_output_tokens for output in self._last.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in firsts)},
        }

    def timings(self) -> dict[str, float]:
        """See `timings.llama_timings`."""
        return llama_timings(self.usage(), len(self._last), self._span())

    def metrics(self) -> dict[str, float | None]:
        """See `timings.request_metrics`."""
        return request_metrics(self.usage(), len(self._last), self._span(), self._arrival, self._arrival_time)

    def _span(self) -> Span:
        return Span.of([output.timings for output in self._last.values()], self._arrival, self._last_time)

    def cancel(self) -> None:
        """Ends the request with what there is, as if it had been finished."""
        if not self.finished and not self._closed:
            self.cancelled, self._outcome = True, "cancelled"
            if self._answers is not None:
                self._metrics.num_aborted += len(self._answers.unfinished)
                self._answers.close()

    def close(self) -> None:
        """Aborts what is unfinished and tells the exchange what was made; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._answers is None:
            return
        if not self._failed:
            self._metrics.num_aborted += len(self._answers.unfinished)
        exchange = EXCHANGE.get()
        if exchange is not None:
            exchange.answer = self._facts()
            if self.finished:
                exchange.phases = phases(self._span(), self._arrival)
        self._answers.close()

    def _facts(self) -> dict[str, Any]:
        """What the log tells of all answers."""
        usage = self.usage()
        first_tokens = [
            each for output in self._last.values() if (each := output.timings.first_token) is not None
        ]
        reasons = sorted({output.finish_reason or self._outcome for output in self._last.values()})
        return {
            "model": self.tier.id,
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "generated_tokens": usage["completion_tokens"],
            "first_token_ms": round((min(first_tokens) - self._arrival) * 1e3, 3) if first_tokens else None,
            "tokens_per_second": round(self.timings()["predicted_per_second"], 3),
            "reason": ("+".join(reasons) or self._outcome) if self.finished else self._outcome,
        }

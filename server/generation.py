"""One HTTP request's way through the engine: prompts × n jobs in, increments, usage and timings out."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from sleb.engine.outputs import StepOutput, Timings
from sleb.engine.sampling_params import SamplingParams
from sleb.server.context import ServerContext
from sleb.server.errors import ApiError
from sleb.server.jobs import Answers, Job

if TYPE_CHECKING:
    from sleb.engine.request import Tier

logger = logging.getLogger("sleb.server")

T = TypeVar("T")

LARGE_TEXT = 4096  # characters from which on tokenizing leaves the event loop for a thread


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the text that they were made of if it was text."""

    token_ids: list[int]
    text: str | None = None


class Generation:
    """All answers that one HTTP request asked for: choice number = prompt number × n + sample number.

    `start`, then `pieces` once, then `close` in any case.
    """

    def __init__(
        self,
        context: ServerContext,
        request_id: str,
        tier: Tier,
        prompts: Sequence[Prompt],
        params: SamplingParams,
    ) -> None:
        self.tier = tier
        self.prompts = prompts
        self.request_id = request_id
        self.created = int(time.time())
        self._context = context
        self._params = params
        self._answers: Answers | None = None
        self._last: dict[int, StepOutput] = {}
        self._num_finished = 0
        self._arrival = time.monotonic()
        self._outcome = "disconnected"
        self._closed = False

    @staticmethod
    def new_id(prefix: str) -> str:
        """An id for an answer, such as "chatcmpl-…"."""
        return f"{prefix}-{uuid.uuid4().hex}"

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self._params.n

    @property
    def finished(self) -> bool:
        """Whether every choice has its last piece."""
        return self._num_finished == self.num_choices

    def prompt_of(self, choice: int) -> Prompt:
        return self.prompts[choice // self._params.n]

    async def start(self) -> None:
        """Hands the jobs to the engine. Raises what `AsyncEngine.submit` raises."""
        jobs = [
            Job(prompt.token_ids, self._params.for_choice(sample), self.tier.depth)
            for prompt in self.prompts
            for sample in range(self._params.n)
        ]
        self._answers = await self._context.engine.submit(jobs)

    async def pieces(self, read: Callable[[int, StepOutput], T]) -> AsyncIterator[list[T]]:
        """What `read` makes of each choice's increments as they come; an empty list is a spell of silence.

        When `read` is called, `usage` counts up to its increment. Raises EngineDeadError, ShuttingDownError,
        or ApiError for an answer that the engine gave up.
        """
        assert self._answers is not None
        try:
            while not self.finished:
                batch = await self._answers.next(self._context.options.keep_alive_seconds)
                yield [self._record(choice, output, read) for choice, output in batch]
        except asyncio.CancelledError:
            raise
        except Exception:
            self._outcome = "error"
            raise

    def _record(self, choice: int, output: StepOutput, read: Callable[[int, StepOutput], T]) -> T:
        if output.finish_reason == "error":
            raise ApiError(500, "the engine could not finish this answer", type="server_error")
        self._last[choice] = output
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
        """llama.cpp's fields, in milliseconds and tokens a second, over all choices together.

        predicted_ms runs from the first token to the last, and predicted_per_second counts the tokens after the
        first, which the prompt's time has paid for. A rate over no time is 0.
        """
        usage = self.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        num_prompt, num_output = usage["prompt_tokens"] - cached, usage["completion_tokens"]
        started, first, finished = _span([output.timings for output in self._last.values()])
        prompt_ms, predicted_ms = (first - started) * 1e3, (finished - first) * 1e3
        num_after_first = max(num_output - len(self._last), 0)
        return {
            "cache_n": cached,
            "prompt_n": num_prompt,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / num_prompt if num_prompt else 0.0,
            "prompt_per_second": num_prompt / prompt_ms * 1e3 if prompt_ms else 0.0,
            "predicted_n": num_output,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / num_after_first if num_after_first else 0.0,
            "predicted_per_second": num_after_first / predicted_ms * 1e3 if predicted_ms else 0.0,
        }

    def close(self) -> None:
        """Aborts what is unfinished and logs the request; may be called again."""
        if self._closed:
            return
        self._closed = True
        if self._answers is not None:
            self._answers.close()
            self._log()

    def _log(self) -> None:
        usage, timings = self.usage(), self.timings()
        reasons = sorted({output.finish_reason or "" for output in self._last.values()})
        first_tokens = [
            each for output in self._last.values() if (each := output.timings.first_token) is not None
        ]
        first = f"{(min(first_tokens) - self._arrival) * 1e3:.0f} ms" if first_tokens else "none"
        logger.info(
            "request %s: model %s, prompt %d tokens (%d cached), generated %d, first token %s, %.1f tokens/s, %s",
            self.request_id,
            self.tier.id,
            usage["prompt_tokens"],
            usage["prompt_tokens_details"]["cached_tokens"],
            usage["completion_tokens"],
            first,
            timings["predicted_per_second"],
            "+".join(reasons) if self.finished else self._outcome,
        )


def _span(timings: Sequence[Timings]) -> tuple[float, float, float]:
    """When the first choice was scheduled, the first token came and the last one was finished; equal if unknown."""
    started = min((each.first_scheduled for each in timings if each.first_scheduled is not None), default=0.0)
    first = min((each.first_token for each in timings if each.first_token is not None), default=None)
    finished = max((each.finished for each in timings if each.finished is not None), default=None)
    if first is None:
        first = finished if finished is not None else started
    return started, first, finished if finished is not None else first

"""Fewer, larger increments: tokens of an answer are told together."""

from __future__ import annotations

from typing import TypeVar

from sleb.engine.outputs import StepOutput

T = TypeVar("T")


class Intervals:
    """Joins increments of an answer until they have as many tokens as asked for; the first and the last go at once.

    Belongs to one thread.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._held: dict[str, StepOutput | None] = {}  # None: nothing, of an answer that has begun

    def push(self, outputs: list[StepOutput]) -> list[StepOutput]:
        """What is told after a step, in the step's order."""
        if self._num_tokens == 1:
            return outputs
        return [told for output in outputs if (told := self._push(output)) is not None]

    def _push(self, output: StepOutput) -> StepOutput | None:
        request_id = output.request_id
        begun = request_id in self._held
        joined = join(self._held.get(request_id), output)
        if output.finish_reason is not None:
            self.forget(request_id)
            return joined
        if begun and len(joined.new_token_ids) < self._num_tokens:
            self._held[request_id] = joined
            return None
        self._held[request_id] = None
        return joined

    def forget(self, request_id: str) -> None:
        """Drops what is held of an answer that nobody waits for."""
        self._held.pop(request_id, None)


def join(first: StepOutput | None, second: StepOutput) -> StepOutput:
    """Two increments of one answer as one."""
    if first is None:
        return second
    second.new_token_ids = first.new_token_ids + second.new_token_ids
    second.new_text = first.new_text + second.new_text
    second.new_logprobs = _both(first.new_logprobs, second.new_logprobs)
    second.prompt_logprobs = _both(first.prompt_logprobs, second.prompt_logprobs)
    return second


def _both(first: list[T] | None, second: list[T] | None) -> list[T] | None:
    return None if first is None and second is None else [*(first or ()), *(second or ())]

"""What comes out of the engine: increments of each step, whole answers, and its counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprobs:
    """A token's natural-log probability under the model, before penalties, bias and temperature.

    top: the most probable alternatives, best first; the token itself need not be among them.
    """

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Timings:
    """Monotonic clock readings in seconds; None until the event happens."""

    arrival: float
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(slots=True)
class StepOutput:
    """What one step added to one request; the joined `new_text` of all steps is the answer's text."""

    request_id: str
    new_token_ids: list[int]
    new_text: str
    new_logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    timings: Timings
    failure: Exception | None = None  # why, if finish_reason is "error"


@dataclass
class Choice:
    """One answer to a prompt; `failure` says why it ended, if finish_reason is "error"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None
    failure: Exception | None = None


@dataclass
class Output:
    """The answers to one prompt; `text`, `token_ids`, `finish_reason` and `logprobs` are the first one's."""

    prompt_token_ids: list[int]
    depth: int
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprobs | None] | None
    num_cached_tokens: int
    timings: Timings | None

    def check(self) -> Output:
        """The answers, if all are whole. Raises the failure of one that is not."""
        for choice in self.choices:
            if choice.failure is not None:
                raise choice.failure
        return self

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.choices[0].logprobs


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the present state.

    running, waiting: requests by depth, without the depths that have none. kv_cache_usage: a share, 0 to 1.
    num_prefilled, num_to_prefill: tokens that are computed, and all, of running requests' prompts that are not done.
    """

    running: Mapping[int, int]
    waiting: Mapping[int, int]
    kv_cache_usage: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_preemptions: int
    num_prefilled: int = 0
    num_to_prefill: int = 0

    @property
    def num_running(self) -> int:
        return sum(self.running.values())

    @property
    def num_waiting(self) -> int:
        return sum(self.waiting.values())

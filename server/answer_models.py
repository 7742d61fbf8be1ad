"""What answers have in common, as /openapi.json tells it; they are plain dictionaries, and are not validated."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0)]
FinishReason = Literal["stop", "length", "tool_calls", "function_call"]


class ErrorFields(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(TypedDict):
    """Every error, whatever its status."""

    error: ErrorFields


class PromptTokensDetails(TypedDict):
    cached_tokens: Count


class Usage(TypedDict):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class Timings(TypedDict):
    """llama.cpp's fields, in milliseconds and tokens a second."""

    cache_n: Count
    prompt_n: Count
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: Count
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class RequestMetrics(TypedDict):
    """vLLM's fields, in seconds."""

    arrival_time: float
    time_in_queue: float
    time_to_first_token: float
    generation_time: float
    tokens_per_second: float | None


class PromptLogprob(TypedDict):
    """vLLM's: of one token that could have stood there; `rank` is null for one that is not among the most probable."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; null for the first token


class Answer(TypedDict):
    """What is around the choices of an answer, and of a chunk of one."""

    id: str
    created: Count
    model: str
    system_fingerprint: str | None
    timings: NotRequired[Timings]
    metrics: NotRequired[RequestMetrics]


class Choice(TypedDict):
    """What every choice has, of an answer and of a chunk."""

    index: Count
    stop_reason: NotRequired[int | str | None]
    prompt_token_ids: NotRequired[list[Count]]
    token_ids: NotRequired[list[Count]]

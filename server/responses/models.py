"""Answers and events of /v1/responses as /openapi.json tells them; they are plain dictionaries, not validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, Json
from typing_extensions import TypedDict

from sleb.server.answer_models import Count, RequestMetrics, Timings
from sleb.server.responses.items import Item

Status = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)]
    logprobs: list[Logprob]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class OutputMessage(TypedDict):
    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(TypedDict):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class OutputReasoning(TypedDict):
    id: str
    type: Literal["reasoning"]
    status: Status
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningText]
    encrypted_content: None


OutputItem = OutputMessage | OutputCall | OutputReasoning


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    code: Literal["server_error"]
    message: str


class InputTokensDetails(TypedDict):
    cached_tokens: Count
    cache_write_tokens: Count


class OutputTokensDetails(TypedDict):
    reasoning_tokens: Count


class ResponseUsage(TypedDict):
    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: OutputTokensDetails
    total_tokens: Count


class ResponseObject(TypedDict):
    """OpenAI's Response: all of its fields, null where this server has nothing to say."""

    id: str
    object: Literal["response"]
    created_at: Count
    completed_at: Count | None
    status: ResponseStatus
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: Count | None
    max_tool_calls: Count | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: Count
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None
    presence_penalty: float
    frequency_penalty: float
    timings: NotRequired[Timings]
    metrics: NotRequired[RequestMetrics]


# The fields of OpenAI's Response that are null in every answer of this server.
ALWAYS_NULL = (
    "access_programs",
    "conversation",
    "image",
    "input_transformations",
    "moderation",
    "prompt",
    "prompt_cache_diagnostics",
    "prompt_cache_options",
    "prompt_cache_retention",
    "tool_usage",
)


class _Event(TypedDict):
    sequence_number: Count


class ResponseEvent(_Event):
    """Of the answer as a whole. One that /cancel ended has the type of an incomplete one, and says its status."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class ItemEvent(_Event):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: Count
    item: OutputItem


class _InItem(_Event):
    item_id: str
    output_index: Count


class PartEvent(_InItem):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Count
    part: OutputText | ReasoningText


class DeltaEvent(_InItem):
    type: Literal[
        "response.output_text.delta",
        "response.reasoning_text.delta",
        "response.function_call_arguments.delta",
    ]
    content_index: NotRequired[Count]
    delta: str
    logprobs: NotRequired[list[Logprob]]


class TextDoneEvent(_InItem):
    type: Literal["response.output_text.done", "response.reasoning_text.done"]
    content_index: Count
    text: str
    logprobs: NotRequired[list[Logprob]]


class ArgumentsDoneEvent(_InItem):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


class ErrorEvent(_Event):
    """Goes before response.failed."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None


class ResponsesEvent(TypedDict):
    """One event of a stream; `event` is the type of its data."""

    event: str
    data: Json[
        ResponseEvent | ItemEvent | PartEvent | DeltaEvent | TextDoneEvent | ArgumentsDoneEvent | ErrorEvent
    ]


class InputTokens(TypedDict):
    object: Literal["response.input_tokens"]
    input_tokens: Count


class Deleted(TypedDict):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(TypedDict):
    object: Literal["list"]
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool

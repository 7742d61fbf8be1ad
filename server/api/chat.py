"""POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from fastapi import APIRouter, Body, Request, Response
from pydantic import Field, Json
from typing_extensions import TypedDict

from sleb.server.answer.chat_writer import ChatWriter
from sleb.server.answer.converse import begin
from sleb.server.answer_models import Answer, Choice, Count, Error, FinishReason, PromptLogprobs, Usage
from sleb.server.protocol import ChatBody
from sleb.server.routing import GENERATION_ERRORS, MODEL_LINK, Route, errors, success


class ChatRoute(Route):
    """Requests of this path have no prompt."""

    prompt_field = "messages"


router = APIRouter(route_class=ChatRoute)

_EXAMPLE = {
    "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
    "max_tokens": 64,
}


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChosenLogprob] | None
    refusal: None


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[Annotated[list[ToolCall], Field(min_length=1)]]
    function_call: NotRequired[FunctionCall]


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_logprobs: NotRequired[PromptLogprobs]
    usage: Usage


class FunctionCallPart(TypedDict, total=False):
    name: str
    arguments: str


class ToolCallPart(TypedDict):
    index: Count
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallPart


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: Annotated[list[ToolCallPart], Field(min_length=1)]
    function_call: FunctionCallPart


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class ChatCompletionEvent(TypedDict):
    data: Literal["[DONE]"] | Json[ChatCompletionChunk | Error]


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=success(ChatCompletionEvent, MODEL_LINK) | errors(*GENERATION_ERRORS),
)
async def create_chat_completion(
    request: Request, body: Annotated[ChatBody, Body(openapi_examples={"question": {"value": _EXAMPLE}})]
) -> Response:
    """An answer to a conversation, by the model's own chat template."""
    begun = await begin(request, body.conversation())
    return await ChatWriter(begun, body).answer(request)

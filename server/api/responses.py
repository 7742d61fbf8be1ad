"""OpenAI's Responses: POST /v1/responses, and what is asked of an answer that is kept or being made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Body, Query, Request, Response
from pydantic import AfterValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from sleb.errors import RequestError
from sleb.server.answer.converse import begin, count_tokens
from sleb.server.context import get_context
from sleb.server.conversation import Conversation
from sleb.server.errors import ApiError, json_response
from sleb.server.responses.body import Includable, ResponsesBody
from sleb.server.responses.items import Item, read_input, referred, to_messages
from sleb.server.responses.models import Deleted, InputItems, InputTokens, ResponseObject, ResponsesEvent
from sleb.server.responses.truncation import shortened
from sleb.server.responses.writer import ResponseWriter
from sleb.server.routing import GENERATION_ERRORS, MODEL_LINK, Route, errors, success


class ResponsesRoute(Route):
    """Requests of these paths have neither `messages` nor a prompt."""

    prompt_field = "input"


router = APIRouter(route_class=ResponsesRoute)

_PATH = "/v1/responses"
_EXAMPLES: dict[str, Any] = {
    "question": {"value": {"input": "What is the capital of Japan?", "max_output_tokens": 64}},
    "items": {
        "value": {
            "instructions": "Answer in one word.",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "The capital of Japan?"}]}],
            "text": {"format": {"type": "text"}},
            "store": False,
            "stream": True,
        }
    },
}
_COUNTED: dict[str, Any] = {"question": {"value": {"input": "What is the capital of Japan?"}}}
_LINKS = MODEL_LINK | {
    name: {"operationId": name, "parameters": {"response_id": "$response.body#/id"}}
    for name in ("get_response", "list_input_items", "cancel_response", "delete_response")
}


def _refuse_stream(stream: bool) -> bool:
    if stream:
        raise PydanticCustomError("stream", "an answer that is kept is told whole; leave stream out")
    return stream


_Include = Annotated[
    list[Includable] | None, Query(description="Accepted: an answer is told as it was given.")
]
_NoStream = Annotated[bool, AfterValidator(_refuse_stream), WithJsonSchema({"const": False})]


@router.post(
    _PATH,
    response_model=ResponseObject,
    responses=success(ResponsesEvent, _LINKS) | errors(*GENERATION_ERRORS),
)
async def create_response(
    request: Request, body: Annotated[ResponsesBody, Body(openapi_examples=_EXAMPLES)]
) -> Response:
    """An answer to a text or to items of a conversation, as OpenAI's Responses API has it.

    It is kept in memory, for previous_response_id and GET, unless `store` is false: for a time and to a size that the
    server's options say, and for the same API key only.
    """
    items, earlier = await _read_items(request, body)
    conversation = await _converse(request, body, items, earlier)
    begun = await begin(request, conversation)
    writer = ResponseWriter(begun, body, request.state.key, items, earlier)
    return await writer.answer(request)


@router.post(
    f"{_PATH}/input_tokens", response_model=InputTokens, responses=success() | errors(400, 404, 413, 503)
)
async def count_input_tokens(
    request: Request, body: Annotated[ResponsesBody, Body(openapi_examples=_COUNTED)]
) -> Response:
    """How many tokens the prompt of such a request has."""
    items, earlier = await _read_items(request, body)
    num_tokens = await count_tokens(request, await _converse(request, body, items, earlier))
    return json_response({"object": "response.input_tokens", "input_tokens": num_tokens})


@router.get(
    f"{_PATH}/{{response_id}}",
    operation_id="get_response",
    response_model=ResponseObject,
    responses=success() | errors(400, 404),
)
async def get_response(
    request: Request, response_id: str, include: _Include = None, stream: _NoStream = False
) -> Response:
    """An answer that is kept, as it was given, or one that is being made, as far as it came."""
    return json_response(await get_context(request).responses.find(request.state.key, response_id))


@router.delete(
    f"{_PATH}/{{response_id}}",
    operation_id="delete_response",
    response_model=Deleted,
    responses=success() | errors(404),
)
async def delete_response(request: Request, response_id: str) -> Response:
    """Forgets an answer that is kept. One that is being made has to be cancelled first."""
    await get_context(request).responses.delete(request.state.key, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post(
    f"{_PATH}/{{response_id}}/cancel",
    operation_id="cancel_response",
    response_model=ResponseObject,
    responses=success() | errors(404),
)
async def cancel_response(request: Request, response_id: str) -> Response:
    """Ends an answer that is being made, for whoever waits for it, with the status `cancelled`.

    Also of requests without `background`, which OpenAI's own cannot. An answer that is there already is told as it is.
    """
    responses = get_context(request).responses
    return json_response(await responses.find(request.state.key, response_id, cancel=True))


@router.get(
    f"{_PATH}/{{response_id}}/input_items",
    operation_id="list_input_items",
    response_model=InputItems,
    responses=success() | errors(400, 404),
)
async def list_input_items(
    request: Request,
    response_id: str,
    after: str | None = None,
    include: _Include = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """The items that the request of a kept answer sent, the last one first unless `order` says otherwise."""
    kept = await get_context(request).responses.get(request.state.key, response_id)
    items = kept.input_items()
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [index for index, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(400, "after names no item of this list", param="after")
        items = items[places[0] + 1 :]
    page = items[:limit]
    ends = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    told = {"object": "list", "data": page, "first_id": ends[0], "last_id": ends[1]}
    return json_response(told | {"has_more": len(items) > limit})


async def _read_items(request: Request, body: ResponsesBody) -> tuple[list[Item], tuple[bytes, ...]]:
    """The items that a request sends, and the turns before them. Raises RequestError, ApiError 404."""
    responses, owner = get_context(request).responses, request.state.key
    wanted = referred(body.input)
    found = await responses.items(owner, wanted) if wanted else {}
    items = read_input(body.input, found.get)
    if body.previous_response_id is None:
        if not items:
            raise RequestError("'input' is missing", param="input")
        return items, ()
    return items, (await responses.get(owner, body.previous_response_id, "previous_response_id")).turns


async def _converse(
    request: Request, body: ResponsesBody, items: list[Item], earlier: tuple[bytes, ...]
) -> Conversation:
    served = get_context(request).engine.model
    before = [item for turn in earlier for item in orjson.loads(turn)]
    request.state.num_bytes += sum(map(len, earlier))
    tools = body.tool_use()
    messages = to_messages([*before, *items], body.instructions)
    if not messages:
        raise RequestError("'input' has no message: send what the user says", param="input")
    conversation = body.to_conversation(messages, tools, served.chat_template_for(tools is not None))
    if body.truncation == "auto":
        return await shortened(request, conversation)
    return conversation

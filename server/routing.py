"""What a file of sleb.server.api is made of: routes that read their own bodies, and what they say of their answers."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from sleb.engine.requests.repetition import REPETITION
from sleb.server.answer_models import Error
from sleb.server.body_parser import parse_body
from sleb.server.context import get_context
from sleb.server.errors import ApiError

REFERENCE = "#/components/schemas/{model}"
HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": {
        "description": "The request's own, or a new one.",
        "schema": {"type": "string", "minLength": 1},
    },
    "Server-Timing": {"description": "Milliseconds of each phase.", "schema": {"type": "string"}},
}
_STOP_HEADER: dict[str, dict[str, Any]] = {
    "X-Stop-Reason": {
        "description": "Of an answer that was ended because it loops, as its `stop_reason`; a stream has only that.",
        "schema": {"const": REPETITION},
    }
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
_ERROR_HEADERS: dict[int, dict[str, dict[str, Any]]] = {
    401: {"WWW-Authenticate": {"schema": {"const": "Bearer"}}},
    503: _RETRY_AFTER,
    529: _RETRY_AFTER,
}
_ERROR_TEXTS = {
    400: "A field is wrong (`param` names it), or the prompt does not fit (`context_length_exceeded`).",
    401: "Keys are configured and the request bears none of them: `invalid_api_key`.",
    404: "`model_not_found`; the message lists the models that exist.",
    413: "The body is too large.",
    500: "The engine could not finish this answer.",
    501: "Not what this server does: `unsupported`.",
    503: "`overloaded`, `warming_up`, `shutting_down` or `engine_dead`; Retry-After says when to come back.",
    529: "`overloaded_error`: the queue is full; Retry-After says when to come back.",
    504: "The request took longer than the server allows: `timeout`.",
}
GENERATION_ERRORS = (400, 404, 413, 500, 503, 504)
MODEL_LINK = {"model": {"operationId": "get_model", "parameters": {"model_id": "$response.body#/model"}}}

Responses = dict[int | str, dict[str, Any]]


class Route(APIRoute):
    """A route behind the API key, if there is one.

    An endpoint with a second argument, a model of `sleb.server.protocol`, gets the body. FastAPI describes it, but does
    not read it: our own way knows the limit. The answer is a Response, as it is sent.

    Every error of its paths, whoever finds it, is told by `error_body`; a subclass may have another wire format's.

    Attributes:
        is_open: whether it needs no key.
        error_model: the type of the body of an error.
        prompt_field: the field that an error about a prompt which is too long names; None: whichever was checked.
    """

    is_open = False
    error_model: Any = Error
    prompt_field: str | None = None

    @classmethod
    def error_body(cls, error: ApiError, request_id: str) -> dict[str, Any]:
        """The JSON body of an error."""
        body = error.body()
        if cls.prompt_field is not None and body["error"]["code"] == "context_length_exceeded":
            body["error"]["param"] = cls.prompt_field
        return body

    @classmethod
    def error_status(cls, error: ApiError) -> int:
        """Its HTTP status."""
        return error.status

    @property
    def body_model(self) -> Any:
        """The type of the body, None if there is none."""
        return None if self.body_field is None else self.body_field.field_info.annotation

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        model = self.body_model
        if model is None:
            return super().get_route_handler()

        async def handle(request: Request) -> Response:
            context = get_context(request)
            data = await context.bodies.read(request)
            request.state.num_bytes = len(data)
            body = parse_body(data, model, context.unknown_fields, 2 * context.engine.model.max_model_len)
            del data  # an answer may take long
            response: Response = await self.endpoint(request, body)
            return response

        return handle


class OpenRoute(Route):
    """A route that needs no key."""

    is_open = True


def errors(*statuses: int, model: Any = Error) -> Responses:
    """FastAPI's `responses` of an endpoint that may answer with these errors, whose bodies are of the type `model`."""
    return {
        status: {
            "model": model,
            "description": _ERROR_TEXTS[status],
            "headers": HEADERS | _ERROR_HEADERS.get(status, {}),
        }
        for status in statuses
    }


def success(
    event: Any = None,
    links: dict[str, Any] | None = None,
    *,
    media_type: str = "text/event-stream",
    stream: str = "events whose data are chunks, and a last one whose data are [DONE]",
) -> Responses:
    """The same of a good answer: its headers, what it is good `links` for, the type of an `event` if it may stream.

    media_type, stream: what a stream is, and of what, in words.
    """
    response: dict[str, Any] = {"headers": HEADERS, "links": links or {}}
    if event is not None:
        response["headers"] = HEADERS | _STOP_HEADER
        schema = TypeAdapter(event).json_schema(ref_template=REFERENCE)
        response["content"] = {media_type: {"itemSchema": schema}}
        response["description"] = f"The answer; with `stream`, {stream}."
    return {200: response}

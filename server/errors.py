"""Errors as OpenAI clients know them: {"error": {"message", "type", "param", "code"}}; a route may have others."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from sleb.errors import EngineDeadError, InvalidOutputError, RequestError, SlebError

logger = logging.getLogger("sleb.server")

_MAX_MESSAGE = 2000  # characters; longer messages could only come from an input that they repeat
_STATUS_OF_CODE = {"model_not_found": 404}
PATHS = "/docs lists what does"


class ApiError(SlebError):
    """An answer that is an error: its HTTP status and the four fields of the body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body, with a message of bounded length."""
        message = str(self)
        if len(message) > _MAX_MESSAGE:
            message = message[:_MAX_MESSAGE] + "..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


class OverloadedError(ApiError):
    """The queue is full, or too long; the client may come back."""

    def __init__(self, message: str, status: int = 503) -> None:
        super().__init__(
            status, message, type="server_error", code="overloaded", headers={"Retry-After": "1"}
        )


class ShuttingDownError(ApiError):
    """The server finishes what it has and takes nothing new."""

    def __init__(self, message: str = "the server is shutting down") -> None:
        super().__init__(
            503, message, type="server_error", code="shutting_down", headers={"Retry-After": "5"}
        )


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON; faster than pydantic's way for answers that are plain dicts."""
    return Response(orjson.dumps(content), status, dict(headers or {}), "application/json")


def shorten(value: object, limit: int = 100) -> str:
    """repr of `value`, cut to `limit` characters: inputs are repeated in errors and logs only so far."""
    try:
        shown = repr(value[: limit * 2] if isinstance(value, str | bytes | list) else value)
    except RecursionError:
        shown = "a deeply nested value"
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."


def to_api_error(error: BaseException) -> ApiError:
    """Any exception as an answer; one that nobody foresaw is logged and answered without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        status = _STATUS_OF_CODE.get(error.code or "", 400)
        return ApiError(status, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineDeadError):
        headers = {"Retry-After": "5"}
        return ApiError(503, str(error), type="server_error", code="engine_dead", headers=headers)
    if isinstance(error, InvalidOutputError):
        return ApiError(500, str(error), type="server_error", code=error.code)
    logger.error("internal error", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", type="server_error")


def install_handlers(app: FastAPI) -> None:
    """Makes every error of `app` an answer of the route's, also those that the framework raises.

    `request.state.tell_error`, an ApiError's answer, and `allowed`, the methods, are what sleb.server.middleware knows
    of the path.
    """

    def tell(request: Request, error: ApiError) -> Response:
        response: Response = request.state.tell_error(error)
        return response

    async def on_sleb_error(request: Request, error: Exception) -> Response:
        return tell(request, to_api_error(error))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = f"{request.method} {shorten(request.url.path)[1:-1]}"
        message, headers = str(error.detail), error.headers
        if error.status_code == 404:
            message = f"{where} does not exist; {PATHS}"
            if re.search(
                "/v1/(v1|api)/", request.url.path
            ):  # of clients that add their paths to a bare address
                message = f"{where} does not exist; give this client the server's address without /v1"
        elif error.status_code == 405:  # the framework's knows the methods of one route of several
            headers = {"Allow": request.state.allowed()}
            message = f"{where} is not allowed; this path takes {headers['Allow']}"
        return tell(request, ApiError(error.status_code, message, headers=headers))

    async def on_validation_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or None
        return tell(request, ApiError(400, str(first["msg"]), param=param))

    app.add_exception_handler(SlebError, on_sleb_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)

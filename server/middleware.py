"""What every request passes: path, request id, key, HEAD and OPTIONS, and the net under unforeseen errors."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sleb.fields import shown_text
from sleb.server.browsers import Callers
from sleb.server.engine_thread.metrics import ServerMetrics
from sleb.server.errors import ApiError, json_response, to_api_error
from sleb.server.exchange import EXCHANGE, Exchange, note_failure
from sleb.server.routing import Route

logger = logging.getLogger("sleb.server")

_MAX_REQUEST_ID = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_CLIENT_GONE = 499
_MAX_PATH = 200  # characters of it in the log
_SLASHES = re.compile(r"/{2,}")


class ApiKeys:
    """Keys as digests, compared in constant time; without any key everybody may pass."""

    def __init__(self, keys: Iterable[str], open_routes: Sequence[Route]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_routes = open_routes

    def check(self, path: str, headers: Headers) -> bytes:
        """The digest of the key that the request bears; empty where none is needed. Raises ApiError 401."""
        if not self._digests or any(route.path_regex.match(path) for route in self._open_routes):
            return b""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token if scheme.lower() == "bearer" else ""
        given = [_digest(key.strip().encode("latin-1")) for key in (bearer, headers.get("x-api-key", ""))]
        matches = [key for key in given for digest in self._digests if hmac.compare_digest(key, digest)]
        if not matches:
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return matches[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def request_id(headers: Headers) -> str:
    """The client's X-Request-Id, cut and without characters that could forge a header or a log line, or a new one."""
    given = _NOT_IN_REQUEST_ID.sub("", headers.get("x-request-id", "")[:_MAX_REQUEST_ID])
    return given or f"req-{uuid.uuid4().hex}"


def find_route(path: str, routes: Sequence[Route]) -> tuple[str, type[Route]]:
    """The path as a route has it, and the class of that route, `Route` if there is none.

    One slash for several, and none at the end; /v1 before a path that only a route with it has, as llama.cpp's.
    """
    path = _SLASHES.sub("/", path).rstrip("/") or "/"
    for known in (path, f"/v1{path}"):
        for route in routes:
            if route.path_regex.match(known):
                return known, type(route)
    return path, Route


def server_timing(exchange: Exchange, total: float) -> str:
    """The header Server-Timing, in milliseconds: what is known of the phases, and the time until the answer began."""
    return ", ".join(f"{name};dur={spent:.2f}" for name, spent in {**exchange.phases, "total": total}.items())


class Gate:
    """ASGI middleware around the routes; plain rather than BaseHTTPMiddleware, which delays disconnects."""

    def __init__(
        self,
        app: ASGIApp,
        callers: Callers,
        keys: ApiKeys,
        routes: Sequence[Route],
        metrics: ServerMetrics,
    ) -> None:
        self._app = app
        self._callers = callers
        self._keys = keys
        self._routes = routes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        identifier = request_id(headers)
        status, begin, exchange = 0, time.monotonic(), Exchange()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = identifier
                answer["Server-Timing"] = server_timing(exchange, (time.monotonic() - begin) * 1e3)
            await send(message)

        path, route_class = find_route(scope["path"], self._routes)

        def tell_error(error: ApiError) -> Response:
            note_failure(error.code or str(error.status))
            body, status = route_class.error_body(error, identifier), route_class.error_status(error)
            return json_response(body, status, error.headers)

        inner = dict(scope, path=path, raw_path=path.encode(), state={**scope.get("state", {})})
        inner["state"] |= {"request_id": identifier, "tell_error": tell_error}
        if scope["method"] == "HEAD":  # the server drops the body: it looks at its own copy of the method
            inner["method"] = "GET"
        token = EXCHANGE.set(exchange)
        try:
            self._callers.check(scope["method"], headers)
            inner["state"]["key"] = self._keys.check(path, headers)
            if scope["method"] == "OPTIONS":
                await self._options(inner, tell_error)(inner, receive, send_with_id)
            else:
                await self._app(inner, receive, send_with_id)
        except ClientDisconnect:
            if not status:  # nobody reads this; without it the server would log a missing answer
                await Response(status_code=_CLIENT_GONE)(inner, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            await tell_error(to_api_error(error))(inner, receive, send_with_id)
        finally:
            EXCHANGE.reset(token)
            route = getattr(inner.get("route"), "path", "other")
            is_open = getattr(inner.get("route"), "is_open", False)  # what a probe asks every second
            if status >= 400 and status != _CLIENT_GONE and not is_open:
                self._log_refusal(scope, status, exchange, identifier)
            self._metrics.count_exchange(exchange, scope["method"], route, status or _CLIENT_GONE)

    @staticmethod
    def _log_refusal(scope: Scope, status: int, exchange: Exchange, identifier: str) -> None:
        client = scope.get("client")
        facts = {
            "request": identifier,
            "method": scope["method"],
            "path": shown_text(scope["path"][:_MAX_PATH]),
            "status": status,
            "code": None if exchange.failure == str(status) else exchange.failure,
            "client": client[0] if client else "unknown",
        }
        code = " %(code)s" if facts["code"] else ""
        logger.warning(
            f"refused %(method)s %(path)s from %(client)s: %(status)d{code}, request %(request)s",
            facts,
            extra={"facts": facts},
        )

    def _options(self, scope: Scope, tell_error: Callable[[ApiError], Response]) -> Response:
        """The methods of a path, as a bare OPTIONS asks."""
        methods: set[str] = set()
        first: str | None = None  # of the paths that match, some with a parameter, that which answers
        for route in self._routes:
            match, _ = route.matches(scope)
            if match != Match.NONE and first in (None, route.path):
                first = route.path
                methods |= route.methods or set()
        if not methods:
            return tell_error(ApiError(404, "this path does not exist; the API begins at /v1"))
        methods |= {"OPTIONS", "HEAD"} if "GET" in methods else {"OPTIONS"}
        return Response(status_code=204, headers={"Allow": ", ".join(sorted(methods))})

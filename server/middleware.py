"""What every request passes: path, request id, key, HEAD and OPTIONS, and the net under unforeseen errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sleb.server import traces
from sleb.server.browsers import Callers
from sleb.server.engine_thread.metrics import ServerMetrics
from sleb.server.errors import PATHS, ApiError, json_response, to_api_error
from sleb.server.exchange import EXCHANGE, Exchange, note_failure
from sleb.server.ids import new_id
from sleb.server.keys import ApiKeys
from sleb.server.request_log import CLIENT_GONE, log_request
from sleb.server.routing import Route

_MAX_REQUEST_ID = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:/+=@-]")
_SLASHES = re.compile(r"/{2,}")


def request_id(headers: Headers) -> str:
    """The client's X-Request-Id, cut and without characters that could forge a header or a log line, or a new one."""
    given = _NOT_IN_REQUEST_ID.sub("", headers.get("x-request-id", "")[:_MAX_REQUEST_ID])
    return given or new_id("req-")


def find_route(path: str, routes: Sequence[Route], root: str = "") -> tuple[str, type[Route]]:
    """The path as a route has it, and the class of that route; if there is none, the one whose errors tell so.

    Without `root`, below which a proxy may serve all of this; one slash for several, and none at the end; /v1 before a
    path that only a route with it has, as llama.cpp's.
    """
    path = _SLASHES.sub("/", path)
    if root and f"{path}/".startswith(f"{root}/"):
        path = path[len(root) :]
    path = path.rstrip("/") or "/"
    for known in (path, f"/v1{path}"):
        for route in routes:
            if route.path_regex.match(known):
                return known, type(route)
    return path, _family(path, routes)


def _family(path: str, routes: Sequence[Route]) -> type[Route]:
    """The class of all routes near a path that has none, such as /v1/messages/batches or /api/nothing; else `Route`.

    A client of another format reads errors of its own shape only. Never an open class: nothing there needs no key.
    """
    begin = path.split("/", 3)[:3]
    for above in ("/".join(begin), "/v1" + "/".join(begin[:2]), "/".join(begin[:2])):
        found = {type(route) for route in routes if f"{route.path}/".startswith(f"{above}/")}
        if found:
            [only, *others] = found
            return Route if others or only.is_open else only
    return Route


def server_timing(exchange: Exchange, total: float) -> str:
    """The header Server-Timing, in milliseconds: what is known of the phases, and the time until the answer began."""
    return ", ".join(f"{name};dur={spent:.2f}" for name, spent in {**exchange.phases, "total": total}.items())


class Gate:
    """ASGI middleware around the routes; plain rather than BaseHTTPMiddleware, which delays disconnects.

    Args:
        root: the path below which a proxy serves all of this, empty for none; requests may have it or not.
    """

    def __init__(
        self,
        app: ASGIApp,
        callers: Callers,
        keys: ApiKeys,
        routes: Sequence[Route],
        metrics: ServerMetrics,
        root: str = "",
    ) -> None:
        self._app = app
        self._root = root
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
        status, begin, exchange, span = 0, time.monotonic(), Exchange(), traces.current_span()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-Id"] = identifier
                answer["Request-Id"] = identifier  # as Anthropic's clients look for it
                answer["Server-Timing"] = server_timing(exchange, (time.monotonic() - begin) * 1e3)
            elif not message.get("more_body"):
                traces.describe(span, identifier, exchange)  # with its last byte a span ends
            await send(message)

        path, route_class = find_route(scope["path"], self._routes, self._root)

        def tell_error(error: ApiError) -> Response:
            note_failure(error.code or str(error.status))
            body, status = route_class.error_body(error, identifier), route_class.error_status(error)
            return json_response(body, status, error.headers)

        inner = dict(scope, path=path, raw_path=path.encode(), state={**scope.get("state", {})})
        inner["state"] |= {"request_id": identifier, "tell_error": tell_error}
        inner["state"]["allowed"] = lambda: self._methods(inner)
        if scope["method"] == "HEAD":  # the server drops the body: it looks at its own copy of the method
            inner["method"] = "GET"
        token = EXCHANGE.set(exchange)
        try:
            self._callers.check(scope["method"], headers)
            key = self._keys.check(path, headers)
            exchange.key, inner["state"]["key"] = key.name, key.digest
            if scope["path"] == self._root and inner["method"] == "GET":  # links of the page would go wrong
                await RedirectResponse(f"{self._root}/")(inner, receive, send_with_id)
            elif scope["method"] == "OPTIONS":
                await self._options(inner, tell_error)(inner, receive, send_with_id)
            else:
                await self._app(inner, receive, send_with_id)
        except ClientDisconnect:
            if not status:  # nobody reads this; without it the server would log a missing answer
                await Response(status_code=CLIENT_GONE)(inner, receive, send_with_id)
        except Exception as error:
            if status:
                raise
            await tell_error(to_api_error(error))(inner, receive, send_with_id)
        finally:
            EXCHANGE.reset(token)
            route, is_open = inner.get("route"), getattr(inner.get("route"), "is_open", False)
            status, seconds = status or CLIENT_GONE, time.monotonic() - begin
            traces.describe(span, identifier, exchange)
            # An open path is asked by probes every second.
            log_request(
                scope, identifier, status, seconds, exchange, trace=traces.trace_id(span), quiet=is_open
            )
            self._metrics.count_exchange(exchange, scope["method"], getattr(route, "path", "other"), status)

    def _methods(self, scope: Scope) -> str:
        """The methods of a path, as the header Allow lists them; empty for a path that does not exist."""
        methods: set[str] = set()
        first: str | None = None  # of the paths that match, some with a parameter, that which answers
        for route in self._routes:
            match, _ = route.matches(scope)
            if match != Match.NONE and first in (None, route.path):
                first = route.path
                methods |= route.methods or set()
        if methods:
            methods |= {"OPTIONS", "HEAD"} if "GET" in methods else {"OPTIONS"}
        return ", ".join(sorted(methods))

    def _options(self, scope: Scope, tell_error: Callable[[ApiError], Response]) -> Response:
        """What a bare OPTIONS asks."""
        if not (allowed := self._methods(scope)):
            return tell_error(ApiError(404, f"this path does not exist; {PATHS}"))
        return Response(status_code=204, headers={"Allow": allowed})

"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One event; lines end in LF, since CRLF breaks clients."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


def named_event(content: dict[str, Any]) -> bytes:
    """One event that says its type twice, as OpenAI's Responses and Anthropic's Messages have it."""
    name: str = content["type"]
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(content) + b"\n\n"


def line(content: Any) -> bytes:
    """One line of NDJSON."""
    return orjson.dumps(content) + b"\n"


class EventStreamResponse(StreamingResponse):
    """A stream of events that calls `on_close` once nothing more is sent, for whatever reason.

    A generator that never started, or waits for a client that stopped reading, does not run its own `finally` in
    time: hence the callback.
    """

    def __init__(self, content: AsyncIterator[bytes], media_type: str, on_close: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type=media_type)
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; cancels it and raises ClientDisconnect when the client goes first.

    The body must have been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sleb.server.errors import to_api_error
from sleb.server.exchange import note_failure

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One event; lines end in LF, since CRLF breaks clients."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def event_stream(
    batches: AsyncIterator[list[dict[str, Any]]], keep_alive_seconds: float
) -> AsyncIterator[bytes]:
    """The bytes of a stream of chunks, each batch in one write; a comment after silence; errors; [DONE]."""
    last_write = time.monotonic()
    try:
        async for batch in batches:
            now = time.monotonic()
            if batch:
                yield b"".join(map(event, batch))
            elif now - last_write >= keep_alive_seconds * 0.99:  # a timer may be early by a tick of the clock
                yield KEEP_ALIVE
            else:
                continue
            last_write = now
    except Exception as error:
        answer = to_api_error(error)
        note_failure(answer.code or str(answer.status))
        yield event(answer.body())
    yield DONE


class EventStreamResponse(StreamingResponse):
    """A stream of events that calls `on_close` once nothing more is sent, for whatever reason.

    A generator that never started, or waits for a client that stopped reading, does not run its own `finally` in
    time: hence the callback.
    """

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
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

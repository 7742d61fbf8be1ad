"""Server-sent events, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from sleb.server.wire import DIRECT_WRITE, DirectWrite

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


class EventStream(Protocol):
    """What an `EventStreamResponse` sends.

    end: what it ends with, also after an error. silence: what is sent when nothing else was for a while; None:
    nothing. ended: whether there is nothing more to take.
    """

    end: bytes
    silence: bytes | None
    ended: bool

    def begin(self) -> bytes:
        """What is sent before anything is there."""

    async def wait(self, timeout: float, on_arrival: Callable[[], bool] | None = None) -> None:
        """Waits until there is something to take; see `Answers.wait`."""

    def take(self) -> bytes:
        """What there is to send; what it raises ends the stream."""

    def fail(self, error: Exception) -> bytes:
        """An error inside of the stream."""

    def close(self) -> None:
        """Called once nothing more is sent, for whatever reason; may be called again."""


class EventStreamResponse(StreamingResponse):
    """A stream of events, which is closed once nothing more is sent.

    What the engine brings is written when it comes, by whoever delivers it, where the connection offers that
    (`DIRECT_WRITE`): waking this response's task for every token would cost more than all the rest.
    """

    def __init__(
        self, stream: EventStream, media_type: str, patience: float, headers: Mapping[str, str]
    ) -> None:
        """patience: seconds without anything to send, after which `silence` is."""
        more = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__((), headers=more | dict(headers), media_type=media_type)
        self._stream = stream
        self._patience = patience
        self._last_write = 0.0
        self._write: DirectWrite | None = None
        self._failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._write = scope.get("extensions", {}).get(DIRECT_WRITE)
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A task that waits for a client that stopped reading may be ended before it comes to this itself.
            self._stream.close()

    async def stream_response(self, send: Send) -> None:
        stream = self._stream
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._last_write = time.monotonic()
        await self._send(send, stream.begin())
        while not stream.ended:
            try:
                content = await self._next()
            except Exception as error:
                await self._send(send, stream.fail(error))
                break
            await self._send(send, content)
        stream.close()  # before the message that ends the response: with that a trace's span ends
        await send({"type": "http.response.body", "body": stream.end, "more_body": False})

    async def _next(self) -> bytes:
        """What comes next that was not written directly; may be empty."""
        stream = self._stream
        left = self._last_write + self._patience - time.monotonic()
        await stream.wait(max(left, 0), None if self._write is None else self._write_now)
        if self._failure is not None:
            raise self._failure
        if stream.ended:  # all of it is written
            return b""
        content = stream.take()
        # A timer may be early by a tick of the clock.
        if not content and time.monotonic() - self._last_write >= self._patience * 0.99:
            return stream.silence or b""
        return content

    async def _send(self, send: Send, content: bytes) -> None:
        if content:
            await send({"type": "http.response.body", "body": content, "more_body": True})
            self._last_write = time.monotonic()

    def _write_now(self) -> bool:
        """Writes what has come. True where the task must go on: to wait for a slow client, to end, to tell an error."""
        assert self._write is not None
        if not self._write.ready:
            return True
        try:
            content = self._stream.take()
        except Exception as error:
            self._failure = error
            return True
        if content:
            self._write(content)
            self._last_write = time.monotonic()
        return self._stream.ended


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

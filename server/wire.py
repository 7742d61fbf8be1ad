"""HTTP as it comes from the network: what a client may take before anybody knows who it is.

A request's head, its trailers and the framing of its body are bounded in bytes, a head in number of fields too. A head,
or the rest of a body that nobody reads, must come in time; what is written to a client must be read. When there are as
many connections as may be, one that waits for nothing gives way.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from sleb.server.errors import ApiError

logger = logging.getLogger("sleb.server")

MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 200
MAX_PIPELINED = 32
FRAMING_PER_BYTE = 16  # of a body in chunks, whose lengths are text
_MAX_DROPPED = 2**20  # bytes that a client may send before it reads that it was refused
_MAX_UNREAD = 2**24  # bytes of a body that was answered before its end
_UPGRADE = re.compile(rb"(?<=\n)upgrade(?=[ \t]*:)", re.IGNORECASE)
DIRECT_WRITE = "sleb.direct_write"  # an extension of ASGI's scope
_SECONDS_TO_READ = 2.0  # for a client to read that it was refused
_REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    503: b"Service Unavailable",
}


class DirectWrite:
    """Writes to a response that has begun, without a task's waiting: what the ASGI extension DIRECT_WRITE offers."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    @property
    def ready(self) -> bool:
        """Whether the client keeps up; otherwise `send` waits for it."""
        return not self._cycle.flow.write_paused and bool(self._cycle.chunked_encoding)

    def __call__(self, content: bytes) -> None:
        """A part of the body, as `send` would write it (RFC 9112, 7.1). Nothing if the client has gone."""
        if not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(content), content))


@dataclass(frozen=True)
class WireLimits:
    """Seconds for a head and between signs of life of a body, for a client to read anything; open connections.

    count: tells how many this process has and returns how many the server has; None: it has no others.
    """

    read_timeout: float = 30.0
    write_timeout: float = 60.0
    max_connections: int = 4096
    count: Callable[[int], int] | None = None


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds. `limits` come first, so that a partial of this class is what uvicorn calls."""

    def __init__(self, limits: WireLimits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._num_overhead = 0  # bytes of the present request that are not of its body
        self._num_body = self._num_unread = self._num_dropped = 0
        self._num_headers = self._num_header_bytes = 0
        self._refusal: ApiError | None = None
        self._cause: ApiError | None = None  # why parsing was ended
        self._deadline: asyncio.TimerHandle | None = None  # for what must be read
        self._stall: asyncio.TimerHandle | None = None  # while what is written is not read
        self._in_head = True
        self._in_message = False
        self._since = time.monotonic()

    # The life of a connection.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._count() > self._limits.max_connections and not self._make_room():
            self._refuse(ApiError(503, "too many connections are open; try again later", code="overloaded"))
            return
        self._expect()

    def _count(self) -> int:
        """Connections that are open, of all processes of the server."""
        num_own = len(self.connections)
        return num_own if self._limits.count is None else self._limits.count(num_own)

    def _make_room(self) -> bool:
        """Closes the connection that has had no request for the longest time."""
        idle = [each for each in self.connections if isinstance(each, BoundedProtocol) and each.idle]
        oldest = min((each for each in idle if each is not self), key=lambda each: each._since, default=None)
        if oldest is None:
            return False
        oldest.transport.abort()
        self.connections.discard(oldest)
        self._count()
        return True

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop(self._deadline)
        self._stop(self._stall)
        self._deadline = self._stall = None
        super().connection_lost(exc)
        self._count()

    # Reading.

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            self._num_dropped += len(data)
            if self._num_dropped > _MAX_DROPPED:
                self.transport.abort()
            return
        if self.idle and self._deadline is None:
            self._expect()
        if self._in_head or not self._in_message:
            data = _without_upgrade(data)
        self._num_overhead += len(data)
        super().data_received(data)
        if (
            self._refusal is None
            and self._num_overhead > MAX_HEADER_BYTES + FRAMING_PER_BYTE * self._num_body
        ):
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_message = True
        self._num_body = self._num_unread = 0
        self._num_headers = self._num_header_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count_header(len(name) + len(value))
        if self._in_head:  # not of a trailer, which nobody reads
            super().on_header(name, value)

    def _count_header(self, num_bytes: int) -> None:
        self._num_header_bytes += num_bytes
        if self._num_header_bytes > MAX_HEADER_BYTES:
            self._end_parsing(_too_large())
        if self._num_headers > MAX_HEADERS:
            self._end_parsing(ApiError(431, f"the request has more than {MAX_HEADERS} headers"))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop(self._deadline)
        self._deadline = None
        if len(self.pipeline) >= MAX_PIPELINED:
            self._end_parsing(ApiError(400, f"more than {MAX_PIPELINED} requests were sent at once"))
        super().on_headers_complete()
        offered: dict[str, Any] = {DIRECT_WRITE: DirectWrite(self.cycle)}
        self.scope["extensions"] = offered

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        self._num_overhead -= len(body)
        if self.idle:
            self._num_unread += len(body)
            if self._num_unread > _MAX_UNREAD:
                self.transport.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._num_overhead = 0
        super().on_message_complete()
        if self.idle and self._deadline is not None:  # the rest of a request that is answered has come
            self._stop(self._deadline)
            self._deadline = None
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since = time.monotonic()
        if self.transport.is_closing():
            self._close()
        elif self._in_message and not self.pipeline:  # it was answered before its end, which is still to come
            self._unset_keepalive_if_required()
            self._expect()

    def _expect(self) -> None:
        """Gives the client some time to send a head, or the rest of a request that is answered."""
        self._stop(self._deadline)
        self._deadline = self.loop.call_later(self._limits.read_timeout, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline = None
        if self.transport.is_closing() or not self.idle:
            return
        if self._in_message and self._in_head:
            seconds = self._limits.read_timeout
            self._refuse(ApiError(408, f"the headers did not come within {seconds:g} seconds"))
        else:
            self._close()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._close()

    # Refusing.

    def _end_parsing(self, error: ApiError) -> NoReturn:
        """Called within the parser, which then ends by `send_400_response`."""
        self._cause = error
        raise ValueError(str(error))

    def send_400_response(self, msg: str) -> None:
        reason = "this is not a valid HTTP request; is it meant for https, or does it state its length twice?"
        self._refuse(self._cause or ApiError(400, reason))

    def _refuse(self, error: ApiError) -> None:
        """Answers with `error` unless another answer is under way, and closes."""
        self._refusal = error
        client = f"{self.client[0]}:{self.client[1]}" if self.client else "unknown"
        logger.warning("refused a request from %s: %d %s", client, error.status, error)
        self._stop(self._deadline)
        self._unset_keepalive_if_required()
        if not self.idle:
            self.transport.abort()
            return
        body = orjson.dumps(error.body())
        head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (error.status, _REASONS[error.status], len(body)) + body)
        # Closed at once, with bytes unread, it would be reset before the client has read the answer.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_SECONDS_TO_READ, self.transport.abort)

    def _close(self) -> None:
        """Closes once what is written is read, which is not waited for much longer."""
        self.transport.close()
        self.loop.call_later(self._limits.write_timeout, self.transport.abort)

    # Writing.

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._watch(self.transport.get_write_buffer_size(), self._limits.write_timeout)

    def resume_writing(self) -> None:
        self._stop(self._stall)
        self._stall = None
        super().resume_writing()

    def _watch(self, size: int, left: float) -> None:
        """Aborts a connection whose client has read nothing for `left` seconds: `size` bytes wait."""
        pause = min(left, self._limits.write_timeout / 4)
        self._stall = self.loop.call_later(pause, self._look, size, left - pause)

    def _look(self, size: int, left: float) -> None:
        now = self.transport.get_write_buffer_size()
        if now < size:
            left = self._limits.write_timeout
        if left > 0:
            self._watch(now, left)
            return
        self._stall = None
        logger.warning(
            "a client has read nothing for %g s; its connection is closed", self._limits.write_timeout
        )
        self.transport.abort()

    @staticmethod
    def _stop(timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()


def _without_upgrade(data: bytes) -> bytes:
    """A head without its proposal of another protocol, which nobody need accept (RFC 9110, 7.8).

    Java's client proposes HTTP/2 with every request; the parser would take the body for that protocol, and drop it.
    """
    head, end, rest = data.partition(b"\r\n\r\n")
    return _UPGRADE.sub(b"x-upgrade", head) + end + rest


def _too_large() -> ApiError:
    return ApiError(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")

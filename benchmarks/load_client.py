"""A client of streamed answers that costs little, since it mostly shares the machine with the server that it loads.

asyncio protocols, httptools (the HTTP parser of Node.js, in C) and orjson, all of which the server needs anyway. At 32
streams of 1,500 chunks a second in all this takes 18 µs of a Zen 4 core a chunk, 1.4 % of two cores; httpx with
httpx-sse takes 104 µs, 7.8 %. uvloop made no difference. Proxies of the environment are not asked.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from urllib.parse import urlsplit

import httptools
import orjson

from sleb.benchmarks.load_events import EventSplitter, Outcome
from sleb.client.connection import error_object, shorten

_MAX_ERROR_BYTES = 1 << 16  # of an answer that is no stream


class _Exchange:
    """One request on a connection: what httptools calls as the answer comes in, and what is made of it."""

    def __init__(self, outcome: Outcome, client: LoadClient) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_untouched = True  # no byte of an answer has come
        self.keeps_open = False
        self._outcome = outcome
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._events = EventSplitter()
        self._body = b""
        self._status = 0
        self._is_stream = False
        self._now = 0.0

    def feed(self, data: bytes, now: float) -> None:
        """Bytes that arrived `now`."""
        self.is_untouched = False
        self._now = now
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"the answer is no HTTP ({shorten(str(error))})")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._is_stream = b"json" not in value

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._is_stream = self._is_stream and self._status == 200

    def on_body(self, body: bytes) -> None:
        if not self._is_stream:
            self._body = (self._body + body)[:_MAX_ERROR_BYTES]
            return
        for data in self._events.feed(body):
            self._client.num_chunks += self._outcome.take(data, self._now)

    def on_message_complete(self) -> None:
        self.keeps_open = self._parser.should_keep_alive()
        self._finish(self._problem("the answer broke off"))

    def lose(self, error: Exception | None) -> None:
        """The connection has closed, which ends an answer without a length, and breaks off any other."""
        reason = "" if error is None else f" ({shorten(str(error)) or type(error).__name__})"
        self._now = time.perf_counter()
        self._finish(self._problem(f"the connection closed{reason}"))

    def _problem(self, broken: str) -> str:
        """Why the answer, of which all has come that will, is no good, `broken` if it has no end; empty if it is."""
        if self._status and self._status != 200:
            return f"HTTP {self._status}: {_message(self._body)}"
        if self._status and not self._is_stream:
            return "the answer is no event stream"
        for data in self._events.finish():
            self._outcome.take(data, self._now)
        if self._outcome.error:
            return self._outcome.error
        if not self._outcome.has_ended:
            return f"{broken} after {len(self._outcome.chunk_times)} chunks"
        return "" if self._outcome.chunk_times else "no text came"

    def _finish(self, problem: str) -> None:
        if self.finished.done():
            return
        self._outcome.error = problem
        self._outcome.end = self._outcome.end or self._now  # [DONE] has told it already
        self.finished.set_result(None)


class _Connection(asyncio.Protocol):
    """A connection that stays open from request to request; one at a time."""

    def __init__(self) -> None:
        self.is_open = False
        self._transport: asyncio.Transport | None = None
        self._exchange: _Exchange | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._exchange is None:
            self.close()  # bytes that nobody asked for
        else:
            self._exchange.feed(data, now)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._exchange is not None:
            self._exchange.lose(error)

    def send(self, request: bytes, exchange: _Exchange) -> None:
        assert self._transport is not None
        self._exchange = exchange
        self._transport.write(request)

    def leave(self) -> None:
        """The answer is whole: the next request may come."""
        self._exchange = None

    def close(self) -> None:
        self.is_open = False
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()


class LoadClient:
    """Streams from one path of a server, over as many connections as there are requests at once.

    url: with scheme and host, as `sleb.client.connection.base_url` gives it. timeout: seconds for a whole request.
    num_chunks: chunks with text so far, of all requests.
    """

    def __init__(self, url: str, path: str, api_key: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.num_chunks = 0
        self._host, self._timeout = parts.hostname, timeout
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: list[_Connection] = []
        head = [
            f"POST {parts.path}/{path} HTTP/1.1",
            f"Host: {parts.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *([] if api_key is None else [f"Authorization: Bearer {api_key}"]),
            "Content-Length: ",
        ]
        self._head = "\r\n".join(head).encode("ascii")

    async def stream(self, body: bytes, outcome: Outcome) -> None:
        """Sends a request and fills in its outcome; a failure of any kind is its `error`.

        body: JSON. Cancelling it closes the connection, by which servers know that nobody listens.
        """
        outcome.start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                await self._ask(body, outcome)
        except TimeoutError:
            self._fail(outcome, f"no whole answer within {self._timeout:g} s")
        except OSError as error:
            reason = shorten(error.strerror or str(error)) or type(error).__name__
            self._fail(outcome, f"no connection ({reason})")

    def _fail(self, outcome: Outcome, reason: str) -> None:
        outcome.error, outcome.end = reason, time.perf_counter()

    async def _ask(self, body: bytes, outcome: Outcome) -> None:
        request = self._head + b"%d\r\n\r\n" % len(body) + body
        while True:
            connection, is_reused = await self._take_connection()
            exchange = _Exchange(outcome, self)
            try:
                connection.send(request, exchange)
                await exchange.finished
            except BaseException:
                connection.close()
                raise
            if exchange.keeps_open and connection.is_open:
                connection.leave()
                self._idle.append(connection)
            else:
                connection.close()
            # A server may close an idle connection just when it is used again: that is no answer, so it is asked anew.
            if not (is_reused and exchange.is_untouched):
                return
            outcome.end, outcome.error = 0.0, ""

    async def _take_connection(self) -> tuple[_Connection, bool]:
        """A connection, and whether it has served before."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, True
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection, False

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()


def _message(body: bytes) -> str:
    """What an error's body says, in a line."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode("utf-8", "replace")
    return shorten(str(error_object(content)["message"]))[:200] or "no message"

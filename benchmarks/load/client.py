"""A client of streamed answers that costs little, since it mostly shares the machine with the server that it loads.

asyncio protocols, httptools (the HTTP parser of Node.js, in C) and orjson, all of which the server needs anyway. At 32
streams of 1,500 chunks a second in all this takes 18 µs of a Zen 4 core a chunk, 1.4 % of two cores; httpx with
httpx-sse takes 104 µs, 7.8 %. uvloop made no difference. Proxies of the environment are not asked.
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import time

import httptools
import httpx

from sleb.benchmarks.load.events import EventSplitter, Outcome, StreamError, error_message, without_key
from sleb.client.connection import shorten

_MAX_ERROR_BYTES = 1 << 16  # of an answer that is no stream
_MAX_ERROR = 200  # characters of what it says


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
        try:
            for data in self._events.feed(body):
                self._client.num_chunks += self._outcome.take(data, self._now)
        except StreamError as error:
            self._finish(str(error))

    def on_message_complete(self) -> None:
        self.keeps_open = self._parser.should_keep_alive()
        self._finish(self._problem("the answer broke off"))

    def lose(self, error: Exception | None) -> None:
        """The connection has closed, which ends an answer without a length, and breaks off any other."""
        reason = "" if error is None else f" ({shorten(str(error)) or type(error).__name__})"
        problem = f"the connection closed{reason}"
        self._now = time.perf_counter()
        try:
            problem = self._problem(problem)
        finally:  # whatever the server has sent, nobody waits for an answer that cannot come
            self._finish(problem)

    def _problem(self, broken: str) -> str:
        """Why the answer, of which all has come that will, is no good, `broken` if it has no end; empty if it is."""
        if self._status and self._status != 200:
            return f"HTTP {self._status}: {error_message(self._body)[:_MAX_ERROR] or 'no message'}"
        if self._status and not self._is_stream:
            return "the answer is no event stream"
        try:
            for data in self._events.finish():
                self._outcome.take(data, self._now)
        except StreamError as error:
            return str(error)
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
        address = httpx.URL(url)  # written as in the requests before the load
        self.num_chunks = 0
        self._host, self._timeout, self._api_key = address.raw_host.decode("ascii"), timeout, api_key
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        self._port = address.port or (443 if self._tls else 80)
        self._idle: list[_Connection] = []
        head = [
            f"POST {address.raw_path.decode('ascii')}/{path} HTTP/1.1",
            f"Host: {address.netloc.decode('ascii')}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            *([] if api_key is None else [f"Authorization: Bearer {api_key}"]),
            "Content-Length: ",
        ]
        self._head = "\r\n".join(head).encode("ascii")

    async def stream(self, body: bytes, outcome: Outcome) -> None:
        """Sends a request and fills in its outcome; a failure of any kind is its `error`, without the key.

        body: JSON. Cancelling it closes the connection, by which servers know that nobody listens.
        """
        outcome.start = time.perf_counter()
        limit = asyncio.timeout(self._timeout)
        try:
            async with limit:
                await self._ask(body, outcome)
        except OSError as error:
            # A connection that nobody answers to is a TimeoutError too, after the system's own time.
            ours = f"no whole answer within {self._timeout:g} s"
            outcome.error = ours if limit.expired() else f"no connection ({_reason(error)})"
            outcome.timed_out = isinstance(error, TimeoutError)
            outcome.end = time.perf_counter()
        outcome.error = without_key(outcome.error, self._api_key)

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


def _reason(error: OSError) -> str:
    """In words, without the address that asyncio puts beside the system's own."""
    code = error.errno or 0
    if code in errno.errorcode and not isinstance(error, ssl.SSLError):  # which numbers its errors itself
        return os.strerror(code)
    return shorten(error.strerror or str(error)) or type(error).__name__

"""A client of an OpenAI-compatible server that costs little, since it mostly shares the machine with the server.

asyncio protocols, httptools (the HTTP parser of Node.js, in C) and orjson, all of which the server needs anyway. At 32
streams of 1,500 chunks a second in all this takes 18 µs of a Zen 4 core a chunk, 1.4 % of two cores; httpx with
httpx-sse, which `sleb chat` uses, takes 104 µs, 7.8 %. uvloop made no difference. Proxies of the environment are not
asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httptools
import httpx
import orjson

from sleb.benchmarks.load.events import EventSplitter, Outcome, StreamError, error_message, without_key
from sleb.client.connection import CONNECT_SECONDS, ClientError, shorten

MAX_REPLY = 4 << 20  # bytes of an answer that is no stream
_MAX_ERROR = 200  # characters of what a server says


@dataclass(frozen=True)
class Reply:
    """A whole answer that was no stream."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def find(self, *path: str | int) -> Any:
        """What a JSON body holds there; None if nothing."""
        with contextlib.suppress(orjson.JSONDecodeError, LookupError, TypeError):
            found = orjson.loads(self.body)
            for key in path:
                found = found[key]
            return found
        return None


class _Exchange:
    """One request on a connection: what httptools calls as the answer comes in.

    What a stream holds goes into `outcome`; of an answer that is none, status, headers and body are kept.
    """

    def __init__(self, client: LoadClient, outcome: Outcome | None) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_untouched = True  # no byte of an answer has come
        self.keeps_open = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.problem = ""
        self._client, self._outcome = client, outcome
        self._parser = httptools.HttpResponseParser(self)
        self._events = EventSplitter()
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
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        is_json = "json" in self.headers.get("content-type", "json")
        self._is_stream = self._outcome is not None and self.status == 200 and not is_json

    def on_body(self, body: bytes) -> None:
        if not self._is_stream:
            self.body += body
            if len(self.body) > MAX_REPLY:
                self._finish(f"the answer has more than {MAX_REPLY >> 20} MiB")
            return
        assert self._outcome is not None
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
        outcome = self._outcome
        if outcome is None:
            return "" if self.status else broken
        if self.status and self.status != 200:
            return f"HTTP {self.status}: {error_message(self.body)[:_MAX_ERROR] or 'no message'}"
        if self.status and not self._is_stream:
            return "the answer is no event stream"
        try:
            for data in self._events.finish():
                outcome.take(data, self._now)
        except StreamError as error:
            return str(error)
        if outcome.error:
            return outcome.error
        if not outcome.has_ended:
            return f"{broken} after {len(outcome.chunk_times)} chunks"
        return "" if outcome.chunk_times else "no text came"

    def _finish(self, problem: str) -> None:
        if self.finished.done():
            return
        self.problem = problem
        if self._outcome is not None:
            self._outcome.error, self._outcome.status = problem, self.status
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
    """Requests to one server, over as many connections as there are requests at once.

    url: with scheme and host, as `sleb.client.connection.base_url` gives it. Paths are below it, but for those with a
    slash before them, which are the server's own. timeout: seconds for a whole request. num_chunks: chunks with text
    so far, of all requests. Of one event loop, as its connections are.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable()):
            raise ClientError("the API key holds characters that no HTTP header can; check --api-key")
        address = httpx.URL(url)
        self.url, self.num_chunks = url, 0
        self._host, self._timeout, self._api_key = address.raw_host.decode("ascii"), timeout, api_key
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        self._port = address.port or (443 if self._tls else 80)
        self._path = address.raw_path.decode("ascii").rstrip("/")
        self._idle: list[_Connection] = []
        key = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._headers = f"Host: {address.netloc.decode('ascii')}\r\nContent-Type: application/json\r\n{key}"

    async def stream(self, path: str, body: bytes, outcome: Outcome) -> None:
        """Posts a request and fills in its outcome; a failure of any kind is its `error`, without the key.

        body: JSON. Cancelling it closes the connection, by which servers know that nobody listens.
        """
        outcome.start = time.perf_counter()
        limit = asyncio.timeout(self._timeout)
        try:
            async with limit:
                await self._exchange("POST", path, body, outcome)
        except OSError as error:
            # A connection that nobody answers to is a TimeoutError too, after the system's own time.
            ours = f"no whole answer within {self._timeout:g} s"
            outcome.error = ours if limit.expired() else f"no connection ({_reason(error)})"
            outcome.timed_out = isinstance(error, TimeoutError)
            outcome.end = time.perf_counter()
        outcome.error = without_key(outcome.error, self._api_key)

    async def ask(self, method: str, path: str, body: bytes = b"", seconds: float | None = None) -> Reply:
        """A whole answer, whatever its status. Raises ClientError where none comes within `seconds`, or the timeout."""
        seconds = self._timeout if seconds is None else min(seconds, self._timeout)
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                exchange = await self._exchange(method, path, body, None)
        except OSError as error:
            if limit.expired():
                raise ClientError(
                    f"{self.url} gave no whole answer within {seconds:g} s; the server may be busy: try again, or "
                    "give a longer --timeout"
                ) from None
            raise ClientError(
                f"no server at {self.url} ({_reason(error)}); start one, as with `sleb serve smollm2`, or give "
                "another address"
            ) from None
        if exchange.problem:
            problem = without_key(exchange.problem, self._api_key)
            raise ClientError(f"{self.url}: {problem}; is this an OpenAI-compatible server?")
        return Reply(exchange.status, exchange.headers, exchange.body)

    async def _exchange(self, method: str, path: str, body: bytes, outcome: Outcome | None) -> _Exchange:
        full = path if path.startswith("/") else f"{self._path}/{path}"
        accept = "*/*" if outcome is None else "text/event-stream"
        head = f"{method} {full} HTTP/1.1\r\n{self._headers}Accept: {accept}\r\nContent-Length: {len(body)}\r\n\r\n"
        while True:
            connection, is_reused = await self._take_connection()
            exchange = _Exchange(self, outcome)
            try:
                connection.send(head.encode("ascii") + body, exchange)
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
                return exchange
            if outcome is not None:
                outcome.end, outcome.error = 0.0, ""

    async def _take_connection(self) -> tuple[_Connection, bool]:
        """A connection, and whether it has served before."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection, True
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        _, connection = await asyncio.wait_for(opening, min(self._timeout, CONNECT_SECONDS))
        return connection, False

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop().close()


def _reason(error: OSError) -> str:
    """In words, without the address that asyncio puts beside the system's own."""
    if isinstance(error, TimeoutError) and not error.errno:
        return "it does not answer"
    code = error.errno or 0
    if code in errno.errorcode and not isinstance(error, ssl.SSLError):  # which numbers its errors itself
        return os.strerror(code)
    return shorten(error.strerror or str(error)) or type(error).__name__

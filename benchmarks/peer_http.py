"""A client that costs little: streamed completions over plain sockets, read as they come.

    python -m sleb.benchmarks.peer_http URL < one JSON list of request bodies a line

For each line it sends all bodies at once and prints the seconds until the last token. It runs beside the server on the
same processors, so what it takes counts as HTTP's: of an event it reads no more than the time, the tokens counted and
whether there is an error.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from sleb.client.connection import CONNECT_SECONDS, error_object, shorten
from sleb.errors import SlebError

_PIECE = 1 << 16
_MAX_ERROR_BYTES = 1 << 16


class ServerError(SlebError):
    """A server failed or refused. status: of HTTP; None where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """One answer. Times are seconds from sending the requests of its run.

    Attributes:
        first, last: of the events with its first and its last token.
        num_tokens, prompt_tokens: as the server counts; None where it does not.
        finish_reason: "length" where it was cut at the number of tokens asked for.
    """

    first: float
    last: float
    num_tokens: int | None
    prompt_tokens: int | None
    finish_reason: str | None


class CompletionClient:
    """Completions of the server at `url`, the address of its API."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        host = parts.netloc.rpartition("@")[2]  # without a name and a password
        lines = [f"POST {parts.path}/completions HTTP/1.1", f"Host: {host}"]
        lines += ["Content-Type: application/json", "Connection: close"]
        if api_key is not None:
            lines.append(f"Authorization: Bearer {api_key}")
        self._head = "\r\n".join(lines)

    def run(self, bodies: Sequence[Mapping[str, Any]], timeout: float = 900.0) -> list[Answer]:
        """All at once, each over a connection of its own, opened before the clock starts. Raises ServerError."""
        try:
            return asyncio.run(asyncio.wait_for(self._run(bodies), timeout))
        except TimeoutError:
            raise ServerError("gave no answer in time") from None
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise ServerError(f"broke off the connection ({shorten(str(error))})") from None

    async def _run(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        requests = [self._request(body) for body in bodies]
        streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        try:
            for _ in requests:
                opening = asyncio.open_connection(self._host, self._port, ssl=self._tls)
                streams.append(await asyncio.wait_for(opening, CONNECT_SECONDS))
            started = time.perf_counter()
            for (_, writer), request in zip(streams, requests, strict=True):
                writer.write(request)
            return await asyncio.gather(*(_read(reader, started) for reader, _ in streams))
        finally:
            for _, writer in streams:
                writer.close()

    def _request(self, body: Mapping[str, Any]) -> bytes:
        data = orjson.dumps(dict(body))
        return f"{self._head}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


async def _read(reader: asyncio.StreamReader, started: float) -> Answer:
    """The answer to one request, to its end."""
    status, headers = await _read_head(reader)
    pieces = _chunks(reader) if "chunked" in headers.get("transfer-encoding", "") else _rest(reader)
    if status != 200:
        raise ServerError(await _refusal(pieces, status), status)
    events = _Events(started)
    async for piece in pieces:
        events.feed(piece)
        if events.done:
            break
    return events.answer()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers, these in lower case."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    words = lines[0].split()
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdecimal():
        raise ServerError(f"answered something that is not HTTP: {shorten(lines[0])}")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(words[1]), {name.strip().lower(): value.strip().lower() for name, _, value in pairs}


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := await _chunk_size(reader):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _chunk_size(reader: asyncio.StreamReader) -> int:
    try:
        line = await reader.readline()
    except ValueError:  # longer than the reader takes
        raise ServerError("sent a broken stream") from None
    if not line:
        raise ServerError("broke off the stream")
    size = line.partition(b";")[0].strip()
    if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", size):
        raise ServerError("sent a broken stream")
    return int(size, 16)


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Up to the end of the connection, which the request asked to close."""
    while piece := await reader.read(_PIECE):
        yield piece


async def _refusal(pieces: AsyncIterator[bytes], status: int) -> str:
    """What the server says of itself, in one line."""
    body = b""
    async for piece in pieces:
        body += piece
        if len(body) > _MAX_ERROR_BYTES:
            break
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode("utf-8", "replace")
    return f"refused (HTTP {status}): {shorten(str(error_object(content)['message']))}"


class _Events:
    """The events of one stream, as far as they count."""

    def __init__(self, started: float) -> None:
        self.done = False
        self._started = started
        self._tail = b""
        self._first: float | None = None
        self._last = 0.0
        self._finish_reason: str | None = None
        self._usage: Mapping[str, Any] = {}

    def feed(self, piece: bytes) -> None:
        """Reads the lines that `piece` ends. Raises ServerError for an error in the stream."""
        now = time.perf_counter() - self._started
        *lines, self._tail = (self._tail + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                self.done = True
            elif data:
                self._event(data, now)

    def _event(self, data: bytes, now: float) -> None:
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError:
            raise ServerError(f"sent an event that is no JSON: {_shown(data)}") from None
        if not isinstance(event, dict):
            raise ServerError(f"answered in another form: {_shown(data)}")
        if event.get("error"):
            raise ServerError(f"failed: {shorten(str(error_object(event)['message']))}")
        usage, choices = event.get("usage") or {}, event.get("choices") or []
        if not (isinstance(usage, dict) and isinstance(choices, list)):
            raise ServerError(f"answered in another form: {_shown(data)}")
        self._usage = usage or self._usage
        if choices:
            if not isinstance(choices[0], dict):
                raise ServerError(f"answered in another form: {_shown(data)}")
            self._first = now if self._first is None else self._first
            self._last = now
            self._finish_reason = choices[0].get("finish_reason") or self._finish_reason

    def answer(self) -> Answer:
        """Of the whole stream. Raises ServerError."""
        if self._first is None:
            raise ServerError("sent a stream without a token")
        counts = [self._count(name) for name in ("completion_tokens", "prompt_tokens")]
        return Answer(self._first, self._last, counts[0], counts[1], self._finish_reason)

    def _count(self, name: str) -> int | None:
        count = self._usage.get(name)
        if count is not None and type(count) is not int:
            raise ServerError(
                f"answered in another form: {name} is {shorten(repr(count))}, which is no number"
            )
        return count


def _shown(data: bytes) -> str:
    return shorten(data.decode(errors="replace"))


def main(url: str) -> None:
    """Serves its standard input, as the module says; a failure of the server ends it."""
    client = CompletionClient(url)
    for line in sys.stdin:
        seconds = max(answer.last for answer in client.run(orjson.loads(line)))
        sys.stdout.write(f"{seconds!r}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])

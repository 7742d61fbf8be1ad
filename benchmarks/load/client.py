"""A client of an OpenAI-compatible server that costs little, since it mostly shares the machine with the server.

asyncio, httptools (the HTTP parser of Node.js, in C) and orjson, all of which the server needs anyway; the
parser of httpx is Python. Proxies of the environment are not asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import httptools
import httpx
import orjson

from sleb.client.connection import CONNECT_SECONDS, ClientError, error_object, shorten

# Where the text of a choice may be: the first two are those of a chat's `delta`, with the two common names of thoughts.
_TEXTS = ("content", "reasoning_content", "reasoning", "text")
_Default = TypeVar("_Default")


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds of time.perf_counter.

    asked_tokens: of the prompt, 0: not known; asked_output: of the answer. chunk_times: arrival of every chunk that
    holds text. usage: the server's own counts. error: why it failed; empty for an answer that came whole. timed_out:
    nothing came for too long. status: of HTTP; 0 where there was no answer. answered_by: the model that the answer
    names.
    """

    model: str
    asked_tokens: int = 0
    asked_output: int = 0
    start: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    end: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    has_ended: bool = False
    timed_out: bool = False
    status: int = 0
    finish_reason: str = ""
    answered_by: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        """By the server's count, else as asked for."""
        return count_of(self.usage, "prompt_tokens", self.asked_tokens)

    @property
    def num_output_tokens(self) -> int:
        """By the server's count, else the chunks with text."""
        return count_of(self.usage, "completion_tokens", len(self.chunk_times))

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the server says it had in its prefix cache."""
        return count_of(self.usage.get("prompt_tokens_details"), "cached_tokens", 0)

    @property
    def first_seconds(self) -> float:
        """From the sending to the first token (TTFT); of an answer that came whole."""
        return self.chunk_times[0] - self.start

    @property
    def seconds(self) -> float:
        """From the sending to the end (E2EL)."""
        return self.end - self.start

    @property
    def token_seconds(self) -> float | None:
        """Per token after the first (TPOT); None for a single token."""
        num_after_first = self.num_output_tokens - 1
        return (self.seconds - self.first_seconds) / num_after_first if num_after_first > 0 else None

    @property
    def gaps(self) -> list[float]:
        """Between chunks with text (ITL)."""
        return [later - earlier for earlier, later in pairwise(self.chunk_times)]

    def take(self, data: bytes, now: float) -> bool:
        """Takes in the data of an event that arrived `now`; whether it held text. What it cannot be is an `error`.

        A chunk without text, as the one that only names the role, counts for nothing.
        """
        if data == b"[DONE]":
            self.has_ended, self.end = True, now
            return False
        has_text, problem = False, ""
        try:
            chunk = orjson.loads(data)
            if chunk.get("error") or chunk.get("object") == "error":
                problem = f"error in the stream: {_message(chunk)}"
            self.usage = dict(chunk.get("usage") or self.usage)
            self.answered_by = self.answered_by or str(chunk.get("model") or "")
            for choice in chunk.get("choices") or ():
                part = choice.get("delta") or choice
                has_text = has_text or any(part.get(name) for name in _TEXTS)
                if choice.get("finish_reason"):
                    self.has_ended, self.finish_reason = True, str(choice["finish_reason"])
        except (ValueError, TypeError, AttributeError):
            has_text = False
            problem = f"an event is no chunk of an answer: {shorten(data[:80].decode(errors='replace'))}"
        self.error = self.error or problem
        if has_text:
            self.chunk_times.append(now)
        return has_text


def count_of(counts: Any, name: str, otherwise: _Default) -> int | _Default:
    """A number of tokens in a JSON value, `otherwise` where it holds none."""
    found = counts.get(name) if isinstance(counts, Mapping) else None
    return found if type(found) is int and found >= 0 else otherwise


def error_message(body: bytes) -> str:
    """What the body of an answer that tells an error says, in a line; empty if nothing."""
    try:
        return _message(orjson.loads(body))
    except orjson.JSONDecodeError:
        return _message(body.decode("utf-8", "replace"))


def _message(content: Any) -> str:
    return shorten(str(error_object(content)["message"]))


class EventSplitter:
    """Cuts the body of a text/event-stream, in whatever pieces it comes, into the data of its events.

    As the HTML standard says (section 9.2.6), of which only a bare CR as a line's end is not known.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that `piece` completes; a blank line completes the last."""
        *lines, self._tail = (self._tail + piece).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                yield b"\n".join(self._data)
                self._data.clear()


class Reply:
    """An answer, as httptools tells it. A stream has no `body`: it is what `outcome` took in."""

    def __init__(self, outcome: Outcome | None) -> None:
        self.status, self.body = 0, b""
        self.broken = "the connection closed"  # what ends no answer breaks it off
        self.is_stream = self.is_whole = self.keeps_open = False
        self.parser = httptools.HttpResponseParser(self)
        self._outcome, self._events = outcome, EventSplitter()
        self._type = b"json"

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._type = value

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.is_stream = self._outcome is not None and self.status == 200 and b"json" not in self._type

    def on_body(self, body: bytes) -> None:
        if self._outcome is None or not self.is_stream:
            self.body += body
            return
        for data in self._events.feed(body):
            self._outcome.take(data, self.now)

    def on_message_complete(self) -> None:
        self.is_whole, self.keeps_open = True, self.parser.should_keep_alive()

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Until all has come that will."""
        try:
            while not self.is_whole and (data := await reader.read(1 << 16)):
                self.now = time.perf_counter()
                self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.broken = f"the answer is no HTTP ({shorten(str(error))})"
        except ConnectionError as error:
            self.broken += f" ({_reason(error)})"
        self.now = time.perf_counter()
        if self.is_stream:
            self.on_body(b"\n\n")  # the last event may lack its blank line

    @property
    def problem(self) -> str:
        """Why a stream of which all has come that will is no good; empty if it is."""
        outcome = self._outcome
        if not self.status or outcome is None:
            return self.broken
        if self.status != 200:
            return f"HTTP {self.status}: {error_message(self.body)[:200] or 'no message'}"
        if not self.is_stream:
            return "the answer is no event stream"
        if outcome.error or outcome.has_ended:
            return outcome.error or ("" if outcome.chunk_times else "no text came")
        return f"{'the answer broke off' if self.is_whole else self.broken} after {len(outcome.chunk_times)} chunks"

    def find(self, *path: str | int) -> Any:
        """What a JSON body holds there; None if nothing."""
        with contextlib.suppress(orjson.JSONDecodeError, LookupError, TypeError):
            found = orjson.loads(self.body)
            for key in path:
                found = found[key]
            return found
        return None


class LoadClient:
    """Requests to one server, over as many connections as there are requests at once.

    url: with scheme and host, as `sleb.client.connection.base_url` gives it. Paths are below it, but for those with a
    slash before them, which are the server's own. timeout: seconds for a whole request. Of one event loop, as its
    connections are. Nothing that comes back holds the key.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        if api_key is not None and (not api_key.isascii() or not api_key.isprintable()):
            raise ClientError("the API key holds characters that no HTTP header can; check --api-key")
        address = httpx.URL(url)
        self.url = url
        self._host, self._timeout, self._api_key = address.raw_host.decode("ascii"), timeout, api_key
        self._tls = ssl.create_default_context() if address.scheme == "https" else None
        self._port = address.port or (443 if self._tls else 80)
        self._path = address.raw_path.decode("ascii").rstrip("/")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        key = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._headers = f"Host: {address.netloc.decode('ascii')}\r\nContent-Type: application/json\r\n{key}"

    async def stream(self, path: str, body: bytes, outcome: Outcome) -> None:
        """Posts a request and fills in its outcome; a failure of any kind is its `error`.

        body: JSON. Cancelling it closes the connection, by which servers know that nobody listens.
        """
        outcome.start = time.perf_counter()
        try:
            reply = await self._exchange("POST", path, body, outcome)
            outcome.status, outcome.error = reply.status, reply.problem
            outcome.end = outcome.end or reply.now  # [DONE] told it already
        except OSError as error:
            outcome.error, outcome.timed_out = str(error), isinstance(error, TimeoutError)
            outcome.end = time.perf_counter()
        outcome.error = without_key(outcome.error, self._api_key)

    async def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """A whole answer, whatever its status. Raises ClientError where none comes."""
        try:
            reply = await self._exchange(method, path, body, None)
        except TimeoutError as error:
            remedy = "the server may be busy: try again, or give a longer --timeout"
            raise ClientError(f"{self.url}: {error}; {remedy}") from None
        except OSError as error:
            remedy = "start one, as with `sleb serve smollm2`, or give another address"
            raise ClientError(f"no server at {self.url}: {error}; {remedy}") from None
        if not reply.status:
            raise ClientError(f"{self.url}: {reply.broken}; is this an OpenAI-compatible server?")
        reply.body = without_key(reply.body.decode("utf-8", "replace"), self._api_key).encode()
        return reply

    async def _exchange(self, method: str, path: str, body: bytes, outcome: Outcome | None) -> Reply:
        """Raises TimeoutError or another OSError, in words for people."""
        full = path if path.startswith("/") else f"{self._path}/{path}"
        head = f"{method} {full} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode("ascii") + body
        limit = asyncio.timeout(self._timeout)
        try:
            async with limit:
                while True:
                    is_reused = bool(self._idle)
                    reader, writer = self._idle.pop() if is_reused else await self._connect()
                    reply = Reply(outcome)
                    try:
                        writer.write(request)
                        await reply.read(reader)
                    finally:
                        if reply.keeps_open:
                            self._idle.append((reader, writer))
                        else:
                            writer.transport.abort()
                    # A server may close an idle connection just when it is used again, so it is asked anew.
                    if reply.status or not is_reused:
                        return reply
        except OSError as error:
            if limit.expired():
                raise TimeoutError(f"no whole answer within {self._timeout:g} s") from None
            kind = TimeoutError if isinstance(error, TimeoutError) else OSError
            raise kind(f"no connection ({_reason(error)})") from None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        opening = asyncio.open_connection(self._host, self._port, ssl=self._tls)
        return await asyncio.wait_for(opening, min(self._timeout, CONNECT_SECONDS))

    def close(self) -> None:
        """Closes the idle connections."""
        while self._idle:
            self._idle.pop()[1].transport.abort()


def _reason(error: OSError) -> str:
    """In words, without the address that asyncio puts beside the system's own."""
    if isinstance(error, TimeoutError) and not error.errno:
        return "it does not answer"
    if (error.errno or 0) > 0 and not isinstance(error, ssl.SSLError):  # which numbers its errors itself
        return os.strerror(error.errno or 0)
    return shorten(error.strerror or str(error))


def without_key(text: str, api_key: str | None) -> str:
    """`text` without the key, which a server may repeat, where it is a word of its own: a short one is part of many."""
    return re.sub(rf"(?<!\w){re.escape(api_key)}(?!\w)", "…", text) if api_key else text

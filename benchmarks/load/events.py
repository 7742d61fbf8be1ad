"""What one streamed answer of an OpenAI-compatible server says, chunk by chunk, with the times of their arrival."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import orjson

from sleb.client.connection import error_object, shorten

MAX_EVENT = 1 << 20  # bytes of an event, or of a line without an end
_DONE = b"[DONE]"
# Where the text of a choice may be: the first two are those of a chat's `delta`, with the two common names of thoughts.
_TEXTS = ("content", "reasoning_content", "reasoning", "text")
_COUNTS = ("prompt_tokens", "completion_tokens")
_LONG_KEY = 8  # characters; such a key is part of no word by chance


class StreamError(ValueError):
    """A stream of which nothing more can be read."""


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds of time.perf_counter.

    Attributes:
        asked_tokens: of the prompt, where its length was asked for, else 0; asked_output: of the answer.
        due: when it was to be sent; start: when it was.
        chunk_times: arrival of every chunk that holds text; the first one's is that of the first token.
        end: arrival of the end of the answer.
        usage: the server's own counts; empty where it gives none.
        error: why it failed; empty for an answer that came whole.
        timed_out: whether it failed because nothing came for too long.
        status: of HTTP; 0 where there was no answer. finish_reason: as the server says.
    """

    model: str
    asked_tokens: int = 0
    asked_output: int = 0
    due: float = 0.0
    start: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    end: float = 0.0
    usage: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    has_ended: bool = False
    timed_out: bool = False
    status: int = 0
    finish_reason: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        """By the server's count, else as asked for."""
        return self._count("prompt_tokens", self.asked_tokens)

    @property
    def num_output_tokens(self) -> int:
        """By the server's count, else the chunks with text."""
        return self._count("completion_tokens", len(self.chunk_times))

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the server says it had in its prefix cache."""
        details = self.usage.get("prompt_tokens_details")
        found = details.get("cached_tokens") if isinstance(details, Mapping) else None
        return found if is_count(found) else 0

    def _count(self, name: str, otherwise: int) -> int:
        found = self.usage.get(name)
        return found if is_count(found) else otherwise

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
        return [
            later - earlier for earlier, later in zip(self.chunk_times, self.chunk_times[1:], strict=False)
        ]

    def take(self, data: bytes, now: float) -> bool:
        """Takes in the data of an event that arrived `now`; whether it held text. What it cannot be is an `error`."""
        if data == _DONE:
            self.has_ended = True
            self.end = now
            return False
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            return self._refuse(f"an event is no JSON object: {_excerpt(data)}")
        if chunk.get("error") or chunk.get("object") == "error":
            return self._refuse(f"error in the stream: {_message(chunk)}")
        if chunk.get("usage") is not None:
            usage = chunk["usage"]
            if not isinstance(usage, dict) or not all(_may_be_count(usage.get(name)) for name in _COUNTS):
                return self._refuse(f"the usage in an event holds no counts: {_excerpt(data)}")
            self.usage = usage
        return self._take_choices(chunk.get("choices"), data, now)

    def _take_choices(self, choices: Any, data: bytes, now: float) -> bool:
        """A chunk without text, as the one that only names the role, counts for nothing."""
        has_text = False
        if not isinstance(choices, list | None):
            return self._refuse(f"the choices in an event are no list: {_excerpt(data)}")
        for choice in choices or ():
            part = (choice.get("delta") or choice) if isinstance(choice, dict) else None
            if not isinstance(part, dict):
                return self._refuse(f"a choice in an event has no delta or text: {_excerpt(data)}")
            has_text = has_text or any(part.get(name) for name in _TEXTS)
            if choice.get("finish_reason"):
                self.has_ended, self.finish_reason = True, str(choice["finish_reason"])
        if has_text:
            self.chunk_times.append(now)
        return has_text

    def _refuse(self, problem: str) -> bool:
        """The first problem is the one that is told."""
        self.error = self.error or problem
        return False


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value of a JSON object is a number of tokens."""
    return type(value) is int and value >= 0


def _may_be_count(value: Any) -> bool:
    return value is None or is_count(value)


def _excerpt(data: bytes) -> str:
    return shorten(data[:80].decode(errors="replace"))


def error_message(body: bytes) -> str:
    """What the body of an answer that tells an error says, in a line; empty if nothing."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        content = body.decode("utf-8", "replace")
    return _message(content)


def _message(content: Any) -> str:
    try:
        return shorten(str(error_object(content)["message"]))
    except RecursionError:  # lists in lists in lists
        return "an error that is nested too deeply"


def without_key(text: str, api_key: str | None) -> str:
    """`text` without the key, which a server may repeat; a short one is looked for as a word of its own only."""
    if not api_key:
        return text
    found = re.escape(api_key)
    return re.sub(found if len(api_key) >= _LONG_KEY else rf"(?<!\w){found}(?!\w)", "…", text)


class EventSplitter:
    """Cuts the body of a text/event-stream, in whatever pieces it comes, into the data of its events.

    As the HTML standard says (section 9.2.6), of which only a bare CR as a line's end is not known.
    """

    def __init__(self) -> None:
        self._unfinished: list[bytes] = []  # pieces of a line, joined once it is whole
        self._num_unfinished = 0
        self._data: list[bytes] = []
        self._num_data = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that `piece` completes. Raises StreamError for one of more than MAX_EVENT bytes."""
        self._unfinished.append(piece)
        self._num_unfinished += len(piece)
        if b"\n" in piece:
            *lines, tail = b"".join(self._unfinished).split(b"\n")
            self._unfinished, self._num_unfinished = [tail], len(tail)
            for line in lines:
                yield from self._take_line(line)
        if self._num_unfinished > MAX_EVENT:
            self._give_up()

    def finish(self) -> Iterator[bytes]:
        """What an end of the stream without a blank line leaves. Raises StreamError."""
        yield from self._take_line(b"".join(self._unfinished))
        yield from self._take_line(b"")

    def _take_line(self, line: bytes) -> Iterator[bytes]:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._num_data += len(line)
            if self._num_data > MAX_EVENT:
                self._give_up()
        elif not line and self._data:
            yield b"\n".join(self._data)
            self._data.clear()
            self._num_data = 0

    def _give_up(self) -> None:
        """Keeps nothing of a stream that would fill the memory."""
        self._unfinished, self._num_unfinished = [], 0
        self._data, self._num_data = [], 0
        raise StreamError(f"an event of the stream has more than {MAX_EVENT >> 20} MiB")

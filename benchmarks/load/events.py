"""What one streamed answer of an OpenAI-compatible server says, chunk by chunk, with the times of their arrival."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import orjson

from sleb.client.connection import error_object, shorten

# Where the text of a choice may be: the first two are those of a chat's `delta`, with the two common names of thoughts.
_TEXTS = ("content", "reasoning_content", "reasoning", "text")
_Default = TypeVar("_Default")


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times are seconds of time.perf_counter.

    Attributes:
        asked_tokens: of the prompt, where its length was asked for, else 0; asked_output: of the answer.
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

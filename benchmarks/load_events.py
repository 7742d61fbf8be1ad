"""What one streamed answer of an OpenAI-compatible server says, chunk by chunk, with the times of their arrival."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from sleb.client.connection import error_object, shorten

_DONE = b"[DONE]"
# Where the text of a choice may be: the first two are those of a chat's `delta`, with the two common names of thoughts.
_TEXTS = ("content", "reasoning_content", "reasoning", "text")


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
        return found if isinstance(found, int) else 0

    def _count(self, name: str, otherwise: int) -> int:
        found = self.usage.get(name)
        return found if isinstance(found, int) else otherwise

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
        """Takes in the data of an event that arrived `now`; whether it held text."""
        if data == _DONE:
            self.has_ended = True
            self.end = now
            return False
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            chunk = None
        if not isinstance(chunk, dict):
            self.error = (
                self.error or f"an event is no JSON object: {shorten(data[:80].decode(errors='replace'))}"
            )
            return False
        if chunk.get("error") or chunk.get("object") == "error":
            self.error = f"error in the stream: {shorten(str(error_object(chunk)['message']))}"
            return False
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        return self._take_choices(chunk.get("choices") or (), now)

    def _take_choices(self, choices: Any, now: float) -> bool:
        """A chunk without text, as the one that only names the role, counts for nothing."""
        has_text = False
        for choice in choices:
            part = choice.get("delta") or choice
            has_text = has_text or any(part.get(name) for name in _TEXTS)
            if choice.get("finish_reason"):
                self.has_ended = True
        if has_text:
            self.chunk_times.append(now)
        return has_text


class EventSplitter:
    """Cuts the body of a text/event-stream, in whatever pieces it comes, into the data of its events.

    As the HTML standard says (section 9.2.6), of which only a bare CR as a line's end is not known.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that `piece` completes."""
        *lines, self._tail = (self._tail + piece).split(b"\n")
        for line in lines:
            yield from self._take_line(line)

    def finish(self) -> Iterator[bytes]:
        """What an end of the stream without a blank line leaves."""
        yield from self._take_line(self._tail)
        yield from self._take_line(b"")

    def _take_line(self, line: bytes) -> Iterator[bytes]:
        line = line.removesuffix(b"\r")
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
        elif not line and self._data:
            yield b"\n".join(self._data)
            self._data.clear()

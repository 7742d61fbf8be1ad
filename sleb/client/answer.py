"""One streamed chat answer: its pieces as they come, and what is known about it afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
from httpx_sse import EventSource

from sleb.client.connection import ClientError, error_object, explained, refusal, shorten

Kind = Literal["content", "reasoning"]


@dataclass
class Answer:
    """What came so far. Times in seconds by this machine's clock, from the sending of the request.

    `num_pieces` counts the events that held text: an estimate of the tokens where the server tells no `usage`.
    """

    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None
    num_pieces: int = 0
    first_seconds: float | None = None
    last_seconds: float = 0.0
    _start: float = field(default_factory=time.monotonic, repr=False)

    def stream(self, client: httpx.Client, body: dict[str, Any]) -> Generator[tuple[Kind, str], None, None]:
        """Asks, and yields pieces of text. Closing the iterator closes the connection. Raises ClientError."""
        url = str(client.base_url).rstrip("/")
        headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
        with (
            explained(url),
            client.stream("POST", "chat/completions", json=body, headers=headers) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise refusal(response, url)
            if "json" in response.headers.get("content-type", ""):  # a server that does not stream
                response.read()
                yield from self._read_object(response.text, "message")
                return
            yield from self._read_events(response)
        if self.finish_reason is None:
            raise ClientError("the answer broke off before its end; /retry asks again")

    def _read_events(self, response: httpx.Response) -> Iterator[tuple[Kind, str]]:
        if "text/event-stream" not in response.headers.get("content-type", ""):
            kind = response.headers.get("content-type", "of no type")
            raise ClientError(
                f"the answer is no event stream but {kind}; is this an OpenAI-compatible server?"
            )
        for event in EventSource(response).iter_sse():
            if event.data == "[DONE]":
                return
            yield from self._read_object(event.data, "delta")

    def _read_object(self, text: str, part: str) -> Iterator[tuple[Kind, str]]:
        try:
            chunk = json.loads(text)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise ClientError(f"the server sent what is no JSON object: {shorten(text[:80])}")
        if chunk.get("error"):
            said = shorten(str(error_object(chunk)["message"]))
            raise ClientError(f"the server broke the answer off: {said}; /retry asks again")
        self.usage = chunk.get("usage") or self.usage
        self.timings = chunk.get("timings") or self.timings
        for choice in chunk.get("choices") or ():
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            delta = choice.get(part) or {}
            # The field's name in DeepSeek's API and llama.cpp, and the one that OpenRouter and newer vLLM use.
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            content = delta.get("content")
            if reasoning or content:
                self._mark_time()
            if reasoning:
                self.reasoning += reasoning
                yield "reasoning", reasoning
            if content:
                self.content += content
                yield "content", content

    def _mark_time(self) -> None:
        self.num_pieces += 1
        self.last_seconds = time.monotonic() - self._start
        if self.first_seconds is None:
            self.first_seconds = self.last_seconds

    def statistics(self) -> str:
        """Time to the first text, tokens and tokens a second in a line; the server's own figures where it has them."""
        if self.first_seconds is None:
            return "no text came"
        parts = [f"first text after {self.first_seconds:.2f} s"]
        usage, timings = self.usage or {}, self.timings or {}
        if isinstance(usage.get("prompt_tokens"), int):
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            parts.append(
                f"prompt {usage['prompt_tokens']} tokens" + (f" ({cached} cached)" if cached else "")
            )
        num_tokens, about = usage.get("completion_tokens"), ""
        if not isinstance(num_tokens, int):
            num_tokens, about = self.num_pieces, "about "
        parts.append(f"answer {about}{num_tokens} tokens")
        rate = timings.get("predicted_per_second")
        seconds = self.last_seconds - self.first_seconds
        if not isinstance(rate, int | float) or not rate:
            rate = (num_tokens - 1) / seconds if seconds > 0 and num_tokens > 1 else None
        if rate is not None:
            parts.append(f"{about}{rate:.1f} tokens/s")
        if self.finish_reason is not None:
            parts.append(f"ended by {self.finish_reason}")
        return ", ".join(parts)

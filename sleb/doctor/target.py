"""The server under examination: requests, and answers of the expected shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import httpx
from httpx_sse import EventSource

from sleb.client.connection import error_of, shorten
from sleb.doctor.outcome import MissingFeatureError, expect, fail, skip

Json = dict[str, Any]

CHAT = "chat/completions"
COMPLETIONS = "completions"
QUESTION = "Name three colours and say one sentence about each of them."
PROMPT = "The three primary colours are"
GREEDY: Json = {"temperature": 0, "max_tokens": 24}
_NOT_THERE = (404, 405, 501)
_MAX_SHOWN = 160


@dataclass
class Stream:
    """A stream that was read to its end. `data` holds the events' data; `chunks` those that are JSON."""

    response: httpx.Response
    data: list[str]
    chunks: list[Json] = field(default_factory=list)

    @property
    def choices(self) -> list[Json]:
        """All choices of all chunks, in order."""
        return [choice for chunk in self.chunks for choice in chunk["choices"]]

    def text(self, index: int = 0) -> str:
        """The joined text of a choice, of chat or of plain completions."""
        own = [choice for choice in self.choices if choice["index"] == index]
        return "".join((c["delta"].get("content") if "delta" in c else c["text"]) or "" for c in own)

    def finish_reasons(self, index: int = 0) -> list[str]:
        """The reasons that are not null."""
        reasons = [choice.get("finish_reason") for choice in self.choices if choice["index"] == index]
        return [reason for reason in reasons if reason is not None]


class Target:
    """A server, the model to ask for, and helpers that end a check when the answer is no answer.

    `http` has the API (…/v1) as its base; `root` is the address above it.
    """

    def __init__(self, http: httpx.Client, model: str | None, api_key: str | None = None) -> None:
        self.http = http
        self.model = model
        self.api_key = api_key
        self.url = str(http.base_url).rstrip("/")
        self.root = self.url.removesuffix("/v1")

    def fields(self, **fields: Any) -> Json:
        """A body with the model, unless it is given."""
        return ({} if self.model is None else {"model": self.model}) | fields

    def post(self, path: str, **fields: Any) -> httpx.Response:
        """POST of a JSON body to a path below the API, or to an absolute address."""
        return self.http.post(path, json=self.fields(**fields))

    def get_root(self, path: str) -> httpx.Response:
        """GET of a path above the API, such as /health."""
        return self.http.get(self.root + path)

    def chat(self, content: Any = QUESTION, **fields: Any) -> Json:
        """A whole chat answer; `messages` overrides `content`."""
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        return ok(self.post(CHAT, messages=messages, **fields))

    def complete(self, prompt: Any = PROMPT, **fields: Any) -> Json:
        """A whole completion."""
        return ok(self.post(COMPLETIONS, prompt=prompt, **fields))

    def stream_chat(self, content: Any = QUESTION, **fields: Any) -> Stream:
        """A streamed chat answer, read to its end."""
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        return read_stream(self.post(CHAT, messages=messages, stream=True, **fields))

    def stream_completion(self, prompt: Any = PROMPT, **fields: Any) -> Stream:
        """A streamed completion, read to its end."""
        return read_stream(self.post(COMPLETIONS, prompt=prompt, stream=True, **fields))

    @contextmanager
    def open_stream(self, **fields: Any) -> Iterator[Iterator[Json]]:
        """The chunks of a streamed completion as they come; leaving closes the connection."""
        body = self.fields(prompt=PROMPT, stream=True, **fields)
        with self.http.stream("POST", COMPLETIONS, json=body) as response:
            if response.status_code != 200:
                response.read()
                ok(response)
            events = EventSource(response).iter_sse()
            yield (json.loads(event.data) for event in events if event.data != "[DONE]")

    @cached_property
    def card(self) -> Json:
        """What /models tells of the model."""
        cards = ok(self.http.get("models"))["data"]
        found = [card for card in cards if card["id"] == self.model] or cards
        return dict(found[0])

    @property
    def max_model_len(self) -> int:
        """The context of the model in tokens; skips the check where the server does not tell it."""
        length = self.card.get("max_model_len") or (self.card.get("meta") or {}).get("n_ctx")
        if not isinstance(length, int):
            skip("the server does not tell the length of its context")
        return length

    @cached_property
    def sample(self) -> str:
        """A greedy completion of PROMPT by 24 tokens; skips the check where it is too short to work with."""
        text = str(self.complete(**GREEDY)["choices"][0]["text"])
        if len(text) < 4:
            skip(f"the model's greedy answer is only {shown(text)}")
        return text

    def stop_string(self, text: str | None = None) -> str:
        """A few characters from the middle of `text`, whole ones that no tokenizer rewrites. None: of `sample`."""
        text = self.sample if text is None else text
        pairs = [text[start : start + 2] for start in range(len(text) // 3, len(text) - 1)]
        fit = [each for each in pairs if each.isprintable() and "\ufffd" not in each and " " not in each]
        if not fit:
            skip("the model's greedy answer holds no text to stop at")
        return fit[0]

    def refused(self, response: httpx.Response, *statuses: int) -> Json:
        """The error of a request that must be refused with one of `statuses` and a message."""
        status = response.status_code
        wanted = " or ".join(map(str, statuses))
        expect(status in statuses, f"HTTP {status} instead of {wanted}: {shown(response.text)}")
        try:
            error = response.json()["error"]
            is_message = isinstance(error["message"], str) and error["message"]
        except (ValueError, KeyError, TypeError):
            fail(f"HTTP {status}, but its body has no error.message: {shown(response.text)}")
        expect(is_message, f"error.message is {shown(error['message'])}")
        return dict(error)


def ok(response: httpx.Response) -> Json:
    """The JSON object of a 200; ends the check as missing or failed for anything else."""
    status = response.status_code
    if status in _NOT_THERE:
        raise MissingFeatureError(f"HTTP {status}: {shown(str(error_of(response)['message']))}")
    expect(status == 200, f"HTTP {status}: {shown(str(error_of(response)['message']))}")
    content = response.json()
    expect(isinstance(content, dict), f"the answer is no JSON object: {shown(response.text)}")
    return dict(content)


def read_stream(response: httpx.Response) -> Stream:
    """The events of an answer that was read; ends the check if it is no event stream of JSON objects."""
    if response.status_code != 200:
        ok(response)
    kind = response.headers.get("content-type", "of no type")
    expect("text/event-stream" in kind, f"the content type is {kind}")
    stream = Stream(response, [event.data for event in EventSource(response).iter_sse()])
    for data in stream.data:
        if data != "[DONE]":
            chunk = json.loads(data)
            expect("error" not in chunk, f"an error in the stream: {shown(data)}")
            stream.chunks.append(chunk)
    expect(stream.chunks, "the stream holds no chunk")
    return stream


def read_events(response: httpx.Response) -> list[tuple[str, Json]]:
    """The events of a stream with their names; ends the check if there are none, or one is an error."""
    if response.status_code != 200:
        ok(response)
    kind = response.headers.get("content-type", "of no type")
    expect("text/event-stream" in kind, f"the content type is {kind}")
    events = [(event.event, json.loads(event.data)) for event in EventSource(response).iter_sse()]
    expect(events, "the stream holds no event")
    for name, event in events:
        expect(name != "error", f"an error in the stream: {shown(json.dumps(event))}")
    return events


def shown(value: object) -> str:
    """A value for a reason: one line, cut."""
    text = shorten(value if isinstance(value, str) else repr(value))
    text = text if text.isprintable() else ascii(text)[1:-1]
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")

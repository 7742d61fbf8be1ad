"""Answers in the shape of Anthropic's Messages: content blocks, and the events that tell them one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, Json
from typing_extensions import TypedDict

from sleb.server.answer.converse import Begun
from sleb.server.answer.partial_json import JsonBeginning, read_object
from sleb.server.answer.streaming import named_event
from sleb.server.answer.writer import AnswerWriter, Piece
from sleb.server.answer_models import Count, RequestMetrics, Timings
from sleb.server.errors import ApiError
from sleb.server.ids import new_id
from sleb.server.message.reasoning import Delta

SIGNATURE = "unsigned"  # clients feed only thoughts back that have one; nobody here checks it
NO_THREADS = "thread_unsupported_request"  # at which Anthropic's clients send the whole conversation instead
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
_PARTS = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "arguments": ("input_json_delta", "partial_json"),
}


class MessagesUsage(TypedDict):
    """input_tokens are those that were not cached."""

    input_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count
    output_tokens: Count


class MessagesText(TypedDict):
    type: Literal["text"]
    text: str


class MessagesThinking(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class MessagesToolUse(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


MessagesBlock = Annotated[MessagesText | MessagesThinking | MessagesToolUse, Field(discriminator="type")]
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesAnswer(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessagesBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessagesUsage
    timings: NotRequired[Timings]
    metrics: NotRequired[RequestMetrics]


class MessageStart(TypedDict):
    type: Literal["message_start"]
    message: MessagesAnswer


class BlockStart(TypedDict):
    type: Literal["content_block_start"]
    index: Count
    content_block: MessagesBlock


class BlockPart(TypedDict):
    """One of `text`, `thinking`, `signature`, `partial_json`, as the type says."""

    type: Literal["text_delta", "thinking_delta", "signature_delta", "input_json_delta"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    partial_json: NotRequired[str]


class BlockDelta(TypedDict):
    type: Literal["content_block_delta"]
    index: Count
    delta: BlockPart


class BlockStop(TypedDict):
    type: Literal["content_block_stop"]
    index: Count


class StopDelta(TypedDict):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(TypedDict):
    type: Literal["message_delta"]
    delta: StopDelta
    usage: MessagesUsage
    timings: Timings
    metrics: RequestMetrics


class MessageStop(TypedDict):
    type: Literal["message_stop"]


class Ping(TypedDict):
    type: Literal["ping"]


class ErrorDetails(TypedDict):
    error_code: str
    unsupported: list[str]


class ErrorObject(TypedDict):
    type: str
    message: str
    details: NotRequired[ErrorDetails]


class MessagesError(TypedDict):
    """Every error of Anthropic's paths, whatever its status."""

    type: Literal["error"]
    error: ErrorObject
    request_id: str


class MessagesEvent(TypedDict):
    """`event` is the type of the data."""

    event: str
    data: Json[
        MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping | MessagesError
    ]


def error_body(error: ApiError, request_id: str) -> dict[str, Any]:
    """An error in Anthropic's shape."""
    if error.code == "overloaded":
        kind = "overloaded_error"
    else:
        kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    told = {"type": kind, "message": error.body()["error"]["message"]}
    if error.code == NO_THREADS:
        told["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": told, "request_id": request_id}


class MessagesWriter(AnswerWriter):
    """One message; a whole one is the fold of the events that would stream it.

    shows_thoughts: otherwise their blocks are empty.
    """

    silence = named_event({"type": "ping"})

    def __init__(self, begun: Begun, stream: bool, shows_thoughts: bool = True) -> None:
        super().__init__(begun.context, begun.generation, stream, begun.shape.make_parser)
        self._shows_thoughts = shows_thoughts
        self._index = -1
        self._open: str | None = None  # the kind of the block that has begun: content, reasoning or arguments
        self._arguments = JsonBeginning()  # clients fail on what is no JSON, whatever the model wrote
        self._last = Piece(0)

    def encode(self, event_: Any) -> bytes:
        return named_event(event_)

    def failure(self, error: ApiError) -> bytes:
        return named_event(error_body(error, self.generation.request_id))

    def opening(self) -> list[Any]:
        message: dict[str, Any] = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.generation.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }
        return [{"type": "message_start", "message": message}]

    def events(self, piece: Piece) -> list[Any]:
        self._last = piece
        return [event for delta in piece.deltas for event in self._of_delta(delta)]

    def closing(self) -> list[Any]:
        begun = (
            self._begin("content") if self._index < 0 else []
        )  # a message has a block, even of an empty text
        stop = {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        told = {"timings": self.generation.timings(), "metrics": self.generation.metrics()}
        return [*begun, *self._end(), stop | told, {"type": "message_stop"}]

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        return fold([*self.opening(), *self.events(pieces[0]), *self.closing()])

    def _of_delta(self, delta: Delta) -> list[Any]:
        if delta.kind == "call":
            self._arguments = JsonBeginning()
            block = {
                "type": "tool_use",
                "id": new_id("toolu_", 24),
                "name": delta.text,
                "input": {},
            }
            return self._begin("arguments", block)
        begun = [] if self._open == delta.kind else self._begin(delta.kind)
        if delta.kind == "reasoning" and not self._shows_thoughts:
            return begun
        text = self._arguments.push(delta.text) if delta.kind == "arguments" else delta.text
        if not text:
            return begun
        kind, field = _PARTS[delta.kind]
        return [*begun, self._delta({"type": kind, field: text})]

    def _begin(self, kind: str, block: dict[str, Any] | None = None) -> list[Any]:
        ended = self._end()
        self._open, self._index = kind, self._index + 1
        if block is None:
            block = {"type": "text", "text": ""}
            if kind == "reasoning":
                block = {"type": "thinking", "thinking": "", "signature": ""}
        return [*ended, {"type": "content_block_start", "index": self._index, "content_block": block}]

    def _end(self) -> list[Any]:
        kind, self._open = self._open, None
        if kind is None:
            return []
        signed = (
            [self._delta({"type": "signature_delta", "signature": SIGNATURE})] if kind == "reasoning" else []
        )
        return [*signed, {"type": "content_block_stop", "index": self._index}]

    def _delta(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": part}

    def _stop(self) -> dict[str, Any]:
        last, sequence = self._last, None
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif last.num_calls:
            reason = "tool_use"
        elif isinstance(last.stop_reason, str):
            reason, sequence = "stop_sequence", last.stop_reason
        else:
            reason = "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        usage = self.generation.usage()
        num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": usage["completion_tokens"],
        }


def fold(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream of events tells."""
    message: dict[str, Any] = {}
    blocks: list[dict[str, Any]] = []
    inputs: dict[int, str] = {}
    for event in events:
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                blocks.append(dict(event["content_block"]))
            case "content_block_delta":
                index, delta = event["index"], event["delta"]
                for field in delta.keys() - {"type"}:
                    if field == "partial_json":
                        inputs[index] = inputs.get(index, "") + delta[field]
                    else:
                        blocks[index][field] += delta[field]
            case "message_delta":
                message |= event["delta"] | {name: event[name] for name in ("usage", "timings", "metrics")}
    for index, text in inputs.items():
        blocks[index]["input"] = read_object(text)
    return message | {"content": blocks}

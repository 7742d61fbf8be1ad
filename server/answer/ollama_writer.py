"""Answers in Ollama's shapes: lines of JSON, the last of which tells counts and durations."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from sleb.server.answer.converse import Begun
from sleb.server.answer.logprobs import chat_logprobs
from sleb.server.answer.partial_json import read_object
from sleb.server.answer.streaming import line
from sleb.server.answer.writer import AnswerWriter, Piece
from sleb.server.errors import ApiError


def now() -> str:
    """The time as Ollama writes it."""
    return timestamp(datetime.now(UTC))


def timestamp(moment: datetime) -> str:
    """RFC 3339, in UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


class GenerateWriter(AnswerWriter):
    """The answer to a prompt, as `response`. A whole answer is what the lines of a stream make together.

    model: the name that was asked for. num_top: alternatives told with each token; None: no log-probabilities.
    """

    media_type = "application/x-ndjson"
    text_field = "response"

    def __init__(self, begun: Begun, stream: bool, model: str | None, num_top: int | None) -> None:
        super().__init__(begun.context, begun.generation, stream, begun.shape.make_parser)
        self._asked, self._created_at = model, now()
        self._num_top = num_top
        self.tells_alike = num_top is None
        self._call: dict[str, Any] | None = None  # that has begun
        self._finish_reason: str | None = None

    @cached_property
    def _head(self) -> dict[str, Any]:
        """What each line begins with; made when the depth is known."""
        asked = None if self.generation.chosen else self._asked
        return {"model": asked or self.generation.model, "created_at": self._created_at}

    def wrap(self, part: dict[str, Any]) -> dict[str, Any]:
        """What a line says, in its place."""
        return part

    def unwrap(self, line: dict[str, Any]) -> dict[str, Any]:
        """The reverse."""
        return line

    def encode(self, event_: Any) -> bytes:
        return line(event_)

    def failure(self, error: ApiError) -> bytes:
        return line(error_body(error))

    def events(self, piece: Piece) -> list[Any]:
        parts: list[dict[str, Any]] = []
        for delta in piece.deltas:
            if delta.kind == "arguments":
                assert self._call is not None
                self._call["arguments"] += delta.text
                continue
            parts += self._take_call()
            if delta.kind == "call":
                self._call = {"index": delta.index, "name": delta.text, "arguments": ""}
            elif delta.kind == "reasoning":
                parts.append({self.text_field: "", "thinking": delta.text})
            else:
                parts.append({self.text_field: delta.text})
        self._finish_reason = piece.finish_reason
        lines = [self._head | self.wrap(part) | {"done": False} for part in parts]
        if self._num_top is None or not piece.logprobs:
            return lines
        if not lines:
            lines = [self._head | self.wrap({self.text_field: ""}) | {"done": False}]
        told = chat_logprobs(piece.logprobs, self._num_top, self.context.token_texts)["content"]
        return [lines[0] | {"logprobs": told}, *lines[1:]]

    def _take_call(self) -> list[dict[str, Any]]:
        """The call that has ended: its arguments are an object, which only a whole one is."""
        call, self._call = self._call, None
        if call is None:
            return []
        function = call | {"arguments": read_object(call["arguments"])}
        return [{self.text_field: "", "tool_calls": [{"function": function}]}]

    def closing(self) -> list[Any]:
        lines = [self._head | self.wrap(part) | {"done": False} for part in self._take_call()]
        last = self.wrap({self.text_field: ""}) | {"done": True, "done_reason": self._finish_reason}
        return [*lines, self._head | last | self._figures()]

    def _figures(self) -> dict[str, int]:
        """Tokens and nanoseconds; loading is waiting for a place among those that are computed."""
        timings, usage = self.generation.timings(), self.generation.usage()
        waited = self.generation.metrics()["time_in_queue"] or 0.0
        prompt, answer = timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3
        return {
            "total_duration": _nanoseconds(waited + prompt + answer),
            "load_duration": _nanoseconds(waited),
            "prompt_eval_count": usage["prompt_tokens"],
            "prompt_eval_duration": _nanoseconds(prompt),
            "eval_count": usage["completion_tokens"],
            "eval_duration": _nanoseconds(answer),
        }

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        lines = [*self.events(pieces[0]), *self.closing()]
        parts = [self.unwrap(each) for each in lines]
        part: dict[str, Any] = {self.text_field: "".join(each[self.text_field] for each in parts)}
        if thinking := "".join(each.get("thinking", "") for each in parts):
            part["thinking"] = thinking
        if calls := [call for each in parts for call in each.get("tool_calls", ())]:
            part["tool_calls"] = calls
        whole: dict[str, Any] = lines[-1] | self.wrap(part)
        if self._num_top is not None:
            whole["logprobs"] = [token for each in lines for token in each.get("logprobs", ())]
        return whole


class ChatWriter(GenerateWriter):
    """The answer to a conversation, as a `message`."""

    text_field = "content"

    def wrap(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"message": {"role": "assistant"} | part}

    def unwrap(self, line: dict[str, Any]) -> dict[str, Any]:
        message: dict[str, Any] = line["message"]
        return message


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in Ollama's shape."""
    return {"error": error.body()["error"]["message"]}


def _nanoseconds(seconds: float) -> int:
    """At least one: clients divide by it."""
    return max(round(seconds * 1e9), 1)

"""Chat answers: messages and deltas, with what a model thinks and the tools that it calls."""

from __future__ import annotations

from typing import Any

from sleb.engine.outputs import TokenLogprobs
from sleb.server.answer.choices_writer import ChoicesWriter
from sleb.server.answer.converse import Begun
from sleb.server.answer.logprobs import chat_logprobs
from sleb.server.answer.writer import Piece
from sleb.server.ids import new_id
from sleb.server.message.reasoning import Delta
from sleb.server.protocol import ChatBody


class ChatWriter(ChoicesWriter):
    """Choices with messages and deltas."""

    id_prefix = "chatcmpl-"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    body: ChatBody

    def __init__(self, begun: Begun, body: ChatBody) -> None:
        super().__init__(begun.context, begun.generation, body, begun.shape.make_parser)
        self._legacy = begun.shape.legacy

    @property
    def tells_logprobs(self) -> bool:
        return bool(self.body.logprobs)

    def chunk_choices(self, piece: Piece) -> list[dict[str, Any]]:
        empty = {"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": None}
        choices: list[dict[str, Any]] = []
        with_ids = self.body.return_token_ids
        logprobs = self._logprobs(piece.logprobs)
        if piece.is_first:
            choices.append(empty | {"delta": {"role": "assistant", "content": ""}})
            if with_ids:
                choices[0]["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
        told = [self._delta(delta) for delta in piece.deltas]
        if not told and piece.token_ids and (with_ids or logprobs is not None):
            told = [{"content": ""}]
        for number, delta in enumerate(told):  # a step's tokens go with the first thing that they made
            choices.append(empty | {"delta": delta, "logprobs": None if number else logprobs})
            if with_ids and not number:
                choices[-1]["token_ids"] = piece.token_ids
        if piece.finish_reason is not None:
            reason = self._finish_reason(piece)
            choices.append(empty | {"finish_reason": reason, "stop_reason": piece.stop_reason})
        return choices

    def _finish_reason(self, piece: Piece) -> str | None:
        if piece.finish_reason != "stop" or not piece.num_calls:
            return piece.finish_reason
        return "function_call" if self._legacy else "tool_calls"

    def _logprobs(self, tokens: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return chat_logprobs(tokens or (), self.body.top_logprobs or 0, self.context.token_texts)

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if delta.kind == "content":
            return {"content": delta.text}
        if delta.kind == "reasoning":
            return {"reasoning_content": delta.text}
        function = (
            {"name": delta.text, "arguments": ""} if delta.kind == "call" else {"arguments": delta.text}
        )
        if self._legacy:
            return {"function_call": function}
        head = {"id": new_id("call_", 24), "type": "function"} if delta.kind == "call" else {}
        return {"tool_calls": [{"index": delta.index} | head | {"function": function}]}

    def content(self, piece: Piece) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        texts = {"content": "", "reasoning": ""}
        for delta in piece.deltas:
            if delta.kind == "call":
                calls.append({"name": delta.text, "arguments": ""})
            elif delta.kind == "arguments":
                calls[delta.index]["arguments"] += delta.text
            else:
                texts[delta.kind] += delta.text
        content = None if calls and not texts["content"] else texts["content"]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls and self._legacy:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": new_id("call_", 24), "type": "function", "function": call} for call in calls
            ]
        return {
            "message": message,
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": self._finish_reason(piece),
        }

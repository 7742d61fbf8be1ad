"""Chat answers: messages and deltas, with what a model thinks and the tools that it calls."""

from __future__ import annotations

import uuid
from typing import Any

from sleb.engine.outputs import StepOutput
from sleb.server.answer.generation import Generation
from sleb.server.answer.logprobs import chat_logprobs
from sleb.server.answer.writer import AnswerWriter, Piece
from sleb.server.context import ServerContext
from sleb.server.message.parser import MessageParser, MessageShape
from sleb.server.message.reasoning import Delta
from sleb.server.protocol import ChatBody


class ChatWriter(AnswerWriter):
    """Choices with messages and deltas."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    body: ChatBody

    def __init__(
        self, context: ServerContext, generation: Generation, body: ChatBody, shape: MessageShape
    ) -> None:
        super().__init__(context, generation, body)
        self._shape = shape
        self._parsers: dict[int, MessageParser] = {}

    def read(self, choice: int, output: StepOutput, is_first: bool) -> Piece:
        logprobs = None
        if self.body.logprobs:
            num_top = self.body.top_logprobs or 0
            logprobs = chat_logprobs(output.new_logprobs or [], num_top, self.context.token_texts)
        if is_first:
            self._parsers[choice] = self._shape.make_parser()
        parser = self._parsers[choice]
        deltas = parser.push(output.new_text, output.finish_reason)
        reason: str | None = output.finish_reason
        if reason == "stop" and parser.num_calls:
            reason = "function_call" if self._shape.legacy else "tool_calls"
        return Piece(
            choice=choice,
            text=output.new_text,
            deltas=deltas,
            token_ids=list(output.new_token_ids),
            logprobs=logprobs,
            is_first=is_first,
            finish_reason=reason,
            stop_reason=output.stop_reason,
        )

    def chunk_choices(self, piece: Piece) -> list[dict[str, Any]]:
        empty = {"index": piece.choice, "delta": {}, "logprobs": None, "finish_reason": None}
        choices: list[dict[str, Any]] = []
        with_ids = self.body.return_token_ids
        if piece.is_first:
            choices.append(empty | {"delta": {"role": "assistant", "content": ""}})
            if with_ids:
                choices[0]["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
        told = [self._delta(delta) for delta in piece.deltas]
        if not told and piece.token_ids and (with_ids or piece.logprobs is not None):
            told = [{"content": ""}]
        for number, delta in enumerate(told):  # a step's tokens go with the first thing that they made
            choices.append(empty | {"delta": delta, "logprobs": None if number else piece.logprobs})
            if with_ids and not number:
                choices[-1]["token_ids"] = piece.token_ids
        if piece.finish_reason is not None:
            choices.append(empty | {"finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason})
        return choices

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if delta.kind == "content":
            return {"content": delta.text}
        if delta.kind == "reasoning":
            return {"reasoning_content": delta.text}
        function = (
            {"name": delta.text, "arguments": ""} if delta.kind == "call" else {"arguments": delta.text}
        )
        if self._shape.legacy:
            return {"function_call": function}
        head = {"id": _call_id(), "type": "function"} if delta.kind == "call" else {}
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
        if calls and self._shape.legacy:
            message["function_call"] = calls[0]
        elif calls:
            message["tool_calls"] = [
                {"id": _call_id(), "type": "function", "function": call} for call in calls
            ]
        return {"message": message}


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"

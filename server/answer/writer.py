"""From the engine's increments to answers, streamed or whole: one path, of which the whole answer is a fold.

Generation.pieces ─► AnswerWriter.pieces ─┬─► stream: chunks, each piece on its own
                                          └─► whole:  pieces of a choice joined, then written once
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request, Response

from sleb.engine.outputs import StepOutput
from sleb.engine.requests.repetition import REPETITION
from sleb.server.answer.generation import Generation
from sleb.server.answer.logprobs import prompt_logprobs
from sleb.server.answer.streaming import EventStreamResponse, event_stream, until_disconnect
from sleb.server.context import ServerContext
from sleb.server.errors import json_response
from sleb.server.message.reasoning import Delta
from sleb.server.protocol import GenerationBody, StreamOptions


@dataclass
class Piece:
    """A part of one choice: text, the tokens behind it and, on the last one, why it ended."""

    choice: int
    text: str = ""
    deltas: list[Delta] = field(default_factory=list)  # of a chat: the text's parts
    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[str, list[Any] | None] | None = None
    is_first: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None  # on the first one, if it was asked for
    usage: dict[str, Any] | None = None  # up to this piece, if the stream tells it

    def append(self, other: Piece) -> None:
        """Joins a later piece of the same choice to this one."""
        self.text += other.text
        self.deltas += other.deltas
        self.token_ids += other.token_ids
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        if self.logprobs is None:
            self.logprobs = other.logprobs
        elif other.logprobs is not None:
            for name, values in other.logprobs.items():
                own = self.logprobs[name]
                if own is not None and values is not None:
                    own += values


class AnswerWriter(ABC):
    """Writes the answer to one request; subclasses know the shape of its choices."""

    id_prefix: str
    object_name: str
    chunk_object_name: str
    choices_have_prompt_logprobs = False  # each, rather than the answer as a whole

    def __init__(self, context: ServerContext, generation: Generation, body: GenerationBody) -> None:
        self.context = context
        self.generation = generation
        self.body = body
        self._options = body.stream_options or StreamOptions()
        self._started: set[int] = set()
        self._envelope: dict[str, Any] = {
            "id": generation.new_id(self.id_prefix),
            "object": self.chunk_object_name if body.stream else self.object_name,
            "created": generation.created,
            "model": generation.tier.id,
            "system_fingerprint": f"fp_{generation.tier.digest[:12]}",
        }

    @abstractmethod
    def read(self, choice: int, output: StepOutput, is_first: bool) -> Piece:
        """An increment as a piece."""

    @abstractmethod
    def chunk_choices(self, piece: Piece) -> list[dict[str, Any]]:
        """The `choices` entries by which a stream tells a piece, one a chunk; the last one tells the end."""

    @abstractmethod
    def content(self, piece: Piece) -> dict[str, Any]:
        """What a choice of a whole answer says, as a field."""

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        choice = {
            "index": piece.choice,
            **self.content(piece),
            "logprobs": piece.logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
            choice["token_ids"] = piece.token_ids
        if self.choices_have_prompt_logprobs and piece.prompt_logprobs is not None:
            choice["prompt_logprobs"] = piece.prompt_logprobs
        return choice

    async def answer(self, request: Request) -> Response:
        """Starts the generation and answers, as a stream or whole; aborts when the client leaves."""
        try:
            await until_disconnect(request, self.generation.start())
            if self.body.stream:
                events = event_stream(self._chunks(), self.context.options.keep_alive_seconds)
                return EventStreamResponse(events, self.generation.close)
            whole = await until_disconnect(request, self._whole())
        except BaseException:
            self.generation.close()
            raise
        self.generation.close()
        loops = any(choice["stop_reason"] == REPETITION for choice in whole["choices"])
        return json_response(whole, headers={"X-Stop-Reason": REPETITION} if loops else None)

    def _read(self, choice: int, output: StepOutput) -> Piece:
        piece = self.read(choice, output, choice not in self._started)
        if self.body.prompt_logprobs is not None and piece.is_first:
            texts = self.context.token_texts
            piece.prompt_logprobs = prompt_logprobs(
                output.prompt_logprobs or (), self.body.prompt_logprobs, texts
            )
        self._started.add(choice)
        if self._options.continuous_usage_stats:
            piece.usage = self.generation.usage()
        return piece

    async def _whole(self) -> dict[str, Any]:
        choices: dict[int, Piece] = {}
        async for pieces in self.generation.pieces(self._read):
            for piece in pieces:
                if piece.choice in choices:
                    choices[piece.choice].append(piece)
                else:
                    choices[piece.choice] = piece
        written = [self._whole_choice(choices[choice]) for choice in sorted(choices)]
        whole = self._envelope | {"choices": written, "usage": self.generation.usage()}
        if self.body.prompt_logprobs is not None and not self.choices_have_prompt_logprobs:
            whole["prompt_logprobs"] = choices[0].prompt_logprobs
        return whole | {"timings": self.generation.timings(), "metrics": self.generation.metrics()}

    async def _chunks(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Lists of chunks; an empty list is silence, or increments that make nothing visible yet."""
        async for pieces in self.generation.pieces(self._read):
            chunks = [self._chunk(choice, piece) for piece in pieces for choice in self.chunk_choices(piece)]
            if self.generation.finished:
                if self._options.include_usage:
                    chunks.append(self._envelope | {"choices": [], "usage": self.generation.usage()})
                chunks[-1]["timings"] = self.generation.timings()
                chunks[-1]["metrics"] = self.generation.metrics()
            yield chunks

    def _chunk(self, choice: dict[str, Any], piece: Piece) -> dict[str, Any]:
        chunk = self._envelope | {"choices": [choice]}
        if self._options.include_usage or piece.usage is not None:
            chunk["usage"] = piece.usage
        return chunk

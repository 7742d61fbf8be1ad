"""From the engine's increments to an answer in some wire format, streamed or whole: one path.

Generation.pieces ─► AnswerWriter ─┬─► stream: events, each piece on its own
                                   └─► whole:  pieces of a choice joined, then written once
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request, Response

from sleb.engine.outputs import StepOutput, TokenLogprobs
from sleb.engine.requests.repetition import REPETITION
from sleb.server.answer.generation import Generation
from sleb.server.answer.streaming import EventStreamResponse, event, until_disconnect
from sleb.server.context import ServerContext
from sleb.server.errors import ApiError, json_response, to_api_error
from sleb.server.exchange import note_failure
from sleb.server.message.parser import MessageParser
from sleb.server.message.reasoning import Delta

FRAMED = "\ue000 the text \ue000"  # of private use: no name of a model holds it


@dataclass(slots=True)
class Piece:
    """A part of one choice: text, the tokens behind it and, on the last one, why it ended.

    Attributes:
        deltas: the text's parts, if the answer is read as a message.
        logprobs: of token_ids, if they were asked for. prompt_logprobs: likewise, on the first piece.
        finish_reason: the engine's word. stop_reason: the stop string or token that ended it, or REPETITION.
        num_calls: calls of tools that have begun so far.
        usage: up to this piece, if the writer tells it with each.
    """

    choice: int
    text: str = ""
    deltas: list[Delta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    is_first: bool = False
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_calls: int = 0
    usage: dict[str, Any] | None = None

    def append(self, other: Piece) -> None:
        """Joins a later piece of the same choice to this one."""
        self.text += other.text
        self.deltas += other.deltas
        self.token_ids += other.token_ids
        if other.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += other.logprobs
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason
        self.num_calls, self.usage = other.num_calls, other.usage


class AnswerWriter(ABC):
    """Writes the answer to one request; a subclass is a wire format.

    Attributes:
        media_type: of a stream.
        end: what a stream ends with, also after an error.
        silence: what is sent when nothing else was for a while; None: nothing.
        folds: whether a stream is joined too, so that its `closing` may tell the whole answer by `finished`.
        tells_usage: whether each piece has its `usage`.
        tells_alike: whether events that tell content differ in the text alone.
        folded: the pieces of each choice so far, joined; empty for a stream that is not.
    """

    media_type = "text/event-stream"
    end = b""
    silence: bytes | None = None
    folds = False
    tells_usage = False
    tells_alike = True

    def __init__(
        self,
        context: ServerContext,
        generation: Generation,
        stream: bool,
        make_parser: Callable[[], MessageParser] | None = None,
    ) -> None:
        self.context = context
        self.generation = generation
        self.stream = stream
        self.folded: dict[int, Piece] = {}
        self._make_parser = make_parser
        self._parsers: dict[int, MessageParser | None] = {}
        self._whole: dict[str, Any] | None = None
        self._frames: dict[int, tuple[bytes, ...]] = {}
        self.ended = False

    def opening(self) -> list[Any]:
        """Events before the first token, which are sent at once."""
        return []

    @abstractmethod
    def events(self, piece: Piece) -> list[Any]:
        """The events by which a stream tells a piece."""

    def closing(self) -> list[Any]:
        """Events after the last piece."""
        return []

    def encode(self, event_: Any) -> bytes:
        """An event as it is sent."""
        return event(event_)

    def failure(self, error: ApiError) -> bytes:
        """An error inside of a stream, as it is sent; `end` follows."""
        return self.encode(error.body())

    @abstractmethod
    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        """The whole answer: of each choice all its pieces, joined."""

    def on_end(self, whole: dict[str, Any]) -> None:  # noqa: B027 - a hook
        """Called once with the whole answer, where there is one."""

    def finished(self) -> dict[str, Any]:
        """The whole answer, when the last piece is there."""
        if self._whole is None:
            self._whole = self.whole(self.folded)
            self.on_end(self._whole)
        return self._whole

    async def answer(self, request: Request) -> Response:
        """Starts the generation and answers, as a stream or whole; aborts when the client leaves."""
        try:
            await until_disconnect(request, self.generation.start())
            if self.stream:
                patience = self.context.options.keep_alive_seconds
                return EventStreamResponse(self, self.media_type, patience, self.generation.headers)
            await until_disconnect(request, self._fold())
            whole = self.finished()
        except BaseException:
            self.close()
            raise
        self.close()
        loops = any(piece.stop_reason == REPETITION for piece in self.folded.values())
        told = {"X-Stop-Reason": REPETITION} if loops else {}
        return json_response(whole, headers=self.generation.headers | told)

    def close(self) -> None:
        """Called when nothing more is told, for whatever reason; may be called again."""
        self.generation.close()

    def read(self, choice: int, output: StepOutput) -> Piece:
        """An increment as a piece; called once for each, in order."""
        piece = Piece(
            choice,
            output.new_text,
            token_ids=output.new_token_ids,
            logprobs=output.new_logprobs,
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if choice not in self._parsers:
            piece.is_first, piece.prompt_logprobs = True, output.prompt_logprobs
            self._parsers[choice] = None if self._make_parser is None else self._make_parser()
        parser = self._parsers[choice]
        if parser is not None:
            piece.deltas = parser.push(output.new_text, output.finish_reason)
            piece.num_calls = parser.num_calls
        if self.tells_usage:
            piece.usage = self.generation.usage()
        return piece

    async def _fold(self) -> None:
        async for pieces in self.generation.pieces(self.read):
            self._join(pieces)

    def _join(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.choice in self.folded:
                self.folded[piece.choice].append(piece)
            else:
                own = Piece(piece.choice, is_first=True, prompt_logprobs=piece.prompt_logprobs)
                own.append(piece)
                self.folded[piece.choice] = own

    # As an `EventStream`.

    def begin(self) -> bytes:
        return b"".join(map(self.encode, self.opening()))

    async def wait(self, timeout: float, on_arrival: Callable[[], bool] | None = None) -> None:
        await self.generation.wait(timeout, on_arrival)

    def take(self) -> bytes:
        events = [event for told in self.generation.take(self._tell) for event in told]
        if self.generation.finished:
            self.ended = True
            events += self.closing()  # which may add to the last one
        return b"".join(each if isinstance(each, bytes) else self.encode(each) for each in events)

    def _tell(self, choice: int, output: StepOutput) -> list[Any]:
        """The events by which a stream tells an increment; those that are alike but for their text as they are sent."""
        if choice in self._frames and output.finish_reason is None:
            return [self.frame(choice, output.new_text)] if output.new_text else []
        piece = self.read(choice, output)
        if self.folds:
            self._join([piece])
        told = self.events(piece)
        parser, goes_on = self._parsers[choice], output.new_text and output.finish_reason is None
        if self.tells_alike and goes_on and (parser is None or parser.plain):
            self._frames[choice] = self.make_frame(choice)
        return told

    def make_frame(self, choice: int) -> tuple[bytes, ...]:
        """What stands around the text in the events of a choice that tell content, which are alike from here on."""
        event = self.events(Piece(choice, FRAMED, [Delta("content", FRAMED)]))[0]
        head, tail = self.encode(event).split(orjson.dumps(FRAMED))
        return head, tail

    def frame(self, choice: int, text: str) -> bytes:
        """The event that tells more content, in its frame: the same bytes as `events` would give, sooner."""
        head, tail = self._frames[choice]
        return head + orjson.dumps(text) + tail

    def fail(self, error: Exception) -> bytes:
        answer = to_api_error(error)
        note_failure(answer.code or str(answer.status))
        return self.failure(answer)

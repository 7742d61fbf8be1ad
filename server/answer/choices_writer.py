"""What answers of chat.completions and of completions share: choices in an envelope, and chunks of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

from sleb.server.answer.generation import Generation
from sleb.server.answer.logprobs import prompt_logprobs
from sleb.server.answer.streaming import DONE, KEEP_ALIVE
from sleb.server.answer.writer import AnswerWriter, Piece
from sleb.server.context import ServerContext
from sleb.server.ids import new_id
from sleb.server.message.parser import MessageParser
from sleb.server.protocol import GenerationBody, StreamOptions


class ChoicesWriter(AnswerWriter):
    """Subclasses know the shape of their choices."""

    end = DONE
    silence = KEEP_ALIVE
    id_prefix: str
    object_name: str
    chunk_object_name: str
    choices_have_prompt_logprobs = False  # each, rather than the answer as a whole

    def __init__(
        self,
        context: ServerContext,
        generation: Generation,
        body: GenerationBody,
        make_parser: Callable[[], MessageParser] | None = None,
    ) -> None:
        super().__init__(context, generation, body.stream, make_parser)
        self.body = body
        self._options = body.stream_options or StreamOptions()
        self.tells_usage = self._options.continuous_usage_stats
        self.tells_alike = not (self.tells_usage or body.return_token_ids or self.tells_logprobs)
        self._last_chunk: dict[str, Any] = {}

    @cached_property
    def _envelope(self) -> dict[str, Any]:
        """What is around choices; made when the depth is known."""
        return {
            "id": new_id(self.id_prefix),
            "object": self.chunk_object_name if self.stream else self.object_name,
            "created": self.generation.created,
            "model": self.generation.model,
            "system_fingerprint": f"fp_{self.generation.tier.digest[:12]}",
        }

    @property
    @abstractmethod
    def tells_logprobs(self) -> bool:
        """Whether log-probabilities were asked for."""

    @abstractmethod
    def chunk_choices(self, piece: Piece) -> list[dict[str, Any]]:
        """The `choices` entries by which a stream tells a piece, one a chunk; the last one tells the end."""

    @abstractmethod
    def content(self, piece: Piece) -> dict[str, Any]:
        """What a choice of a whole answer says: its content, `logprobs` and `finish_reason`."""

    def events(self, piece: Piece) -> list[Any]:
        chunks = [self._chunk([choice], piece.usage) for choice in self.chunk_choices(piece)]
        if chunks:
            self._last_chunk = chunks[-1]
        return chunks

    def closing(self) -> list[Any]:
        chunks = []
        if self._options.include_usage:
            chunks.append(self._chunk([], self.generation.usage()))
            self._last_chunk = chunks[-1]
        self._last_chunk["timings"] = self.generation.timings()
        self._last_chunk["metrics"] = self.generation.metrics()
        return chunks

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        chunk = self._envelope | {"choices": choices}
        if self._options.include_usage or usage is not None:
            chunk["usage"] = usage
        return chunk

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        choices = [self._whole_choice(pieces[choice]) for choice in sorted(pieces)]
        whole = self._envelope | {"choices": choices, "usage": self.generation.usage()}
        if self.body.prompt_logprobs is not None and not self.choices_have_prompt_logprobs:
            whole["prompt_logprobs"] = self._prompt_logprobs(pieces[0])
        return whole | {"timings": self.generation.timings(), "metrics": self.generation.metrics()}

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        choice = {"index": piece.choice, **self.content(piece), "stop_reason": piece.stop_reason}
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = self.generation.prompt_of(piece.choice).token_ids
            choice["token_ids"] = piece.token_ids
        if self.choices_have_prompt_logprobs and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(piece)
        return choice

    def _prompt_logprobs(self, piece: Piece) -> list[dict[str, Any] | None]:
        num_top = self.body.prompt_logprobs or 0
        return prompt_logprobs(piece.prompt_logprobs or (), num_top, self.context.token_texts)

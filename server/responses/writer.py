"""Answers of OpenAI's Responses: whole, or as typed events."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import orjson

from sleb.engine.outputs import StepOutput
from sleb.server.answer.converse import Begun
from sleb.server.answer.streaming import KEEP_ALIVE, named_event
from sleb.server.answer.writer import FRAMED, AnswerWriter, Piece
from sleb.server.errors import ApiError
from sleb.server.ids import new_id
from sleb.server.responses.body import ResponsesBody
from sleb.server.responses.builder import Event, OutputBuilder
from sleb.server.responses.items import Item
from sleb.server.responses.models import ALWAYS_NULL
from sleb.server.responses.shared import Responses

_NUMBER = 2**53 - 1  # in the place of an event's own, which never comes so far


class ResponseWriter(AnswerWriter):
    """Writes one answer, which `store` knows while it is made, and keeps if it shall.

    Args:
        owner: whose the answer is. input_items: what the request sent. earlier: see `ResponseStore.put`.
    """

    silence = KEEP_ALIVE

    def __init__(
        self,
        begun: Begun,
        body: ResponsesBody,
        owner: bytes,
        input_items: Sequence[Item],
        earlier: tuple[bytes, ...],
    ) -> None:
        super().__init__(begun.context, begun.generation, body.stream, begun.shape.make_parser)
        self.id = new_id("resp_")
        self.owner = owner
        self._builder = OutputBuilder(begun.context.token_texts, body.num_logprobs)
        self._events: list[Event] = []  # of pieces that are not told yet
        self._finish_reason: str | None = None
        self._input_items, self._earlier = input_items, earlier
        self.tells_alike = body.num_logprobs is None
        self._keeps = body.store and self._store.keeps
        self._body = body
        self._store.running[self.id] = self

    @property
    def _store(self) -> Responses:
        return self.context.responses

    @cached_property
    def _head(self) -> dict[str, Any]:
        """What no token changes; made when the depth is known."""
        body = self._body
        defaults = self.context.engine.model.defaults
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.generation.created,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": self.generation.model,
            "background": False,
            "service_tier": "default",
            "store": self._keeps,
            "temperature": defaults.temperature if body.temperature is None else body.temperature,
            "top_p": defaults.top_p if body.top_p is None else body.top_p,
            **body.echo(),
            **dict.fromkeys(ALWAYS_NULL),
        }

    def read(self, choice: int, output: StepOutput) -> Piece:
        piece = super().read(choice, output)
        self._events += self._builder.push(piece.deltas, piece.token_ids, piece.logprobs)
        self._finish_reason = piece.finish_reason
        return piece

    def opening(self) -> list[Event]:
        response = self._head | {"status": "in_progress", "output": [], "usage": None}
        kinds = ("response.created", "response.in_progress")
        return [self._builder.event(kind, response=response) for kind in kinds]

    def make_frame(self, choice: int) -> tuple[bytes, ...]:
        event = self._builder.content_event(_NUMBER, FRAMED)
        head, rest = self.encode(event).split(str(_NUMBER).encode())
        middle, tail = rest.split(orjson.dumps(FRAMED))
        return head, middle, tail

    def frame(self, choice: int, text: str) -> bytes:
        head, middle, tail = self._frames[choice]
        return b"%b%d%b%b%b" % (head, self._builder.add_content(text), middle, orjson.dumps(text), tail)

    def events(self, piece: Piece) -> list[Event]:
        events, self._events = self._events, []
        return events

    def closing(self) -> list[Event]:
        events = self._finish()
        response = self.finished()
        kind = "completed" if response["status"] == "completed" else "incomplete"
        return [*events, self._builder.event(f"response.{kind}", response=response)]

    def encode(self, event_: Event) -> bytes:
        return named_event(event_)

    def failure(self, error: ApiError) -> bytes:
        told = error.body()["error"]
        where = {name: told[name] for name in ("code", "message", "param")}
        failed = {"error": {"code": "server_error", "message": told["message"]}}
        ends = self._builder.close("incomplete")
        response = self._response("failed") | failed
        events = [
            *ends,
            self._builder.event("error", **where),
            self._builder.event("response.failed", response=response),
        ]
        return b"".join(map(self.encode, events))

    def whole(self, pieces: dict[int, Piece]) -> dict[str, Any]:
        self._finish()
        status = self._status
        whole = self._response(status)
        if status == "completed":
            whole["completed_at"] = int(time.time())
        if status == "incomplete":
            whole["incomplete_details"] = {"reason": "max_output_tokens"}
        return whole | {"timings": self.generation.timings(), "metrics": self.generation.metrics()}

    def on_end(self, whole: dict[str, Any]) -> None:
        if self._keeps:
            self._store.put(self.owner, whole, self._input_items, self._earlier)

    def close(self) -> None:
        super().close()
        self._store.running.pop(self.id, None)

    def cancel(self) -> dict[str, Any]:
        """Ends the answer with what there is of it; returns that."""
        self.generation.cancel()
        return self._response(self._status)

    def snapshot(self) -> dict[str, Any] | None:
        """The answer so far; None if it is none that is kept."""
        return self._response("in_progress") if self._keeps else None

    @property
    def _status(self) -> str:
        if self._finish_reason is None and self.generation.cancelled:
            return "cancelled"
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _finish(self) -> list[Event]:
        """Ends the output; a second time there is nothing to end."""
        return self._builder.finish("completed" if self._status == "completed" else "incomplete")

    def _response(self, status: str) -> dict[str, Any]:
        usage = self.generation.usage()
        told = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._builder.num_reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        }
        return self._head | {"status": status, "output": self._builder.snapshot(), "usage": told}

"""The text of an answer as a message: reasoning, content and calls of tools, each found by its own parser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sleb.server.message.reasoning import Delta, ReasoningParser, join_deltas
from sleb.server.message.tool_parser import ToolParser


class MessageParser(Protocol):
    """What makes messages of answers' texts, whatever the model's way to write them is."""

    @property
    def num_calls(self) -> int: ...

    @property
    def plain(self) -> bool:
        """Whether all that follows is content as it stands."""

    def push(self, text: str, finish_reason: str | None) -> list[Delta]:
        """What `text` makes certain; all of the rest if the answer ends with it, for the engine's `finish_reason`."""


class MarkedParser:
    """The text of one answer as a message: reasoning first, then content and calls. Each parser may be absent."""

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    @property
    def plain(self) -> bool:
        return self._tools is None and (self._reasoning is None or self._reasoning.over)

    def push(self, text: str, finish_reason: str | None) -> list[Delta]:
        """What `text` makes certain; all of the rest if the answer ends with it, for the engine's `finish_reason`."""
        ends = finish_reason is not None
        deltas = [Delta("content", text)] if text else []
        if self._reasoning is not None:
            deltas = self._reasoning.push(text) + (self._reasoning.flush() if ends else [])
        if self._tools is not None:
            deltas = self._find_calls(deltas) + (self._tools.flush(finish_reason == "length") if ends else [])
        return join_deltas(deltas)

    def _find_calls(self, deltas: list[Delta]) -> list[Delta]:
        assert self._tools is not None
        found: list[Delta] = []
        for delta in deltas:
            found += self._tools.push(delta.text) if delta.kind == "content" else [delta]
        return found


@dataclass(frozen=True)
class MessageShape:
    """What an answer's message may hold besides text.

    make_parser: a new parser for each choice. legacy: whether a call is told as `function_call`.
    """

    make_parser: Callable[[], MessageParser]
    legacy: bool = False

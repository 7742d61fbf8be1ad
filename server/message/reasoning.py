"""From an answer's text to its message: reasoning, content and calls of tools, a piece at a time.

Joining what any pieces of a text give gives what the whole text gives, so a streamed message equals a whole one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class Delta:
    """A piece of a message: text of it, or the beginning of a call (`text` is then the tool's name)."""

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0  # of the call


def join_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with neighbouring pieces of one text joined."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if last is not None and delta.kind != "call" and (last.kind, last.index) == (delta.kind, delta.index):
            joined[-1] = Delta(delta.kind, last.text + delta.text, delta.index)
        elif delta.text:
            joined.append(delta)
    return joined


def num_begun(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`, less than all of it."""
    longest = min(len(marker) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if marker.startswith(text[-length:])), 0)


class ReasoningParser:
    """Parts what a model thinks, in `<think>…</think>` before its answer, from the answer.

    Line ends beside the marks belong to neither.

    Args:
        opened: whether the prompt ends inside the thoughts already.
    """

    def __init__(self, opened: bool) -> None:
        self._state: Literal["before", "begin", "inside", "behind", "answer"] = (
            "begin" if opened else "before"
        )
        self._held = ""

    def push(self, text: str) -> list[Delta]:
        """What `text` makes certain."""
        text, self._held = self._held + text, ""
        deltas = []
        if self._state == "before":
            text = self._find_begin(text)
        if self._state == "begin":
            text = text.lstrip("\n")
            self._state = "inside" if text else "begin"
        if self._state == "inside":
            thought, found, rest = text.partition(END_THINK)
            if found:
                self._state, text = "behind", rest
            else:
                certain = text[: len(text) - num_begun(text, END_THINK)]
                self._held = text[len(certain.rstrip("\n")) :]
                thought, text = certain, ""
            deltas.append(Delta("reasoning", thought.rstrip("\n")))
        if self._state == "behind":
            text = text.lstrip("\n")
            self._state = "answer" if text else "behind"
        if self._state == "answer":
            deltas.append(Delta("content", text))
        return [delta for delta in deltas if delta.text]

    def _find_begin(self, text: str) -> str:
        visible = text.lstrip()
        if visible.startswith(THINK):
            self._state = "begin"
            return visible[len(THINK) :]
        if THINK.startswith(visible):
            self._held = text
            return ""
        self._state = "answer"
        return text

    def flush(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return [Delta("reasoning", held.rstrip("\n"))] if held.rstrip("\n") else []
        return [Delta("content", held)] if held else []

"""From an answer's text to its message: reasoning, content and calls of tools, a piece at a time.

Joining what any pieces of a text give gives what the whole text gives, so a streamed message equals a whole one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

THINK, END_THINK = "<think>", "</think>"


@dataclass(frozen=True)
class ReasoningMarks:
    """What a model writes about its thoughts.

    Attributes:
        begin, end: before and behind them. shown: what a chat template that has them shows, all of one of these.
        answer: what the answer behind them stands between, where it does.
    """

    begin: str
    end: str
    shown: tuple[tuple[str, ...], ...] = ()
    answer: tuple[str, str] | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        return (self.begin, self.end, *(self.answer or ()))

    def is_shown(self, template: str) -> bool:
        shown = self.shown or ((self.begin,), (self.end,))
        return any(all(mark in template for mark in marks) for marks in shown)


THINKING = ReasoningMarks(THINK, END_THINK)  # DeepSeek, Qwen, GLM, Nemotron, SmolLM 3 and most others
# The first that a template shows is meant: the particular before the general.
REASONING = (
    ReasoningMarks(
        THINK, END_THINK, (("<response></response>",),), ("<response>", "</response>")
    ),  # Granite 3
    ReasoningMarks("[THINK]", "[/THINK]"),  # Magistral, Ministral
    ReasoningMarks("<seed:think>", "</seed:think>", (("<seed:think>",),)),  # Seed-OSS
    ReasoningMarks("<mm:think>", "</mm:think>"),  # MiniMax M3
    ReasoningMarks("<|channel>thought", "<channel|>", (("<|channel>",),)),  # Gemma 4
    ReasoningMarks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ReasoningMarks("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ReasoningMarks("◁think▷", "◁/think▷"),  # Kimi VL
    THINKING,
    ReasoningMarks("<thought>", "</thought>"),
    ReasoningMarks("<thinking>", "</thinking>"),
    ReasoningMarks("<reasoning>", "</reasoning>"),
)


def reasoning_marks(template: str | None, tokenizer: Tokenizer | None) -> ReasoningMarks | None:
    """Those that a chat template shows, else those that the tokenizer has a token for; None if there are none."""
    for each in REASONING:
        if template is not None and each.is_shown(template):
            return each
    known = (each for each in REASONING if not each.answer)
    return next(
        (each for each in known if tokenizer is not None and tokenizer.token_to_id(each.begin) is not None),
        None,
    )


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
    """Parts what a model thinks, before its answer and between marks, from the answer.

    Line ends beside the marks belong to neither.

    Args:
        opened: whether the prompt ends inside the thoughts already.
    """

    def __init__(self, opened: bool, marks: ReasoningMarks = THINKING) -> None:
        self._state: Literal["before", "begin", "inside", "behind", "wrapped", "answer"] = (
            "begin" if opened else "before"
        )
        self._marks = marks
        self._held = ""

    @property
    def over(self) -> bool:
        """Whether all that follows is the answer."""
        return self._state == "answer"

    def push(self, text: str) -> list[Delta]:
        """What `text` makes certain."""
        text, self._held = self._held + text, ""
        end = self._marks.end
        deltas = []
        if self._state == "before":
            text = self._find_begin(text)
        if self._state == "begin":
            text = text.lstrip("\n")
            self._state = "inside" if text else "begin"
        if self._state == "inside":
            thought, found, rest = text.partition(end)
            if found:
                self._state, text = "behind", rest
            else:
                certain = text[: len(text) - num_begun(text, end)]
                self._held = text[len(certain.rstrip("\n")) :]
                thought, text = certain, ""
            deltas.append(Delta("reasoning", thought.rstrip("\n")))
        if self._state == "behind":
            text = self._find_answer(text.lstrip("\n"))
        if self._state == "wrapped":
            text = self._unwrap(text)
        if self._state in ("wrapped", "answer"):
            deltas.append(Delta("content", text))
        return [delta for delta in deltas if delta.text]

    def _find_begin(self, text: str) -> str:
        visible = text.lstrip()
        if visible.startswith(self._marks.begin):
            self._state = "begin"
            return visible[len(self._marks.begin) :]
        if self._marks.begin.startswith(visible):
            self._held = text
            return ""
        self._state = "answer"
        return text

    def _find_answer(self, text: str) -> str:
        """What follows the thoughts, less the mark that the answer may begin with."""
        if not text:
            return ""
        mark = (self._marks.answer or ("", ""))[0]
        if mark and text.startswith(mark):
            self._state = "wrapped"
            return text[len(mark) :]
        if mark.startswith(text):
            self._held = text
            return ""
        self._state = "answer"
        return text

    def _unwrap(self, text: str) -> str:
        """An answer's text before the mark that ends it; of what is no more than its beginning, nothing yet."""
        _, end = self._marks.answer or ("", "")
        answer, found, rest = text.partition(end)
        if found:
            self._state = "answer"
            return answer + rest
        self._held = text[len(text) - num_begun(text, end) :]
        return text[: len(text) - len(self._held)]

    def flush(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._state == "inside":
            return [Delta("reasoning", held.rstrip("\n"))] if held.rstrip("\n") else []
        return [Delta("content", held)] if held else []

"""OpenAI's harmony, in which gpt-oss answers: messages on channels, with thoughts on one and calls to a recipient.

    <|channel|>analysis<|message|>thoughts<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
    <|constrain|>json<|message|>{…}<|call|>          or <|channel|>final<|message|>the answer<|return|>

The prompt ends behind `<|start|>assistant`. Source: openai/harmony, `docs/format.md`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal

from sleb.server.message.call_readers import JsonText
from sleb.server.message.reasoning import Delta, join_deltas, num_begun
from sleb.server.message.tool_formats import GPT_OSS

START, MESSAGE = "<|start|>", "<|message|>"
_IN_HEADER = ("<|channel|>", "<|constrain|>")
_MARKS = re.compile("|".join(map(re.escape, GPT_OSS.marks)))
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")
_BEGINS_HEADER = re.compile(r"\s*(?:t|to|to=\S*\s*)?$")  # before any mark
_LONGEST_HEADER = 512


class ChannelParser:
    """Reasoning, content and calls by their channels; a message parser (`MessageParser`).

    Args:
        names: the tools. prompt_end: the end of the prompt, which may have begun a message.
        single: whether calls after the first are dropped.
    """

    def __init__(self, names: Collection[str], prompt_end: str = "", *, single: bool = False) -> None:
        self.num_calls: int = 0
        self._names = frozenset(names)
        self._single = single
        self._held = ""
        self._header: str | None = ""  # of the message that begins; None inside of one
        self._is_header = False  # whether that is certain: an answer may have no marks at all
        self._kind: Literal["reasoning", "content", "arguments", "nothing"] = "content"
        self._json = JsonText()
        self._new: list[Delta] = []
        self._said: dict[
            str, bool
        ] = {}  # whether there is text of a kind, and whether a message of it follows
        self._any_argument = False
        begun = prompt_end.rpartition(START)[2].removeprefix("assistant")
        if begun.strip():
            self._read(begun)
            self._new.clear()

    @property
    def plain(self) -> bool:
        return False

    def push(self, text: str, finish_reason: str | None) -> list[Delta]:
        """What `text` makes certain; all of the rest if the answer ends with it."""
        self._read(text)
        if finish_reason is not None:
            self._end(finish_reason)
        new, self._new = self._new, []
        return join_deltas(new)

    def _read(self, text: str) -> None:
        text, self._held = self._held + text, ""
        while found := _MARKS.search(text):
            self._say(text[: found.start()])
            self._mark(found[0])
            text = text[found.end() :]
        held = max(num_begun(text, mark) for mark in GPT_OSS.marks)
        self._held = text[len(text) - held :]
        self._say(text[: len(text) - held])

    def _end(self, finish_reason: str) -> None:
        if finish_reason != "length":
            self._say(self._held)
        if self._header is None:
            self._close(cut=finish_reason == "length")
        self._held = ""

    def _mark(self, mark: str) -> None:
        self._is_header = True
        if mark in _IN_HEADER:
            if self._header is None:
                self._close()
                self._header = ""
            self._header += mark
        elif mark == MESSAGE and self._header is not None:
            self._open(self._header)
        elif mark != MESSAGE:
            if self._header is None:
                self._close()
            self._header = ""

    def _open(self, header: str) -> None:
        """Begins what follows a header: thoughts, a call of a known tool, or content."""
        self._header = None
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._names:
            if self._single and self.num_calls:
                self._kind = "nothing"
                return
            self._kind, self._json, self._any_argument = "arguments", JsonText(), False
            self._new.append(Delta("call", recipient[1], self.num_calls))
            self.num_calls += 1
        else:
            self._kind = "reasoning" if "<|channel|>analysis" in header else "content"
            self._said[self._kind] = self._kind in self._said

    def _close(self, *, cut: bool = False) -> None:
        if self._kind == "arguments" and not (self._any_argument or cut):
            self._new.append(Delta("arguments", "{}", self.num_calls - 1))
        self._kind = "nothing"

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._header is not None:
            is_long = len(self._header) + len(text) > _LONGEST_HEADER
            if is_long or not (self._is_header or _BEGINS_HEADER.match(self._header + text)):
                text, self._header, self._kind = self._header + text, None, "content"  # it is no header
            else:
                self._header += text
                return
        if self._kind == "arguments":
            self._any_argument = True
            text = "".join(map(self._json.step, text))
            self._new.append(Delta("arguments", text, self.num_calls - 1))
        elif self._kind != "nothing":
            if self._said.get(self._kind):  # another message of the kind
                self._new.append(Delta(self._kind, "\n"))
            self._said[self._kind] = False
            self._new.append(Delta(self._kind, text))

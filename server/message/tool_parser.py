"""Calls of tools in an answer's text, as models write them (`tool_formats.py`), found one character at a time.

What begins like a call and is none is content, without the marks. So is what follows a mark and is none of a call.
After a mark, arguments are told as they come from the moment the tool is known: should the call break after that, its
arguments are what came. A call without a mark is told when it is whole, so that a broken one can be content.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import regex

from sleb.server.message.call_readers import CallReader, ObjectReader, PythonReader, TaggedReader
from sleb.server.message.reasoning import Delta, join_deltas, num_begun
from sleb.server.message.tool_formats import FENCED, FORMATS, HERMES, MISTRAL, ToolFormat

_NUM_ID = 9  # characters of an id of Mistral's
_LONG = 4096  # a broken call of more characters is not searched for another one
_LONGEST_FRONT = 256  # characters between a mark and the arguments
_WHITE = " \t\n\r\f\v"
_FENCE, _END_FENCE = FENCED.calls[0], "```"


@dataclass(frozen=True)
class CallMarks:
    """What a parser looks for.

    Attributes:
        opening: marks that begin a call, or a list of calls, each with the formats that have it.
        kept: those of them that are content with no call behind them.
        dropped: marks that stand about calls.
        bare_objects, bare_lists: whether an object, or Python's list of calls, may be a call with no mark before it.
        forms: those that are looked for.
    """

    forms: tuple[ToolFormat, ...]
    opening: Mapping[str, Sequence[ToolFormat]]
    kept: frozenset[str]
    dropped: frozenset[str]
    bare_objects: bool
    bare_lists: bool

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.opening, *self.dropped)

    @classmethod
    @cache
    def of(cls, form: ToolFormat, *, alone: bool = False) -> CallMarks:
        """The marks of a format. alone: without those that models write whatever they were shown."""
        others = () if alone else tuple(each for each in FORMATS if each.drifts and each is not form)
        forms = (form, *others)
        opening: dict[str, list[ToolFormat]] = {}
        for each in forms:
            for mark in filter(None, each.calls):
                opening.setdefault(mark, []).append(each)
        dropped = {mark for each in forms for mark in each.around} - opening.keys()
        kept = {mark for mark, own in opening.items() if all(each.kept for each in own)}
        bare = {each.notation for each in forms if each.bare}
        return cls(forms, opening, frozenset(kept), frozenset(dropped), "object" in bare, "python" in bare)


class ToolParser:
    """Parts calls from content.

    Args:
        names: the tools; a call of any other is content.
        schemas: of their arguments, by name, for calls whose values are plain text.
        marks: of the formats that are looked for.
        live: whether arguments are told as they come without a mark too: for text that a grammar keeps in form.
        single: whether calls after the first are dropped.
    """

    def __init__(
        self,
        names: Collection[str],
        schemas: Mapping[str, Any] | None = None,
        marks: CallMarks | None = None,
        *,
        live: bool = False,
        single: bool = False,
    ) -> None:
        self.num_calls = 0
        self._names = frozenset(names)
        self._schemas = schemas or {}
        self._marks = CallMarks.of(HERMES) if marks is None else marks
        self._texts = self._marks.texts
        self._begins = frozenset(mark[0] for mark in self._texts)
        self._live = live
        self._single = single
        self._deltas: list[Delta] = []
        self._state: Literal["text", "front", "call"] = "text"
        self._raw = ""  # of a call, from its mark on
        self._held = ""  # in text: white space and what may be a mark
        self._bare_allowed = True  # whether a call may begin here without a mark
        self._closers: list[str] = []  # what ends the fence and the list that calls stand in
        self._marked_list = self._python_list = False
        self._skipped = _WHITE  # what goes with a call or a mark that follows it
        self._begin_call("", "")

    def push(self, text: str) -> list[Delta]:
        """What `text` makes certain."""
        if not (self._held or self._closers or self._bare_allowed) and self._state == "text":
            plain = next(
                (i for i, each in enumerate(text) if each in self._begins or each in _WHITE), len(text)
            )
            self._say(text[:plain])
            text = text[plain:]
        for character in text:
            self._step(character)
        return self._take()

    def flush(self, cut: bool = False) -> list[Delta]:
        """What was held back, at the end of the answer.

        cut: whether the answer ends by its length. What has come of a call by then is told as that call, if it is known
        which one it is; and no beginning of a mark is content.
        """
        if cut and self._state != "text" and not self._told:
            self._cut_call()
        while self._state != "text" and not self._told:
            self._give_back()
        if self._told and not cut:
            assert self._reader is not None
            self._argue(self._reader.close())
        begun = bool(self._held.lstrip(self._skipped))
        if not (cut and (begun or self._closers)) and (begun or not self.num_calls):
            self._say(self._held)
        self._held = ""
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = join_deltas(self._deltas), []
        return deltas

    def _say(self, text: str) -> None:
        self._deltas.append(Delta("content", text))

    def _step(self, character: str) -> None:
        if self._state == "text":
            self._step_text(character)
        elif self._state == "front":
            self._step_front(character)
        else:
            self._step_call(character)

    def _step_text(self, character: str) -> None:
        self._held += character
        while self._held:
            visible = self._held.lstrip(self._skipped)
            if self._closers and visible == self._closers[-1]:
                self._closers.pop()
                self._held, self._skipped = "", _WHITE
                return
            if visible in self._marks.dropped:
                self._held, self._skipped = "", _WHITE
                self._closers.clear()
                return
            is_mark = visible in self._marks.opening and self._may_begin(visible)
            if is_mark or (visible and self._is_bare(visible)):
                # White space goes with a mark in any case, and with a bare call if it is one.
                is_lost = is_mark and visible not in self._marks.kept
                self._begin_call(visible if is_mark else "", "" if is_lost else self._held[: -len(visible)])
                self._state, self._held = "front", ""
                if is_mark and visible.endswith("["):
                    self._open_list()
                elif visible == _FENCE:
                    self._closers = [_END_FENCE]
                elif not is_mark:
                    self._step_front(visible)
                return
            if not visible or self._may_be_mark(visible):
                return
            self._say(self._held[: len(self._held) - len(visible) + 1])
            self._held = visible[1:]
            self._end_calls()

    def _open_list(self) -> None:
        self._closers.append("]")
        self._marked_list, self._python_list = self._is_marked, False

    def _end_calls(self) -> None:
        self._bare_allowed = False
        self._closers.clear()
        self._skipped = _WHITE

    def _may_begin(self, mark: str) -> bool:
        return mark != _FENCE or self._bare_allowed

    def _may_be_mark(self, visible: str) -> bool:
        if self._closers and self._closers[-1].startswith(visible):
            return True
        return visible[0] in self._begins and any(
            mark.startswith(visible) and self._may_begin(mark) for mark in self._texts
        )

    @property
    def _in_list(self) -> bool:
        return bool(self._closers) and self._closers[-1] == "]"

    def _is_bare(self, visible: str) -> bool:
        """Whether a call may begin with the character, with no mark before it."""
        if self._in_list:
            return _is_of_name(visible) if self._python_list else visible == "{"
        if not self._bare_allowed:
            return False
        return (visible == "{" and self._marks.bare_objects) or (visible == "[" and self._marks.bare_lists)

    def _begin_call(self, mark: str, white: str) -> None:
        self._mark, self._white = mark, white
        self._raw = mark
        self._front = ""
        self._reader: CallReader | None = None
        self._told = False  # that it is a call
        self._refused = False  # that it is one too many

    def _step_front(self, character: str) -> None:
        """What comes between a mark and the arguments: nothing, the beginning of a list, or a name."""
        self._raw += character
        self._front += character
        front = self._front.lstrip()
        if front == "{":
            needs_arguments = not (self._mark or self._closers)
            self._read(ObjectReader(self._names, needs_arguments=needs_arguments), "{")
        elif front == "[" and not self._in_list:
            self._open_list()
            self._front = ""
        elif len(self._front) > _LONGEST_FRONT or not (not front or self._read_named(front)):
            self._give_back()

    def _read_named(self, front: str) -> bool:
        """Whether `front` may lead to the arguments of a call whose name is in it; where they begin, reads them."""
        if self._mark:
            forms = self._marks.opening[self._mark]
        else:
            forms = [each for each in self._marks.forms if each.front.endswith(r"\(")]
        found = [(each, regex.fullmatch(each.front, front, partial=True)) for each in forms if each.front]
        found = [(each, match) for each, match in found if match]
        whole = [(each, match) for each, match in found if not match.partial]
        if not whole:
            return bool(found)
        form, match = max(whole, key=lambda pair: bool(pair[0].parameter))
        name = self._named(match["name"])
        if self._mark.endswith(("=", '"')):
            self._mark = self._raw
        if name is None:
            return False
        if front.endswith("("):
            self._python_list = self._in_list
            self._read(PythonReader(name, self._schemas.get(name)), "")
        else:
            reader = TaggedReader(name, form, self._schemas.get(name))
            self._read(reader, front[-1] if front[-1] in "{<" else "")
        return True

    def _named(self, front: str) -> str | None:
        """The tool of that name, which an id of Mistral's may follow."""
        if front in self._names:
            return front
        name = front[:-_NUM_ID]
        return name if self._mark == MISTRAL.begin and name in self._names and front.isalnum() else None

    def _read(self, reader: CallReader, begun: str) -> None:
        self._reader, self._state = reader, "call"
        if begun:
            self._raw = self._raw[: -len(begun)]
            self._step_call(begun)
        else:
            self._tell()

    def _step_call(self, character: str) -> None:
        assert self._reader is not None
        self._raw += character
        is_whole = self._reader.step(character)
        self._tell()
        if is_whole is None:
            return
        if is_whole:
            self._end_call()
        elif self._told:
            rest = self._reader.rest
            self._argue(self._reader.close())
            self._after_call()
            for character in rest:
                self._step(character)
        else:
            self._give_back()

    def _tell(self) -> None:
        """Tells what has come of a call, if it is certain to be one."""
        assert self._reader is not None
        if not self._told and self._reader.name is not None and (self._live or self._is_marked):
            self._told = True
            self._call(self._reader.name)
        if self._told:
            self._argue(self._reader.take())

    @property
    def _is_marked(self) -> bool:
        """Whether what comes is a call, by a mark before it or before its list."""
        return (bool(self._mark) and self._mark != _FENCE) or (self._in_list and self._marked_list)

    def _end_call(self) -> None:
        assert self._reader is not None
        if not self._told:
            found = self._reader.whole()
            if found is None:
                self._give_back()
                return
            self._call(found[0])
            self._argue(found[1])
        self._after_call()

    def _after_call(self) -> None:
        follows = self._mark in ("", "<|python_tag|>")
        self._state, self._raw, self._told = "text", "", False
        self._bare_allowed = True
        self._skipped = _WHITE + ("," if self._in_list else ";" if follows else "")

    def _call(self, name: str) -> None:
        """Begins a call, unless there may be no more of them."""
        self._refused = self._single and self.num_calls > 0
        if not self._refused:
            self._deltas.append(Delta("call", name, self.num_calls))
            self.num_calls += 1

    def _argue(self, text: str) -> None:
        if text and not self._refused:
            self._deltas.append(Delta("arguments", text, self.num_calls - 1))

    def _cut_call(self) -> None:
        """Tells what has come of a call when the answer is cut: its name and arguments so far, or nothing."""
        found = None if self._reader is None else self._reader.so_far()
        if found is not None:
            self._call(found[0])
            self._argue(found[1])
        elif not (self._is_marked or self._live or self.num_calls):
            return  # it may be anything
        self._state, self._raw = "text", ""

    def _give_back(self) -> None:
        """Makes what looked like a call content, but for its mark; what follows that may hold another call."""
        raw, self._state, self._raw = self._raw, "text", ""
        is_kept = self._mark in self._marks.kept
        self._say(self._white + (self._mark if is_kept else "" if self._mark else raw[:1]))
        rest = raw[max(len(self._mark), 1) :]
        self._end_calls()
        if len(rest) > _LONG:
            held = max((num_begun(rest, mark) for mark in self._texts), default=0)
            self._say(self._without_marks(rest[: len(rest) - held]))
            rest = rest[len(rest) - held :]
        for character in rest:
            self._step(character)

    def _without_marks(self, text: str) -> str:
        for mark in sorted(self._texts, key=len, reverse=True):
            if mark not in self._marks.kept:
                text = text.replace(mark, "")
        return text


def _is_of_name(character: str) -> bool:
    """Whether it may stand in front of arguments: in a name, or in a mark after it."""
    return character.isalnum() or character in "_.-"

"""Calls of tools in an answer's text, as models write them, found one character at a time.

    Hermes, Qwen   <tool_call>{"name": …, "arguments": {…}}</tool_call>, anywhere, repeated
    Llama 3        {"name": …, "parameters": {…}} at the beginning, or <|python_tag|> before it; more after ";"

What begins like a call and is none is content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal, NoReturn

from sleb.server.message.reasoning import Delta, join_deltas

TOOL_CALL, END_TOOL_CALL, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
MARKERS = (TOOL_CALL, PYTHON_TAG)
_FIRST_KEYS = frozenset({"name", "type", "function", "arguments", "parameters", "id"})
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*\{')
_LONG = 4096  # a broken call of more characters is not searched for another one


class ToolParser:
    """Parts calls from content.

    Args:
        names: the tools; a call of any other is content.
        live: whether arguments are passed on as they come. Otherwise a call is known when it is whole, so that a broken
            one can still be given as content. Only for text that a grammar keeps in form.
        single: whether calls after the first are dropped.
    """

    def __init__(self, names: Collection[str], *, live: bool = False, single: bool = False) -> None:
        self.num_calls = 0
        self._names = frozenset(names)
        self._live = live
        self._single = single
        self._deltas: list[Delta] = []
        self._state: Literal["text", "call", "behind"] = "text"
        self._held = ""  # in text: white space and what may be a marker; behind a call: what may be its end
        self._bare_allowed = True  # whether an object that begins here may be a call
        self._after_bare = False
        self._begin_call("")

    def push(self, text: str) -> list[Delta]:
        """What `text` makes certain."""
        for character in text:
            self._step(character)
        return self._take()

    def flush(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        while self._state == "call" and not self._streams:
            self._give_back()
        if self._state == "text" and (self._held.strip() or not self.num_calls):
            self._deltas.append(Delta("content", self._held))
        self._held = ""
        return self._take()

    def _take(self) -> list[Delta]:
        deltas, self._deltas = join_deltas(self._deltas), []
        return deltas

    def _step(self, character: str) -> None:
        if self._state == "call":
            self._step_call(character)
        elif self._state == "behind":
            self._step_behind(character)
        else:
            self._step_text(character)

    def _step_text(self, character: str) -> None:
        self._held += character
        while self._held:
            visible = self._held.lstrip(" \n\r\t;" if self._after_bare else None)
            if visible in MARKERS or (visible == "{" and self._bare_allowed):
                self._begin_call("" if visible == "{" else visible)
                self._white = self._held[: len(self._held) - len(visible)]
                self._state, self._held = "call", ""
                if visible == "{":
                    self._step_call("{")
                return
            if any(marker.startswith(visible) for marker in MARKERS):
                return
            num_white = len(self._held) - len(visible)
            self._deltas.append(Delta("content", self._held[: num_white + 1]))
            self._held = visible[1:]
            self._bare_allowed = self._after_bare = False

    def _begin_call(self, marker: str) -> None:
        self._white = ""  # before it, which goes with it if it is a call
        self._marker = marker
        self._raw = marker
        self._json_start: int | None = None
        self._depth = 0
        self._in_string = self._escaped = False
        self._string_start = 0
        self._key_seen = False
        self._streams = False

    def _step_call(self, character: str) -> None:
        self._raw += character
        if self._json_start is None:
            if character == "{":
                self._json_start, self._depth = len(self._raw) - 1, 1
            elif not character.isspace():
                self._give_back()
            return
        depth = self._depth
        if not self._scan(character):
            self._give_back()
            return
        if self._streams and max(depth, self._depth) >= 2:
            self._argue(character)
        elif self._live and (depth, self._depth) == (1, 2):
            self._open_stream()
        if self._depth == 0:
            self._end_call()

    def _scan(self, character: str) -> bool:
        """Keeps track of strings and brackets; False if this cannot be a call."""
        if self._in_string:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == '"':
                self._in_string = False
                if not self._key_seen:
                    self._key_seen = True
                    return self._raw[self._string_start : -1] in _FIRST_KEYS
        elif character == '"':
            self._in_string, self._string_start = True, len(self._raw)
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
        return self._in_string or character != "<"

    def _open_stream(self) -> None:
        head = _HEAD.fullmatch(self._raw, self._json_start or 0)
        if head is not None and head[1] in self._names and not (self._single and self.num_calls):
            self._streams = True
            self._call(head[1])
            self._argue("{")

    def _end_call(self) -> None:
        if not self._streams:
            found = parse_call(self._raw[self._json_start :], self._names, needs_arguments=not self._marker)
            if found is None:
                self._give_back()
                return
            if not (self._single and self.num_calls):
                self._call(found[0])
                self._argue(found[1])
        tagged = self._marker == TOOL_CALL
        self._state = "behind" if tagged else "text"
        self._bare_allowed, self._after_bare = True, not tagged
        self._raw, self._streams = "", False

    def _call(self, name: str) -> None:
        self._deltas.append(Delta("call", name, self.num_calls))
        self.num_calls += 1

    def _argue(self, text: str) -> None:
        self._deltas.append(Delta("arguments", text, self.num_calls - 1))

    def _give_back(self) -> None:
        """Makes what looked like a call content; what follows its mark may hold another one."""
        raw, self._state, self._raw = self._raw, "text", ""
        num_certain = max(len(self._marker), 1) if len(raw) <= _LONG else len(raw)
        self._bare_allowed = self._after_bare = False
        self._deltas.append(Delta("content", self._white + raw[:num_certain]))
        for character in raw[num_certain:]:
            self._step(character)

    def _step_behind(self, character: str) -> None:
        self._held += character
        visible = self._held.lstrip()
        if visible == END_TOOL_CALL:
            self._state, self._held = "text", ""
        elif not END_TOOL_CALL.startswith(visible):
            held, self._held, self._state = self._held, "", "text"
            for each in held:
                self._step(each)


def parse_call(text: str, names: Collection[str], *, needs_arguments: bool) -> tuple[str, str] | None:
    """Name and arguments (a JSON object as text) of a call; None if `text` is none of one of `names`."""
    try:
        call = json.loads(text, strict=False, parse_constant=_refuse_constant)
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        name = inner.get("name", call.get("function"))
        arguments = inner.get("arguments", inner.get("parameters"))
        if arguments is None and not needs_arguments:
            arguments = {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False, parse_constant=_refuse_constant)
    except (ValueError, RecursionError, AttributeError):
        return None
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return name, _dump(arguments)


def _dump(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, which only an escape can say
        return json.dumps(value)
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

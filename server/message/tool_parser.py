"""Calls of tools in an answer's text, as models write them, found one character at a time.

    Hermes, Qwen   <tool_call>{"name": …, "arguments": {…}}</tool_call>, anywhere, repeated
    Llama 3        {"name": …, "parameters": {…}} at the beginning, or <|python_tag|> before it; more after ";"
                   <function=NAME>{…}</function>
    Qwen Coder     <function=NAME><parameter=KEY>value</parameter>…</function>, in <tool_call> or not
    Mistral        [TOOL_CALLS] [{"name": …, "arguments": {…}}, …], or [TOOL_CALLS]NAME[ARGS]{…}
    Phi 4          <|tool_call|>[{"name": …, "arguments": {…}}]<|/tool_call|>

What begins like a call and is none is content, without the marks. So is what follows a mark and is none of these.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NoReturn

from sleb.server.message.reasoning import Delta, join_deltas, num_begun

TOOL_CALL, END_TOOL_CALL, PYTHON_TAG = "<tool_call>", "</tool_call>", "<|python_tag|>"
TOOL_CALLS = "[TOOL_CALLS]"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_BEGINS = (TOOL_CALL, PYTHON_TAG, TOOL_CALLS, "<|tool_call|>", _FUNCTION)
_ENDS = (END_TOOL_CALL, _END_FUNCTION, "<|/tool_call|>")
MARKS = (*_BEGINS, *_ENDS)

_ANY_MARK = re.compile("|".join(map(re.escape, MARKS)))
_FIRST_KEYS = frozenset({"name", "type", "function", "arguments", "parameters", "id"})
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_AFTER_NAME = re.compile(r"(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?$")  # of Mistral, where they are no special tokens
_NUM_ID = 9  # characters of an id of Mistral's
_PARAMETER = re.compile(r"<parameter=([^>]*)>\n?(.*?)\n?</parameter>", re.DOTALL)
_LONG = 4096  # a broken call of more characters is not searched for another one
_LONGEST_FRONT = 256  # characters between a mark and the arguments
_WHITE = " \t\n\r\f\v"


class ToolParser:
    """Parts calls from content.

    Args:
        names: the tools; a call of any other is content.
        schemas: of their arguments, by name, for calls whose values are plain text.
        live: whether arguments are passed on as they come. Otherwise a call is known when it is whole, so that a broken
            one can still be given as content. Only for text that a grammar keeps in form.
        single: whether calls after the first are dropped.
    """

    def __init__(
        self,
        names: Collection[str],
        schemas: Mapping[str, Any] | None = None,
        *,
        live: bool = False,
        single: bool = False,
    ) -> None:
        self.num_calls = 0
        self._names = frozenset(names)
        self._schemas = schemas or {}
        self._live = live
        self._single = single
        self._deltas: list[Delta] = []
        self._state: Literal["text", "call", "function"] = "text"
        self._raw = ""  # of a call, from its mark on
        self._held = ""  # in text: white space and what may be a mark
        self._bare_allowed = True  # whether an object that begins here may be a call
        self._in_list = False
        self._skipped = _WHITE  # what goes with a call or a mark that follows it
        self._begin_call("", "")

    def push(self, text: str) -> list[Delta]:
        """What `text` makes certain."""
        for character in text:
            self._step(character)
        return self._take()

    def flush(self, cut: bool = False) -> list[Delta]:
        """What was held back, at the end of the answer.

        cut: whether the answer ends by its length. What has come of a call by then is told as that call, if it is known
        which one it is; and no beginning of a mark is content.
        """
        if cut and self._state != "text":
            self._cut_call()
        while self._state != "text" and not self._streams:
            if self._state == "function" and self._raw[len(self._mark) :].lstrip().startswith("{"):
                self._end_function()
            else:
                self._give_back()
        begun = bool(self._held.lstrip(self._skipped))
        if not (cut and (begun or self._in_list)) and (begun or not self.num_calls):
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
        elif self._state == "call":
            self._step_call(character)
        else:
            self._raw += character
            if character == ">" and self._raw.endswith(_END_FUNCTION):
                self._raw = self._raw.removesuffix(_END_FUNCTION)
                self._end_function()

    def _step_text(self, character: str) -> None:
        self._held += character
        while self._held:
            visible = self._held.lstrip(self._skipped)
            if visible in _ENDS or (self._in_list and visible == "]"):
                self._held, self._in_list, self._skipped = "", False, _WHITE
                return
            if visible in _BEGINS or (visible == "{" and self._bare_allowed):
                is_mark = visible != "{"
                # White space goes with a mark in any case, and with a bare call if it is one.
                self._begin_call(visible if is_mark else "", "" if is_mark else self._held[: -len(visible)])
                self._state, self._held = "call", ""
                if not is_mark:
                    self._step_call("{")
                return
            if not visible or any(mark.startswith(visible) for mark in MARKS):
                return
            self._say(self._held[: len(self._held) - len(visible) + 1])
            self._held = visible[1:]
            self._bare_allowed = self._in_list = False
            self._skipped = _WHITE

    def _begin_call(self, mark: str, white: str) -> None:
        self._mark, self._white = mark, white
        self._raw = mark
        self._name: str | None = None  # where it stands in front of the arguments
        self._json_start: int | None = None
        self._depth = 0
        self._in_string = self._escaped = False
        self._string_start = 0
        self._key_seen = False
        self._streams = False

    def _step_call(self, character: str) -> None:
        self._raw += character
        if self._json_start is None:
            self._step_front(character)
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

    def _step_front(self, character: str) -> None:
        """What comes between a mark and the object: nothing, the beginning of a list, or a name."""
        front = self._raw[len(self._mark) : -1].strip()
        if self._mark == _FUNCTION:
            if character == ">":
                self._state, self._mark, self._name = "function", self._raw, front
                if front not in self._names:
                    self._give_back()
            elif len(self._raw) > _LONGEST_FRONT or not _is_of_name(character):
                self._give_back()
        elif character == "{":
            self._json_start, self._depth = len(self._raw) - 1, 1
            if front == "[":
                self._in_list = True
            elif front:
                self._name, self._key_seen = self._name_in(front), True
                if self._name is None:
                    self._give_back()
        elif len(self._raw) > _LONGEST_FRONT or not (
            character.isspace()
            or (character == "[" and not front)
            or (front[:1] != "[" and self._mark == TOOL_CALLS and _is_of_name(character))
        ):
            self._give_back()

    def _name_in(self, front: str) -> str | None:
        """The tool that Mistral's newer models name before its arguments; the marks after it may be left out."""
        front = _AFTER_NAME.sub("", front)
        for name in self._names:
            if front == name or (front.startswith(name) and len(front) == len(name) + _NUM_ID):
                return name
        return None

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
        head = _HEAD.match(self._raw, self._json_start or 0)
        if head is not None and head.end() == len(self._raw) - 1 and self._call(head[1]):
            self._streams = True
            self._argue("{")

    def _end_call(self) -> None:
        if not self._streams:
            text = self._raw[self._json_start :]
            if self._name is not None:
                text = f'{{"name": "{self._name}", "arguments": {text}}}'
            found = parse_call(text, self._names, needs_arguments=not (self._mark or self._in_list))
            if found is None:
                self._give_back()
                return
            if self._call(found[0]):
                self._argue(found[1])
        self._after_call()

    def _end_function(self) -> None:
        """The end of a call whose name stood in its mark; the arguments are an object, or each in marks of its own."""
        body = self._raw[len(self._mark) :].strip()
        if not body.startswith("{"):
            body = "" if _PARAMETER.sub("", body).strip() else _dump(self._parameters(body))
        found = parse_call(
            f'{{"name": "{self._name}", "arguments": {body}}}', self._names, needs_arguments=True
        )
        if found is None:
            self._give_back()
            return
        if self._call(found[0]):
            self._argue(found[1])
        self._after_call()

    def _parameters(self, body: str) -> dict[str, Any]:
        return {key: self._typed(key, value) for key, value in _PARAMETER.findall(body)}

    def _typed(self, key: str, value: str) -> Any:
        """A value that came as plain text, which only a parameter that is no string is read as JSON."""
        schema = (self._schemas.get(self._name or "") or {}).get("properties")
        of_key = schema.get(key) if isinstance(schema, dict) else None
        if not isinstance(of_key, dict) or of_key.get("type", "string") == "string":
            return value
        try:
            return json.loads(value, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return value

    def _after_call(self) -> None:
        is_bare = not (self._mark or self._in_list)
        self._state, self._raw, self._streams = "text", "", False
        self._bare_allowed = True
        self._skipped = _WHITE + (
            ";" if is_bare or self._mark == PYTHON_TAG else "," if self._in_list else ""
        )

    def _call(self, name: str) -> bool:
        """Begins a call, unless there may be no more of them or there is no such tool."""
        if name not in self._names or (self._single and self.num_calls):
            return False
        self._deltas.append(Delta("call", name, self.num_calls))
        self.num_calls += 1
        return True

    def _argue(self, text: str) -> None:
        self._deltas.append(Delta("arguments", text, self.num_calls - 1))

    def _cut_call(self) -> None:
        """Tells what has come of a call when the answer is cut: its name and arguments so far, or nothing."""
        if self._streams:
            return
        name, arguments = self._name, ""
        if self._state == "function":
            body = self._raw[len(self._mark) :].lstrip()
            arguments = (
                _arguments_so_far(body) if body.startswith("{") else _dump(self._parameters(body))[:-1]
            )
        elif self._json_start is not None:
            head = None if name is not None else _HEAD.match(self._raw, self._json_start)
            name = head[1] if head is not None else name
            arguments = _arguments_so_far(self._raw[self._json_start if head is None else head.end() :])
        if name in self._names:
            if self._call(name or ""):
                self._argue(arguments)
        elif not (self._mark or self._in_list or self._live or self.num_calls):
            return  # an object that may be anything
        self._state, self._raw = "text", ""

    def _give_back(self) -> None:
        """Makes what looked like a call content, but for its mark; what follows that may hold another call."""
        raw, self._state, self._raw = self._raw, "text", ""
        num_certain = 0 if self._mark else 1
        rest = raw[len(self._mark) + num_certain :]
        self._say(self._white + raw[:num_certain])
        self._bare_allowed = self._in_list = False
        self._skipped = _WHITE
        if len(rest) > _LONG:
            held = max(num_begun(rest, mark) for mark in MARKS)
            self._say(_ANY_MARK.sub("", rest[: len(rest) - held]))
            rest = rest[len(rest) - held :]
        for character in rest:
            self._step(character)


def _is_of_name(character: str) -> bool:
    """Whether it may stand in front of arguments: in a name, or in a mark after it."""
    return character.isalnum() or character in "_.-[]"


def _arguments_so_far(text: str) -> str:
    """The object that `text` begins with, or all of it where that has no end."""
    try:
        return _dump(json.JSONDecoder(strict=False).raw_decode(text)[0])
    except (ValueError, RecursionError):
        return text


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

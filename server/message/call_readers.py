"""One call, read a character at a time, in each notation that models write calls in.

A reader's `step` takes a character and tells whether the call goes on (None), is whole (True), or is no call of the
notation (False): `rest` is then what belongs to none. `name` is known from where the arguments begin, and `take` gives
the JSON of them that has become certain since: what it gave, joined, is the arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any, Literal

from sleb.server.message.reasoning import num_begun
from sleb.server.message.tool_formats import ToolFormat
from sleb.server.message.values import dump, is_text, python_literal, refuse_constant, typed

_FIRST_KEYS = frozenset({"name", "type", "function", "arguments", "parameters", "id"})
_HEAD = re.compile(
    r'\{\s*(?:"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*)*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_LONGEST_KEY = 256
_OPEN, _CLOSE = "([{", ")]}"


class CallReader:
    """A call of one notation. name: of its tool, once it is certain. rest: what belongs to no call."""

    def __init__(self, tool: str = "") -> None:
        self.name: str | None = None
        self.rest = ""
        self._tool = tool
        self._all = self._new = ""  # of the arguments: told, and not yet

    def step(self, character: str) -> bool | None:
        """Whether the call goes on (None), is whole (True), or is no call of the notation (False)."""
        raise NotImplementedError

    def take(self) -> str:
        """The JSON of the arguments that has become certain since."""
        new, self._new = self._new, ""
        self._all += new
        return new

    def close(self) -> str:
        """The arguments' end, where an answer that ends here has said them all."""
        return ""

    def whole(self) -> tuple[str, str] | None:
        """Name and arguments of a call that is whole, checked; None if it is none of the tools'."""
        return self._tool, self._all + self.take()

    def so_far(self) -> tuple[str, str] | None:
        """Name and arguments as far as they have come, of a call that is cut; None if it is not known which."""
        return None


class JsonText:
    """Follows strings and brackets of a JSON object that begins with the first character."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = self._escaped = False

    def step(self, character: str) -> str:
        """The character as JSON has it: a control character in a string as its escape, as models forget."""
        if self.in_string:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == '"':
                self.in_string = False
            elif character < " ":
                return json.dumps(character)[1:-1]
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
        return character


class ObjectReader(CallReader):
    """`{"name": …, "arguments": {…}}`, in any order, with "parameters" for "arguments", or inside of a "function"."""

    def __init__(self, names: Collection[str], *, needs_arguments: bool) -> None:
        super().__init__()
        self._names = names
        self._needs_arguments = needs_arguments
        self._json = JsonText()
        self._raw = ""
        self._first_key: int | None = None  # where it begins
        self._key_seen = False

    def step(self, character: str) -> bool | None:
        json_ = self._json
        depth, in_string = json_.depth, json_.in_string
        self._raw += character
        self.rest = character
        text = json_.step(character)
        if not self._key_seen and in_string != json_.in_string:
            if self._first_key is None:
                self._first_key = len(self._raw)
            else:
                self._key_seen = True
                if self._raw[self._first_key : -1] not in _FIRST_KEYS:
                    return False
        if not json_.in_string and character == "<":
            return False
        if self.name is None and (depth, json_.depth) == (1, 2):
            head = _HEAD.match(self._raw)
            if head is not None and head.end() == len(self._raw) - 1 and head[1] in self._names:
                self.name = head[1]
        if self.name is not None and max(depth, json_.depth) >= 2:
            self._new += text
        return True if not json_.depth else None

    def whole(self) -> tuple[str, str] | None:
        return parse_call(self._raw, self._names, needs_arguments=self._needs_arguments)

    def so_far(self) -> tuple[str, str] | None:
        head = _HEAD.match(self._raw)
        if head is None or head[1] not in self._names:
            return None
        return head[1], _arguments_so_far(self._raw[head.end() :])


class TaggedReader(CallReader):
    """What follows a name: an object of arguments, or a mark before each of them."""

    def __init__(self, name: str, form: ToolFormat, schema: Any) -> None:
        super().__init__(name)
        self._schema = schema
        self._key_mark, self._key_end = form.parameter, form.value.split("\n")[0].strip()
        self._value_mark = form.value.strip().removeprefix(self._key_end).strip()
        self._value_end = form.value_end.strip()
        self._end = form.end.strip().split("\n")[0]
        self._json: JsonText | None = None
        self._state: Literal["between", "key", "before", "value"] = "between"
        self._buffer = ""
        self._key = ""
        self._is_text = False
        self._begun = False  # whether some of a value that is text is out
        self._num_keys = 0

    def step(self, character: str) -> bool | None:
        if self._json is not None:
            if character == "<" and not self._json.in_string:
                self.rest = character
                return False
            self._say(self._json.step(character))
            return True if not self._json.depth else None
        self._buffer += character
        self.rest = self._buffer
        if self._state == "between":
            return self._between()
        if self._state == "value":
            self._go_on()
        elif self._state == "key":
            if self._buffer.endswith(self._key_end):
                self._key = self._buffer.removesuffix(self._key_end).strip()
                self._is_text = is_text(self._schema, self._key)
                self._state, self._buffer = "before" if self._value_mark else "value", ""
            return False if len(self._buffer) > _LONGEST_KEY else None
        elif self._buffer.strip() == self._value_mark:
            self._state, self._buffer = "value", ""
        elif not self._value_mark.startswith(self._buffer.strip()):
            return False
        return None

    def _between(self) -> bool | None:
        visible = self._buffer.strip()
        if visible == "{" and not self._num_keys:
            self.name, self._json = self._tool, JsonText()
            self._say(self._json.step("{"))
        elif visible and visible == self._key_mark:
            if self.name is None:
                self.name = self._tool
                self._say("{")
            self._state, self._buffer = "key", ""
        elif visible and visible == self._end:
            self._say("{}" if self.name is None else "}")
            self.name = self._tool
            return True
        elif not ((self._key_mark and self._key_mark.startswith(visible)) or self._end.startswith(visible)):
            return False
        return None

    def _go_on(self) -> None:
        """A value that is text is told but for what may be the line end or the mark behind it."""
        if self._buffer.endswith(self._value_end):
            value = _without_line_ends(self._buffer.removesuffix(self._value_end), begins=not self._begun)
            if self._is_text:
                self._say_text(value)
                self._say('"')
            else:
                self._begin_key()
                self._say(dump(typed(value)))
            self._num_keys += 1
            self._state, self._buffer, self._begun = "between", "", False
            return
        if not self._is_text or self._buffer == "\n":
            return
        held = max(num_begun(self._buffer, self._value_end), num_begun(self._buffer, "\n" + self._value_end))
        certain = self._buffer[: len(self._buffer) - held]
        if certain:
            self._say_text(certain if self._begun else certain.removeprefix("\n"))
            self._buffer = self._buffer[len(certain) :]

    def _begin_key(self) -> None:
        self._say(f"{', ' if self._num_keys else ''}{dump(self._key)}: ")

    def _say_text(self, text: str) -> None:
        if not self._begun:
            self._begin_key()
            self._say('"')
            self._begun = True
        self._say(dump(text)[1:-1])

    def _say(self, text: str) -> None:
        self._new += text

    def close(self) -> str:
        return "}" if self.name is not None and self._json is None and self._state == "between" else ""


class PythonReader(CallReader):
    """`name(key=value, …)` from behind the bracket on; values are literals of Python or of JSON.

    Templates of Llama leave the quotes of texts out, or put other values in them too: `schema` tells which is meant.
    """

    def __init__(self, name: str, schema: Any) -> None:
        super().__init__(name)
        self.name = name
        self._schema = schema
        self._state: Literal["key", "value"] = "key"
        self._buffer = ""
        self._key = ""
        self._quote = ""  # of the string that is open
        self._escaped = False
        self._depth = 0
        self._new = "{"
        self._num_keys = 0

    def step(self, character: str) -> bool | None:
        self.rest = character
        if self._state == "key":
            return self._step_key(character)
        if self._quote:
            if self._escaped or character == "\\":
                self._escaped = not self._escaped
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in _OPEN:
            self._depth += 1
        elif character in _CLOSE and self._depth:
            self._depth -= 1
        elif character in ",)" and not self._depth:
            value = self._value(self._buffer.strip())
            if value is None:
                self._new += self._buffer
                return False
            self._new += value
            self._num_keys += 1
            self._state, self._buffer = "key", ""
            return self._step_key(character) if character == ")" else None
        elif character in _CLOSE:
            self._new += self._buffer
            return False
        # A line end in a string, which Python would have as an escape.
        self._buffer += "\\n" if self._quote and character == "\n" else character
        return None

    def _value(self, text: str) -> str | None:
        """The JSON of a value; None if it is none."""
        found, is_word = python_literal(text), is_text(self._schema, self._key)
        if found is None:
            return dump(text) if is_word and text and not set(text) & set(_OPEN + _CLOSE + "'\"") else None
        return found if is_word or not found.startswith('"') else dump(typed(json.loads(found)))

    def _step_key(self, character: str) -> bool | None:
        key = self._buffer.strip()
        if character == "=" and key.isidentifier():
            self._new += f"{', ' if self._num_keys else ''}{dump(key)}: "
            self._key, self._state, self._buffer = key, "value", ""
        elif character == ")" and not key:
            self._new += self.close()
            return True
        elif len(key) > _LONGEST_KEY or not (character.isspace() or (key + character).isidentifier()):
            self.rest = self._buffer + character
            return False
        else:
            self._buffer += character
        return None

    def close(self) -> str:
        return "" if self._state == "value" else "}"

    def so_far(self) -> tuple[str, str] | None:
        return self.whole()


def parse_call(text: str, names: Collection[str], *, needs_arguments: bool) -> tuple[str, str] | None:
    """Name and arguments (a JSON object as text) of a call; None if `text` is none of one of `names`."""
    try:
        call = json.loads(text, strict=False, parse_constant=refuse_constant)
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        name = inner.get("name", call.get("function"))
        arguments = inner.get("arguments", inner.get("parameters"))
        if arguments is None and not needs_arguments:
            arguments = {}
        if isinstance(arguments, str):
            arguments = json.loads(arguments, strict=False, parse_constant=refuse_constant)
        if isinstance(name, str) and name in names and isinstance(arguments, dict):
            return name, dump(arguments)
    except (ValueError, RecursionError, AttributeError):
        pass
    return None


def _without_line_ends(text: str, *, begins: bool) -> str:
    return (text.removeprefix("\n") if begins else text).removesuffix("\n")


def _arguments_so_far(text: str) -> str:
    """The object that `text` begins with, or all of it where that has no end."""
    try:
        return dump(json.JSONDecoder(strict=False).raw_decode(text)[0])
    except (ValueError, RecursionError):
        return text

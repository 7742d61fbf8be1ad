"""The arguments of a call as an object, however much of them came."""

from __future__ import annotations

from typing import Any

import orjson
import regex
from pydantic_core import from_json

_WHITE = " \t\n\r"
_HEX = "[0-9a-fA-F]"
_SCALAR = regex.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")
# The halves of a character beyond 16 bits stand together.
_ESCAPE = regex.compile(
    rf"""\\(?:["\\/bfnrt]|u(?:[0-9a-ce-fA-CE-F]{_HEX}{{3}}|[dD][0-7]{_HEX}{{2}}"""
    rf"""|[dD][89abAB]{_HEX}{{2}}\\u[dD][c-fC-F]{_HEX}{{2}}))"""
)
# What clients' readers of JSON take at least (Python's own: 4300 digits; jiter: 200 levels).
_LONGEST_SCALAR = 4096
_DEEPEST = 128


class JsonBeginning:
    """Follows text that should be one JSON object (RFC 8259), and keeps the part up to where it ceases to be one.

    For readers that fail on anything else, while a model may write anything.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._open: list[str] = []  # the brackets that are to come
        self._awaits = "object"
        self._token = ""  # of a string or scalar that has begun: the escape or the scalar so far
        self._in_string = False

    def push(self, text: str) -> str:
        """What of `text` still belongs to the object."""
        for i, character in enumerate(text):
            if self._is_over or not self._step(character):
                self._is_over = True
                return text[:i]
        return text

    def _step(self, character: str) -> bool:
        if self._in_string:
            return self._step_string(character)
        if self._token:
            token = self._token + character
            if len(token) <= _LONGEST_SCALAR and _SCALAR.fullmatch(token, partial=True):
                self._token = token
                return True
            if not _SCALAR.fullmatch(self._token):
                return False
            self._token, self._awaits = "", "next"
        return character in _WHITE or self._step_between(character)

    def _step_string(self, character: str) -> bool:
        if self._token or character == "\\":
            self._token += character
            match = _ESCAPE.fullmatch(self._token, partial=True)
            if match and not match.partial:
                self._token = ""
            return match is not None
        if character == '"':
            self._in_string = False
            self._awaits = "colon" if self._awaits in ("key", "key or end") else "next"
        return character >= " "

    def _step_between(self, character: str) -> bool:
        """Between strings and scalars: whether the character may stand there."""
        awaits = self._awaits
        if self._open and character == self._open[-1] and awaits in ("key or end", "value or end", "next"):
            self._open.pop()
            self._awaits = "next" if self._open else "nothing"
        elif awaits == "next":
            self._awaits = "key" if self._open[-1] == "}" else "value"
            return character == ","
        elif awaits == "colon":
            self._awaits = "value"
            return character == ":"
        elif character == "{" and awaits in ("object", "value", "value or end"):
            self._open.append("}")
            self._awaits = "key or end"
        elif character == "[" and awaits in ("value", "value or end"):
            self._open.append("]")
            self._awaits = "value or end"
        elif character == '"' and awaits not in ("object", "nothing"):
            self._in_string = True
        elif awaits in ("value", "value or end"):
            self._token = character
            return _SCALAR.fullmatch(character, partial=True) is not None
        else:
            return False
        return len(self._open) <= _DEEPEST


def read_object(text: str) -> dict[str, Any]:
    """The object that `text` is or begins: of one that was cut off the fields that are whole; else an empty one."""
    for read in (orjson.loads, _read_beginning):
        try:
            value = read(text)
            orjson.dumps(value)  # it goes into an answer: not nested too deeply, no number of too many digits
        except (ValueError, TypeError):
            continue
        return value if isinstance(value, dict) else {}
    return {}


def _read_beginning(text: str) -> Any:
    return from_json(JsonBeginning().push(text), allow_inf_nan=False, allow_partial=True)

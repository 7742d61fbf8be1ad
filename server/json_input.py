"""JSON from a client: what it would become in memory is counted before it is parsed.

A parser holds the interpreter's lock, and a list of a million empty lists is 100 MB made of 3 MB. What a client has
any use for has few values for its size: most of it is text.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from sleb.errors import RequestError

MAX_VALUES = 2**18  # numbers, mostly: token ids of several prompts
MAX_OBJECTS = 2**16  # with lists: about 15 MB of small ones
MAX_STRINGS = 2**17  # with names of fields

_STRING = re.compile(rb'"[^"]*"')


def load_json(data: bytes | str, max_values: int = MAX_VALUES) -> Any:
    """The value of a JSON text. Raises ValueError for what is none, RequestError for too many values."""
    text = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    _check_size(text, max(max_values, MAX_VALUES))
    return orjson.loads(text)


def num_objects(text: str) -> int:
    """Lists and objects in a JSON text, at most."""
    return text.count("[") + text.count("{")


def num_characters(value: Any) -> int:
    """Of all strings in a JSON value."""
    total, left = 0, [value]
    while left:
        match left.pop():
            case str(text):
                total += len(text)
            case list(values):
                left.extend(values)
            case dict(fields):
                left.extend(fields.values())
    return total


def _check_size(text: bytes, max_values: int) -> None:
    if _fits(text, max_values, text.count(b'"')):
        return
    # Brackets and commas of a text inside a string are no structure: without escapes, every quote opens or closes one.
    text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_quotes = text.count(b'"')
    if num_quotes <= 2 * MAX_STRINGS:
        text = _STRING.sub(b"", text)
        if _fits(text, max_values, num_quotes):
            return
    raise RequestError(
        f"the body has too many values: at most {max_values}, of them {MAX_OBJECTS} lists and objects and "
        f"{MAX_STRINGS} strings, are taken at once; send several requests",
        code="too_many_values",
    )


def _fits(text: bytes, max_values: int, num_quotes: int) -> bool:
    return (
        text.count(b",") <= max_values
        and text.count(b"[") + text.count(b"{") <= MAX_OBJECTS
        and num_quotes <= 2 * MAX_STRINGS
    )

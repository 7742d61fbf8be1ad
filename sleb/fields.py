"""Fields of a file, read one by one: type and range are checked here, once, and an error names file, field and value.

The values come from outside (JSON, a GGUF file's metadata), so nothing is believed of them: `true` is no integer, "4.0"
no number, 2.0 the integer 2, and what goes into a message is cut and without characters that a terminal obeys.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb.errors import ModelError, SlebError

MAX_BYTES = 64 << 20  # of a JSON file: the index of the largest checkpoints, a tokenizer of a million entries
_SHOWN = 60  # characters of a value in a message
_REQUIRED: Any = object()


class Fields:
    """The fields of one object. `source`: what messages begin with, as "path/config.json"; `error`: what is raised.

    A field that is absent or null has its `default`, which is not checked; without one it is an error.
    """

    def __init__(
        self, values: Mapping[str, Any], source: object, error: type[SlebError] = ModelError
    ) -> None:
        self.values = values
        self.source = source
        self._error = error

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def beside(self, values: Mapping[str, Any]) -> Fields:
        """Other values of the same source: those of a list, by what messages call each."""
        return Fields(values, self.source, self._error)

    def wrong(self, name: str, wanted: str) -> SlebError:
        """The error that field `name` is not `wanted`: for checks that only the caller can make."""
        found = shown(self.values[name]) if name in self.values else "missing"
        named = shown_text(name[:_SHOWN])  # it may come from the file
        return self._error(f"{shown_path(self.source)}: {named} is {found}; it must be {wanted}")

    def integer(self, name: str, least: int, most: int, default: Any = _REQUIRED) -> Any:
        """An integer from `least` to `most`, both included."""
        wanted = f"an integer from {least} to {most}"
        if (value := self._get(name, wanted, default)) is default:
            return value
        number = as_integer(value)
        if number is None or not least <= number <= most:
            raise self.wrong(name, wanted)
        return number

    def number(
        self, name: str, least: float, most: float, default: Any = _REQUIRED, *, above: bool = False
    ) -> Any:
        """A finite float from `least` to `most`; `above`: greater than `least`."""
        wanted = f"a number {'above' if above else 'from'} {least:g} {'up ' if above else ''}to {most:g}"
        if (value := self._get(name, wanted, default)) is default:
            return value
        number = as_number(value)
        if number is None or not least <= number <= most or (above and number == least):
            raise self.wrong(name, wanted)
        return number

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or False."""
        return self._typed(name, bool, "true or false", default)

    def string(self, name: str, choices: Sequence[str] | None = None, default: Any = _REQUIRED) -> Any:
        """A string, one of `choices` if they are given."""
        wanted = "a string" if choices is None else f"one of {', '.join(choices)}"
        value = self._typed(name, str, wanted, default)
        if choices is not None and value is not default and value not in choices:
            raise self.wrong(name, wanted)
        return value

    def items(self, name: str, max_length: int, default: Any = _REQUIRED) -> Any:
        """A list of at most `max_length` values, which are not looked at."""
        wanted = f"a list of at most {max_length}"
        value = self._typed(name, list, wanted, default)
        if value is not default and len(value) > max_length:
            raise self._error(
                f"{shown_path(self.source)}: {name} has {len(value)} entries; it must be {wanted}"
            )
        return value

    def object(self, name: str, default: Any = _REQUIRED) -> Any:
        """The Fields of an object in this one; messages name both."""
        value = self._typed(name, dict, "an object", default)
        return value if value is default else Fields(value, f"{self.source}: {name}", self._error)

    def _get(self, name: str, wanted: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.wrong(name, wanted)
        return default

    def _typed(self, name: str, kind: type, wanted: str, default: Any) -> Any:
        value = self._get(name, wanted, default)
        if value is not default and not isinstance(value, kind):
            raise self.wrong(name, wanted)
        return value


def read_json(path: Path, error: type[SlebError] = ModelError) -> Fields:
    """The object in the JSON file `path`.

    Raises `error` for what is no regular file (a pipe would be waited for), has more than MAX_BYTES bytes, is no JSON,
    is nested too deeply, or holds something other than an object; FileNotFoundError, for callers that know what its
    absence means.
    """
    return parse_json(read_bytes(path, error), path, error)


def parse_json(data: bytes | str, source: object, error: type[SlebError] = ModelError) -> Fields:
    """The object in a JSON text. Raises `error` as `read_json` does."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as problem:  # a UnicodeDecodeError is a ValueError
        reason = (
            "it is nested too deeply" if isinstance(problem, RecursionError) else shown_text(str(problem))
        )
        raise error(f"{shown_path(source)} cannot be read as JSON: {reason}") from None
    if not isinstance(values, dict):
        raise error(f"{shown_path(source)} is {shown(values)}; it must be a JSON object")
    return Fields(values, source, error)


def read_bytes(path: Path, error: type[SlebError] = ModelError, max_bytes: int = MAX_BYTES) -> bytes:
    """A regular file's contents. Raises `error` for anything else, or more than `max_bytes`; FileNotFoundError."""
    try:
        # Opened before it is looked at, so that it is what was looked at; a pipe would block without O_NONBLOCK.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            facts = os.fstat(handle)
            if not stat.S_ISREG(facts.st_mode):
                raise error(f"{shown_path(path)} is no regular file; it must be one")
            if facts.st_size > max_bytes:
                raise error(f"{shown_path(path)} has {facts.st_size} bytes; at most {max_bytes} are read")
            return file.read(max_bytes)
    except (FileNotFoundError, SlebError):  # a ConfigError is a ValueError too
        raise
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{shown_path(path)} cannot be read: {reason}") from None


def as_integer(value: Any) -> int | None:
    """`value` if it is an integer, or a float that is a whole number; JSON knows numbers only. None for others."""
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value if isinstance(value, int) else None


def as_number(value: Any) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def shown(value: object) -> str:
    """A value in a message: as JSON if it can be, cut at 60 characters, control characters escaped."""
    head = value[: _SHOWN + 1] if isinstance(value, str | list) else value  # all of it may be megabytes
    try:
        text = json.dumps(head, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"of type {type(value).__name__}"
    text = shown_text(text[: _SHOWN + 1])  # which may be ten times as long
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def shown_text(text: str) -> str:
    """`text` with each character that a terminal might obey as its escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown_path(path: object) -> str:
    """A path, or what else stands before a field's name, in a message: its last 200 characters."""
    text = str(path)
    return shown_text(text if len(text) <= 200 else f"…{text[-200:]}")

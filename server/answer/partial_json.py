"""The arguments of a call as an object, however much of them came."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic_core import from_json


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
    return from_json(text, allow_inf_nan=False, allow_partial=True)

"""Values of a call's arguments that come as plain text or as Python writes them: what they are in JSON."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any, NoReturn

_PYTHON_NAMES = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}


def is_text(schema: Any, key: str) -> bool:
    """Whether the parameter `key` takes strings alone, so that what came for it is told as it came."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    of_key = properties.get(key) if isinstance(properties, Mapping) else None
    if not isinstance(of_key, Mapping):
        return True
    if "enum" in of_key and isinstance(of_key["enum"], list):
        return all(isinstance(value, str) for value in of_key["enum"])
    if "type" not in of_key and any(name in of_key for name in ("anyOf", "oneOf", "allOf", "$ref", "const")):
        return False
    return bool(of_key.get("type", "string") == "string")


def typed(text: str) -> Any:
    """A value that came as plain text, of a parameter that is no string: JSON, else Python's, else the text."""
    try:
        found = json.loads(text, parse_constant=refuse_constant)
        dump(found)
        return found
    except (ValueError, RecursionError):
        value = python_literal(text.strip())
        return text if value is None else json.loads(value)


def python_literal(text: str) -> str | None:
    """A literal of Python, in which JSON's names count too, as JSON; None if it is none."""
    try:
        return dump(_evaluate(ast.parse(text, mode="eval").body))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError, KeyError):
        return None


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.Name(id=name):
            return _PYTHON_NAMES[name]
        case ast.List(elts=values) | ast.Tuple(elts=values):
            return [_evaluate(value) for value in values]
        case ast.Dict(keys=keys, values=values):
            pairs = [
                (ast.literal_eval(key), _evaluate(value))
                for key, value in zip(keys, values, strict=True)
                if key
            ]
            return {str(key): value for key, value in pairs}
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
    raise ValueError


def dump(value: Any) -> str:
    """As JSON. Raises ValueError for a number that is not finite."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a pair of surrogates, which only an escape can say
        return json.dumps(value)
    return text


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")

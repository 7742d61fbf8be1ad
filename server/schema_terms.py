"""The words that this server's JSON schemas are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Schema = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"  # pydantic's way to leave a place for the name

NULL: Schema = {"type": "null"}
TEXT: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
MAYBE_BOOLEAN: Schema = {"type": ["boolean", "null"]}
MAYBE_OBJECT: Schema = {"type": ["object", "null"]}


def an_object(required: Schema, optional: Schema | None = None, text: str = "") -> Schema:
    """An object with these properties, and perhaps others."""
    schema: Schema = {"type": "object", "properties": required | (optional or {})}
    if required:
        schema["required"] = list(required)
    return schema | ({"description": text} if text else {})


def a_list(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """An array of `least` to `most` items."""
    schema: Schema = {"type": "array", "items": items}
    if least:
        schema["minItems"] = least
    return schema if most is None else schema | {"maxItems": most}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def maybe(schema: Schema) -> Schema:
    """The same or null."""
    return any_of(schema, NULL)


def one_of(values: Sequence[Any]) -> Schema:
    return {"enum": list(values)}


def reference(name: str) -> Schema:
    """A schema of the document's components."""
    return {"$ref": REFERENCE.format(model=name)}

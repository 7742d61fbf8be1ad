"""A request's bytes to the model that `sleb.server.protocol` has of it, or to an error in a person's words."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.json_input import MAX_VALUES, load_json
from sleb.server.protocol import MAX_FIELDS, Body

logger = logging.getLogger("sleb.server")

_MAX_FIELDS_NAMED = 1000  # unknown field names that are remembered
_MAX_NAMED_AT_ONCE = 16
_MAX_NAME = 64  # characters of a name that an error repeats
_OTHER_FIELDS = ""  # where those past that are counted

Model = TypeVar("Model", bound="Body")


def parse_body(
    data: bytes, model: type[Model], unknown_fields: Counter[str], max_values: int = MAX_VALUES
) -> Model:
    """The fields of a JSON body.

    Raises RequestError for what is no JSON object, has a field of a wrong type, or more than `max_values` values.
    """
    try:
        content = load_json(data, max_values)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    _check_num_fields(content)
    content = model.prepare(content)
    try:
        body = model.model_validate(content)
    except ValidationError as error:
        raise _type_error(error, content) from None
    _count_unknown_fields(body, unknown_fields)
    body.check()
    return body


def _type_error(error: ValidationError, content: dict[str, Any]) -> RequestError:
    """The first bad field, an object in a list by its number; the reasons of all members of a union are one message."""
    found = error.errors(include_url=False, include_context=False)
    field = found[0]["loc"][0]
    same = [each for each in found if each["loc"][0] == field]
    if same[0]["loc"] == (field,) and same[0]["type"] == "missing":
        return RequestError(f"'{field}' is missing", param=str(field))
    value, place, kind = same[0]["input"], same[0]["loc"], same[0]["type"]
    is_object = len(place) > 1 and isinstance(place[1], int) and (len(place) > 2 or kind == "model_type")
    name = f"{field}[{place[1]}]" if is_object else str(field)
    path = _path(content, place)
    in_object = len(path) > 1 and isinstance(path[1], str)
    inside = [str(each)[:_MAX_NAME] for each in (path[1:] if in_object else path[2:] if is_object else ())]
    if kind == "missing" and not in_object:
        inside = []
    reasons = " or ".join(dict.fromkeys(map(_reason, same)))
    shown = "" if isinstance(value, list | dict) else f" {shorten(value)}"
    return RequestError(f"bad value{shown} for '{'.'.join([name, *inside])}': {reasons[:300]}", param=name)


def _path(content: Any, place: Sequence[int | str]) -> list[int | str]:
    """The place of an error without pydantic's names for the members of a union."""
    path: list[int | str] = []
    for each in place:
        is_there = each in content if isinstance(content, dict) else isinstance(content, list)
        if is_there and (isinstance(content, dict) or isinstance(each, int)):
            content = content[each]
            path.append(each)
    return path


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "missing":
        return f"'{error['loc'][-1]}' is missing"
    if error["type"] == "model_type":  # pydantic would name the class
        return "input should be an object"
    message = error["msg"].removeprefix("Value error, ")  # pydantic's word for an exception of ours
    return message[0].lower() + message[1:]


def _check_num_fields(content: dict[str, Any]) -> None:
    """Raises RequestError for more fields than any request has: a validator would look at all of them first."""
    for name, value in (
        [(None, content), *content.items()] if len(content) <= MAX_FIELDS else [(None, content)]
    ):
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            what = "the body" if name is None else f"'{shorten(name)[1:-1]}'"
            raise RequestError(f"{what} has {len(value)} fields; at most {MAX_FIELDS} are taken", param=name)


def _count_unknown_fields(body: Body, counts: Counter[str]) -> None:
    """Counts them, and names each in the log when it first comes, those of one request to a bound."""
    num_named = 0
    for name in (name[:200] for name in body.unknown_names()):
        if name not in counts:
            num_named += 1
            if len(counts) >= _MAX_FIELDS_NAMED or num_named > _MAX_NAMED_AT_ONCE:
                name = _OTHER_FIELDS
            else:
                logger.warning("unknown request field %s is ignored (said once)", shorten(name))
        counts[name] += 1

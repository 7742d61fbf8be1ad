"""The messages of a conversation as they come in: checked, and in the form that chat templates take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.json_input import MAX_OBJECTS, load_json, num_objects

MAX_MESSAGES = 4096
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# The types of parts that are text, and the field that holds it: OpenAI's of both its APIs.
_TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class TextPart(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: str


Content = str | list[TextPart | RefusalPart]


class CalledFunction(BaseModel):
    name: str
    arguments: str | dict[str, Any] | None = None


class EarlierCall(BaseModel):
    function: CalledFunction


class _Calls(BaseModel):
    tool_calls: list[EarlierCall] | None = None
    function_call: CalledFunction | None = None


class SaidMessage(_Calls):
    """With a content; the role may be another one that the model's chat template names."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content


class AssistantMessage(_Calls):
    """May have calls in place of a content."""

    role: Literal["assistant"]
    content: Content | None = None


IncomingMessage = SaidMessage | AssistantMessage


def normalise_messages(messages: list[dict[str, Any]], template: str | None = None) -> list[dict[str, Any]]:
    """Messages whose content is a string. Raises RequestError for what a text model cannot read.

    template: the chat template, which may name roles of its own.
    """
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise RequestError(f"there are {len(messages)} messages; send 1 to {MAX_MESSAGES}", param="messages")
    room = _Room(MAX_OBJECTS)
    return [
        _normalise(message, f"messages[{index}]", template or "", room)
        for index, message in enumerate(messages)
    ]


@dataclass
class _Room:
    """Lists and objects that may yet be read from the arguments of calls, which are JSON in strings."""

    left: int


def _normalise(message: dict[str, Any], where: str, template: str, room: _Room) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES and not (isinstance(role, str) and _names(template, role)):
        raise RequestError(
            f"{where}.role is {shorten(role)}; it must be one of {', '.join(ROLES)}, or one that the model's chat "
            "template names",
            param=f"{where}.role",
        )
    if content is None and role != "assistant":
        raise RequestError(f"{where}.content is missing", param=f"{where}.content")
    # A template would write a null as "None".
    message = message | {"content": _join_parts(content, f"{where}.content") or ""}
    return _normalise_calls(message, where, room)


def _names(template: str, role: str) -> bool:
    """Whether a template has the role as a string."""
    return role.isidentifier() and (f"'{role}'" in template or f'"{role}"' in template)


def _normalise_calls(message: dict[str, Any], where: str, room: _Room) -> dict[str, Any]:
    """Calls as templates take them, with arguments that are objects; the old fields for them become today's."""
    if message["role"] == "function":
        message = message | {"role": "tool"}
    calls, function = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls must be a list of calls", param=f"{where}.tool_calls")
    normalised = [
        _normalise_call(call, f"{where}.tool_calls[{index}]", room) for index, call in enumerate(calls or ())
    ]
    if function is not None:
        old = _normalise_call({"type": "function", "function": function}, f"{where}.function_call", room)
        normalised = normalised or [old]
    message = {name: value for name, value in message.items() if name not in ("tool_calls", "function_call")}
    return message | {"tool_calls": normalised} if normalised else message


def _normalise_call(call: Any, where: str, room: _Room) -> dict[str, Any]:
    function: Any = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} must have a function with a name", param=where)
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict | None):
        raise RequestError(f"the arguments of {where} must be JSON, as a string or an object", param=where)
    if isinstance(arguments, str):
        room.left -= num_objects(arguments)
        if room.left < 0:
            raise RequestError(f"there are too many values in the arguments of {where}", param=where)
        try:
            arguments = load_json(arguments)
        except ValueError:
            pass  # as the model wrote them: broken arguments of its own must not end a conversation
    normalised: dict[str, Any] = {"type": "function"} | call
    normalised["function"] = function | {"arguments": arguments or {}}
    return normalised


def _join_parts(content: Any, where: str) -> str | None:
    """The text of a message; text parts are joined by line ends."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        field = _TEXT_FIELDS.get(kind) if isinstance(kind, str) else None
        if field is None:
            raise RequestError(
                f"{where}[{index}] has type {shorten(kind)}; this model reads text only: send parts of type 'text'",
                param=f"{where}[{index}]",
            )
        if not isinstance(part.get(field), str):
            raise RequestError(
                f"{where}[{index}].{field} must be a string", param=f"{where}[{index}].{field}"
            )
        texts.append(part[field])
    return "\n".join(texts)

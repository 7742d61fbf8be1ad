"""Items of OpenAI's Responses: checked, given their ids, and told as the messages of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.ids import new_id
from sleb.server.message.incoming import MAX_MESSAGES

MAX_ITEMS = MAX_MESSAGES
_ROLES = ("user", "assistant", "system", "developer")
# The types of parts that are text, and the field that holds it.
_TEXT_FIELDS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
REFERENCE = "item_reference"
_TYPES = ("message", "function_call", "function_call_output", "reasoning", REFERENCE)
Item = dict[str, Any]


class TextPart(BaseModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class RefusalPart(BaseModel):
    type: Literal["refusal"]
    refusal: str


class MessageItem(BaseModel):
    """What somebody said. `type` may be left out."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[TextPart | RefusalPart]


class CallItem(BaseModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str


class CallOutputItem(BaseModel):
    """What came of a call; `call_id` is that of the call, which stands before it."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: str | list[TextPart]


class ReasoningPart(BaseModel):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(BaseModel):
    """What the model thought."""

    model_config = ConfigDict(extra="allow")

    type: Literal["reasoning"]
    content: list[ReasoningPart] | None = None
    summary: list[ReasoningPart] | None = None


class ReferenceItem(BaseModel):
    """An item of an answer that is kept, or of its request."""

    type: Literal["item_reference"] | None = None
    id: str


InputItem = MessageItem | CallItem | CallOutputItem | ReasoningItem | ReferenceItem


def read_input(given: Any, find: Callable[[str], Item | None]) -> list[Item]:
    """The items of a request's `input`, checked, with ids and statuses.

    find: an item that is kept, by its id. Raises RequestError, which names the item, for what a text model cannot read.
    """
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise _refusal("input", f"is {shorten(given)}; send a text or a list of items")
    if len(given) > MAX_ITEMS:
        raise _refusal("input", f"has {len(given)} items; at most {MAX_ITEMS} are taken")
    return [_read_item(item, f"input[{index}]", find) for index, item in enumerate(given)]


def referred(given: Any) -> list[str]:
    """The ids of the kept items that a request's `input` refers to, of those that are well-formed."""
    items = given if isinstance(given, list) else []
    found = (
        item.get("id") for item in items[:MAX_ITEMS] if isinstance(item, dict) and _kind(item) == REFERENCE
    )
    return [each for each in found if isinstance(each, str)]


def _kind(item: Item) -> Any:
    kind = item.get("type")
    if kind is None:
        kind = "message" if "role" in item else REFERENCE if "id" in item else None
    return kind


def _read_item(item: Any, where: str, find: Callable[[str], Item | None]) -> Item:
    if not isinstance(item, dict):
        raise _refusal(where, f"is {shorten(item)}; an item is an object")
    match kind := _kind(item):
        case "message":
            return _read_message(item, where)
        case "function_call":
            fields = {name: _string(item, name, where, least=1) for name in ("call_id", "name")}
            fields["arguments"] = _string(item, "arguments", where)
            return _item(item, "fc", "function_call", fields)
        case "function_call_output":
            fields = {"call_id": _string(item, "call_id", where, least=1)}
            output = item.get("output")
            if not isinstance(output, str):
                output = _read_parts(output, f"{where}.output", "input_text")
            return _item(item, "fc", "function_call_output", fields | {"output": output})
        case "reasoning":
            thoughts: Item = {
                "summary": _read_thoughts(item, "summary", where) or [],
                "content": _read_thoughts(item, "content", where),
                "encrypted_content": None,
            }
            return _item(item, "rs", "reasoning", thoughts)
        case "item_reference":
            identifier = _string(item, "id", where)
            found = find(identifier)
            if found is None:
                raise _refusal(
                    f"{where}.id",
                    f"is {shorten(identifier)}, which is no item that is kept here; send the item",
                )
            return found
    raise _refusal(
        f"{where}.type", f"is {shorten(kind)}; this server reads items of the types {', '.join(_TYPES)}"
    )


def _item(given: Item, prefix: str, kind: str, fields: Item) -> Item:
    identifier, status = given.get("id"), given.get("status")
    return {
        "id": identifier if isinstance(identifier, str) and identifier else new_id(f"{prefix}_"),
        "type": kind,
        "status": status if status in ("in_progress", "completed", "incomplete") else "completed",
        **fields,
    }


def _read_message(item: Item, where: str) -> Item:
    role, content = item.get("role"), item.get("content")
    if role not in _ROLES:
        raise _refusal(f"{where}.role", f"is {shorten(role)}; it must be one of {', '.join(_ROLES)}")
    kind = "output_text" if role == "assistant" else "input_text"
    if isinstance(content, str):
        content = [_text_part(kind, content)]
    else:
        content = _read_parts(content, f"{where}.content", kind)
    return _item(item, "msg", "message", {"role": role, "content": content})


def _text_part(kind: str, text: str) -> Item:
    part: Item = {"type": kind, "text": text}
    return part | {"annotations": [], "logprobs": []} if kind == "output_text" else part


def _read_parts(parts: Any, where: str, kind: str) -> list[Item]:
    """Text parts, all of the type `kind`, but for an assistant's refusals."""
    if not isinstance(parts, list):
        raise _refusal(where, f"is {shorten(parts)}; it must be a text or a list of parts")
    read: list[Item] = []
    for index, part in enumerate(parts):
        place = f"{where}[{index}]"
        given = part.get("type") if isinstance(part, dict) else None
        field = _TEXT_FIELDS.get(given) if isinstance(given, str) else None
        if field is None:
            what = shorten(part) if given is None else f"of the type {shorten(given)}"
            raise _refusal(place, f"is {what}; this model reads text: send parts of the type 'input_text'")
        text = _string(part, field, place)
        refused = given == "refusal" and kind == "output_text"
        read.append({"type": "refusal", "refusal": text} if refused else _text_part(kind, text))
    return read


def _read_thoughts(item: Item, field: str, where: str) -> list[Item] | None:
    parts, kind = item.get(field), "summary_text" if field == "summary" else "reasoning_text"
    if parts is None:
        return None
    if not isinstance(parts, list):
        raise _refusal(f"{where}.{field}", f"is {shorten(parts)}; it must be a list of parts")
    read = []
    for index, part in enumerate(parts):
        place = f"{where}.{field}[{index}]"
        if not isinstance(part, dict):
            raise _refusal(place, f"is {shorten(part)}; a part is an object")
        read.append({"type": kind, "text": _string(part, "text", place)})
    return read


def _string(item: Item, field: str, where: str, least: int = 0) -> str:
    value = item.get(field)
    if not isinstance(value, str) or len(value) < least:
        what = "is missing" if value is None else f"is {shorten(value)}; it must be a string"
        raise _refusal(f"{where}.{field}", what)
    return value


def _refusal(param: str, what: str) -> RequestError:
    return RequestError(f"{param} {what}", param=param)


def to_messages(items: Sequence[Item], instructions: str | None = None) -> list[dict[str, Any]]:
    """Items as messages of a chat.

    What an assistant thinks, says and calls in a row is one message, and so are the instructions with the messages of
    the system that begin the items: few templates know two.

    Raises RequestError for the output of a call that is not there.
    """
    messages: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the functions called, by the call's id
    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                _turn(messages, "content")["content"] = _joined(item["content"])
            case "message":
                messages.append({"role": item["role"], "content": _joined(item["content"])})
            case "reasoning":
                thought = _joined(item.get("content") or item.get("summary") or [])
                if thought:
                    _turn(messages, "reasoning_content", "content")["reasoning_content"] = thought
            case "function_call":
                names[item["call_id"]] = item["name"]
                call = {
                    "id": item["call_id"],
                    "type": "function",
                    "function": {"name": item["name"], "arguments": item["arguments"]},
                }
                _turn(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                call_id, output = item["call_id"], item["output"]
                if call_id not in names:
                    raise RequestError(
                        f"no function_call stands before the function_call_output with call_id {shorten(call_id)}; "
                        "send both",
                        param="input",
                    )
                content = output if isinstance(output, str) else _joined(output)
                messages.append(
                    {"role": "tool", "tool_call_id": call_id, "name": names[call_id], "content": content}
                )
    return _instruct(messages, instructions)


def _turn(messages: list[dict[str, Any]], *fields: str) -> dict[str, Any]:
    """The last message if it is the assistant's, without calls and without any of `fields`; else a new one.

    With no fields named it may have calls.
    """
    last = messages[-1] if messages else {"role": ""}
    taken = {"tool_calls", *fields} if fields else set()
    if last["role"] != "assistant" or any(last.get(name) for name in taken):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _joined(parts: Sequence[Item]) -> str:
    """The text of parts, joined by line ends as those of chat messages are."""
    return "\n".join(str(part["refusal"] if part["type"] == "refusal" else part["text"]) for part in parts)


def _instruct(messages: list[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    if instructions:
        messages = [{"role": "system", "content": instructions}, *messages]
    of_system = (place for place, each in enumerate(messages) if each["role"] not in ("system", "developer"))
    num_first = next(of_system, len(messages))
    if num_first < 2:
        return messages
    first = "\n\n".join(each["content"] for each in messages[:num_first])
    return [{"role": messages[0]["role"], "content": first}, *messages[num_first:]]

"""Conversations as chat templates take them, from the two ways in which data sets write them."""

from __future__ import annotations

from typing import Any

from sleb.errors import ConfigError

# ShareGPT's names beside those of chat templates.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}


def as_messages(value: list[Any], where: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, from those or from ShareGPT's with `from` and `value`.

    What else a message has (`tool_calls`, `name`) is kept, without what is null. Raises ConfigError.
    """
    if not value:
        raise ConfigError(f"calibration {where} is a conversation without messages: remove that row")
    return [_as_message(message, f"{where}, message {number}") for number, message in enumerate(value, 1)]


def _as_message(message: Any, where: str) -> dict[str, Any]:
    fields = {name: each for name, each in message.items() if each is not None} if _is_dict(message) else {}
    names = ("from", "value") if "from" in fields else ("role", "content")
    role, content = (fields.get(name) for name in names)
    if role is None:
        raise ConfigError(
            f"calibration {where} is no message: it needs role and content, or from and value as ShareGPT has them"
        )
    if not isinstance(role, str) or role not in ROLES:
        raise ConfigError(f"calibration {where} has the role {role!r}; it must be one of {', '.join(ROLES)}")
    if content is None and "tool_calls" in fields:
        content = ""
    if not isinstance(content, str):
        raise ConfigError(
            f"calibration {where} has a {names[1]} that is {type(content).__name__}, not text: remove that row"
        )
    others = {name: each for name, each in fields.items() if name not in names}
    return {"role": ROLES[role], "content": content, **others}


def _is_dict(message: Any) -> bool:
    return isinstance(message, dict)

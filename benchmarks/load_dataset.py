"""Prompts from a file: a conversation or a text a line, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sleb.benchmarks.load_prompts import Prompt, is_unicode
from sleb.errors import ConfigError

MAX_ROWS = 100_000
MAX_LINE = 1 << 20  # characters
# ShareGPT's names of who speaks, and the API's.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_KNOWN_ROLES = ("system", "user", "assistant")
_SHAPES = (
    'each line is to be {"prompt": "…"}, {"messages": [{"role": "user", "content": "…"}, …]} or '
    '{"conversations": [{"from": "human", "value": "…"}, …]}'
)

Messages = list[dict[str, str]]


class DatasetPrompts:
    """The rows of a file in their order, again and again, each asked for the same number of tokens.

    A conversation is sent up to the last message that is not the assistant's.
    """

    def __init__(self, path: Path, endpoint: str, output_tokens: int) -> None:
        self._output_tokens = output_tokens
        self._rows: list[str | Messages] = []
        for number, content in _read_rows(path):
            if endpoint == "completions" and not isinstance(content, str):
                raise ConfigError(
                    f"{path}, line {number}: a conversation cannot be sent to completions; use --endpoint chat"
                )
            self._rows.append(content)
        if not self._rows:
            raise ConfigError(f"{path} has no rows; {_SHAPES}")

    def __len__(self) -> int:
        return len(self._rows)

    def make(self, number: int) -> Prompt:
        """The prompt of the request with this number, from 0."""
        return Prompt(self._rows[number % len(self._rows)], 0, self._output_tokens)


def _read_rows(path: Path) -> Iterator[tuple[int, str | Messages]]:
    """Line numbers and contents. Raises ConfigError with the number of a line that is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            num_rows = 0
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), 1):
                where = f"{path}, line {number}"
                if len(line) > MAX_LINE:
                    raise ConfigError(f"{where}: longer than {MAX_LINE:,} characters; leave it out")
                if not line.strip():
                    continue
                num_rows += 1
                if num_rows > MAX_ROWS:
                    raise ConfigError(
                        f"{path} has more than {MAX_ROWS:,} rows; take a part of it, as by head"
                    )
                yield number, _read_row(line, where)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a file of JSON lines") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8; name a file of JSON lines") from None


def _read_row(line: str, where: str) -> str | Messages:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        if line.lstrip().startswith("["):
            raise ConfigError(
                f"{where}: begins a list; write its rows a line each, as `jq -c '.[]'` does"
            ) from None
        raise ConfigError(f"{where}: is not JSON; {_SHAPES}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is no JSON object; {_SHAPES}")
    if "prompt" in row:
        return _text(row["prompt"], "prompt", where)
    if "messages" in row:
        return _read_messages(row["messages"], "role", "content", where)
    if "conversations" in row:
        return _read_messages(row["conversations"], "from", "value", where)
    raise ConfigError(f"{where}: has neither prompt, messages nor conversations; {_SHAPES}")


def _read_messages(entries: Any, role_key: str, text_key: str, where: str) -> Messages:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigError(f"{where}: its messages are no list; {_SHAPES}")
    messages = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: a message is no JSON object; {_SHAPES}")
        role = _ROLES.get(str(entry.get(role_key)), entry.get(role_key))
        if role not in _KNOWN_ROLES:
            raise ConfigError(
                f"{where}: {role_key} is {json.dumps(role)[:40]}; known are {', '.join((*_KNOWN_ROLES, *_ROLES))}"
            )
        messages.append({"role": str(role), "content": _text(entry.get(text_key), text_key, where)})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise ConfigError(f"{where}: nobody asks anything in it; a conversation needs a message of the user")
    return messages


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {name} must be a text, and not empty")
    if not is_unicode(value):  # JSON can write it, but no request can hold it
        raise ConfigError(
            f"{where}: {name} holds half of a pair like \\ud83d\\ude00; mend it or leave the line out"
        )
    return value

"""A line of the input to what is asked: where, with which body; or to why it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from sleb.batch.options import ENDPOINTS, BatchOptions
from sleb.batch.sources import Block, Source, read_block
from sleb.errors import RequestError
from sleb.server.errors import shorten
from sleb.server.json_input import load_json

_MAX_ID = 512  # characters of a custom_id
_MAX_VALUES = 2**22  # in a line; the server has its own bound
_SCORING = {"max_tokens": 0, "echo": True}
# Fields that an engine's prompt may begin with, before the one that ENDPOINTS names.
_BEFORE = ("tools", "functions", "instructions", "system")


class LineError(Exception):
    """Why a line is not asked: OpenAI's code, and a message that says what is allowed."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Ask:
    """One line: what is asked, or an error.

    number: of the line or row, from 1. model: its name for the tier, None for the default one. prefix: of two asks
    those that begin alike stand together when they are sorted by it.
    """

    number: int
    custom_id: str | None
    url: str = ""
    body: bytes = b""
    model: str | None = None
    prefix: bytes = b""
    error: LineError | None = None


class LineReader:
    """Reads lines as the options say: OpenAI's batch lines, bodies, or values of a column."""

    def __init__(self, options: BatchOptions) -> None:
        self._options = options
        self._read: Callable[[Any, int], tuple[str, str, dict[str, Any]]] = self._of_body
        if options.column is not None:
            self._read = self._of_value
        elif options.lines_are_batch_lines:
            self._read = _of_batch_line

    def read(self, number: int, line: bytes) -> Ask:
        """`line` as what is asked."""
        found: Any = None
        try:
            found = self._load(line)
            custom_id, url, body = self._read(found, number)
            return self._ask(number, custom_id, url, body)
        except LineError as error:
            return Ask(number, _id_of(found, number, self._options), error=error)

    def _load(self, line: bytes) -> Any:
        limit = self._options.max_line_bytes
        if len(line) > limit:
            raise LineError(
                "line_too_long", f"the line has more than {limit} bytes; shorten it, or raise --max-line-mb"
            )
        try:
            return load_json(line, _MAX_VALUES)
        except RequestError as error:
            raise LineError(error.code or "invalid_json_line", str(error)) from None
        except ValueError as error:
            raise LineError("invalid_json_line", f"the line is not valid JSON: {str(error)[:200]}") from None

    def _of_body(self, found: Any, number: int) -> tuple[str, str, dict[str, Any]]:
        if not isinstance(found, dict):
            raise LineError("invalid_json_line", "the line is no JSON object; it must be a request's body")
        if {"custom_id", "body", "url"} <= found.keys():
            raise LineError(
                "invalid_request",
                "the line is one of OpenAI's batches, which names its url itself; leave --endpoint and --score out",
            )
        return f"line-{number}", self._options.path, found

    def _of_value(self, found: Any, number: int) -> tuple[str, str, dict[str, Any]]:
        url = self._options.path
        if not isinstance(found, str | list) or not found:
            raise LineError(
                "invalid_request", f"the value is {shorten(found)}; it must be a text or a conversation"
            )
        if isinstance(found, str) and ENDPOINTS[url] == "messages":
            found = [{"role": "user", "content": found}]
        return f"row-{number}", url, {ENDPOINTS[url]: found}

    def _ask(self, number: int, custom_id: str, url: str, body: dict[str, Any]) -> Ask:
        body = self._options.fields | body
        if self._options.score:
            body = {"logprobs": 0} | body | _SCORING
        if body.get("stream"):
            raise LineError("unsupported", "a batch has no streams; leave 'stream' out of the body")
        model = body.get("model")
        begins = [body.get(name) for name in (*_BEFORE, ENDPOINTS[url])]
        return Ask(
            number,
            custom_id,
            url,
            orjson.dumps(body),
            model if isinstance(model, str) else None,
            orjson.dumps(begins),
        )


def _of_batch_line(found: Any, number: int) -> tuple[str, str, dict[str, Any]]:
    if not isinstance(found, dict) or not {"custom_id", "url", "body"} <= found.keys():
        raise LineError(
            "invalid_request",
            'the line is no batch line, {"custom_id": …, "method": "POST", "url": …, "body": {…}}; name an '
            "--endpoint for lines that are bodies",
        )
    custom_id, url, body = found["custom_id"], found["url"], found["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        raise LineError(
            "invalid_request",
            f"custom_id is {shorten(custom_id)}; it must be a text of 1 to {_MAX_ID} characters",
        )
    if found.get("method", "POST") != "POST":
        raise LineError("invalid_method", f"method is {shorten(found['method'])}; it must be POST")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise LineError("invalid_url", f"url is {shorten(url)}; choose one of: {', '.join(ENDPOINTS)}")
    if not isinstance(body, dict):
        raise LineError("invalid_request", f"body is {shorten(body)}; it must be an object")
    return custom_id, url, body


def _id_of(found: Any, number: int, options: BatchOptions) -> str | None:
    """The id of a line that cannot be asked, as far as it has one."""
    if not options.lines_are_batch_lines:
        return f"{'line' if options.column is None else 'row'}-{number}"
    custom_id = found.get("custom_id") if isinstance(found, dict) else None
    return custom_id if isinstance(custom_id, str) and 0 < len(custom_id) <= _MAX_ID else None


def read_asks(source: Source, reader: LineReader, block: Block) -> list[Ask]:
    """What the lines of a block ask. Raises ConfigError if they are not those any more."""
    return [reader.read(row.number, row.text) for row in read_block(source, block)]

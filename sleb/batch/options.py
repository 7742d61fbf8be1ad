"""Options of `sleb batch` beside its engine's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from sleb.errors import ConfigError
from sleb.fields import shown_text
from sleb.options import check_values, option, option_of
from sleb.server.names import ServedName
from sleb.server.options import ServeOptions

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# The field of a body that its prompt begins with, by endpoint.
ENDPOINTS = {CHAT: "messages", COMPLETIONS: "prompt", "/v1/responses": "input", "/v1/messages": "messages"}
_INPUT, _OUTPUT, _NAMES = "Input", "Output", "What is told of the model"


@dataclass(frozen=True)
class BatchOptions:
    """What a batch is told beside its engine's options."""

    endpoint: str | None = option(
        None,
        "Where the lines of IN go, which are then bodies.",
        choices=tuple(ENDPOINTS),
        unset=f"lines of OpenAI's batches, which say it themselves; of a column {CHAT}",
        metavar="PATH",
        group=_INPUT,
    )
    column: str | None = option(
        None,
        "Column of a Parquet file: texts (what a user says, or a prompt) or conversations.",
        unset="IN has JSON lines",
        metavar="NAME",
        group=_INPUT,
    )
    body: str | None = option(
        None,
        "JSON object: fields of every body that does not have them, such as '{\"max_tokens\": 64}'.",
        unset="none",
        metavar="JSON",
        group=_INPUT,
    )
    score: bool = option(
        False,
        f"Tell the log-probability of each token of the prompts, and generate nothing; of {COMPLETIONS}.",
        group=_INPUT,
    )
    max_line_mb: float = option(
        16.0, "MiB of a line; a longer one gets an error.", minimum=0.001, maximum=1024, group=_INPUT
    )
    block_size: int = option(
        256,
        "Lines answered into one file. Two such blocks are under way at once: an interruption costs them.",
        minimum=1,
        maximum=10**6,
        group=_OUTPUT,
    )
    workers: int | None = option(
        None,
        "Engines that share the work, by Ray Data: on this machine, or on the cluster that RAY_ADDRESS names.",
        unset="one, without Ray",
        minimum=1,
        maximum=10**4,
        group=_OUTPUT,
    )
    served_model_names: tuple[str, ...] = option_of(ServeOptions, "served_model_names", group=_NAMES)
    tool_format: str = option_of(ServeOptions, "tool_format", group=_NAMES)

    def check(self) -> None:
        """Raises ConfigError for the first option with a value that is not allowed."""
        check_values(self)
        if self.score and self.endpoint not in (None, COMPLETIONS):
            raise ConfigError(f"score is of {COMPLETIONS}; leave --endpoint out, or name that one")
        _ = self.names, self.fields

    @property
    def lines_are_batch_lines(self) -> bool:
        """Whether each says its own id and endpoint."""
        return self.endpoint is None and self.column is None and not self.score

    @property
    def path(self) -> str:
        """The endpoint of lines that do not say it."""
        return self.endpoint or (COMPLETIONS if self.score else CHAT)

    @property
    def max_line_bytes(self) -> int:
        return int(self.max_line_mb * 2**20)

    @cached_property
    def names(self) -> tuple[ServedName, ...]:
        """The content of served_model_names. Raises ConfigError."""
        return tuple(map(ServedName.parse, self.served_model_names))

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The content of body. Raises ConfigError."""
        try:
            fields = orjson.loads(self.body or "{}")
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ConfigError(
                f"--body is {shown_text((self.body or '')[:80])!r}; it must be a JSON object, such as "
                "'{\"max_tokens\": 64}'"
            )
        return fields

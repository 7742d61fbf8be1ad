"""What a server tells: log lines for people or as JSON, and the introduction when it starts.

Nothing of it may hurt the server: a line that cannot be written, since the disk is full or the reader has gone, is
dropped.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from sleb.server.context import ServerContext

logger = logging.getLogger("sleb.server")

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_NOISY = ("uvicorn.error", "httpx", "transformers")


class SafeHandler(logging.StreamHandler[Any]):
    """Writes to standard error, whatever that is at the time, and drops what cannot be written."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says nothing: where it would be said is what has failed."""

    def flush(self) -> None:
        try:
            super().flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            pass


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, message, the record's `facts`, and a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        content: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        content |= getattr(record, "facts", {})
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str).decode()


def configure(log_format: str, level: str) -> None:
    """Sends all log lines of this process from `level` on to standard error; `log_format` is one of FORMATS."""
    handler = SafeHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class _QuietConsole(Console):
    """A console that falls silent where rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Teller:
    """Tells people on standard error how the start goes; where lines are JSON, as log lines."""

    def __init__(self, log_format: str) -> None:
        self._console = _QuietConsole(stderr=True, highlight=False) if log_format == "text" else None

    def say(self, message: str, **facts: Any) -> None:
        if self._console is None:
            logger.info("%s", message, extra={"facts": facts})
        else:
            self._print(message)

    def introduce(self, context: ServerContext, url: str, can_chat: bool) -> None:
        """What is served, where, and how to try it."""
        engine = context.engine.engine
        if self._console is None:
            tiers = [tier.id for tier in engine.tiers]
            self.say(f"Serving at {url}/v1", url=url, models=tiers, max_model_len=engine.max_model_len)
            return
        self._print(self._table(context))
        self._print(
            f"Serving at {url}/v1 (context {engine.max_model_len} tokens). Ctrl-C drains and stops. Try it:\n"
        )
        needs_key = bool(context.options.keys)
        self._print(curl_line(url, engine.default_tier.id, can_chat, needs_key) + "\n")

    @staticmethod
    def _table(context: ServerContext) -> Table:
        engine = context.engine.engine
        table = Table()
        table.add_column("model")
        table.add_column("blocks", justify="right")
        table.add_column("removed")
        table.add_column("weights", justify="right")
        for tier in engine.tiers:
            name = tier.id + (" (default)" if tier == engine.default_tier else "")
            removed = ", ".join(map(str, tier.removed)) or "none"
            kept = f"{tier.num_blocks_kept} of {engine.layer_map.num_blocks}"
            table.add_row(name, kept, removed, f"{engine.weight_bytes(tier.depth) / 2**20:.0f} MiB")
        return table

    def _print(self, content: str | Table) -> None:
        assert self._console is not None
        try:
            self._console.print(content, markup=False, soft_wrap=isinstance(content, str))
        except (OSError, ValueError):
            pass


def curl_line(url: str, model: str, can_chat: bool, needs_key: bool) -> str:
    """A command that works as it stands; a key is taken from the shell's SLEB_API_KEY, not shown."""
    path, prompt = "completions", '"prompt": "The sea is"'
    if can_chat:
        path, prompt = (
            "chat/completions",
            '"messages": [{"role": "user", "content": "What is the capital of France?"}]',
        )
    body = f'{{"model": {json.dumps(model)}, {prompt}, "max_tokens": 64, "temperature": 0}}'
    key = ' -H "Authorization: Bearer $SLEB_API_KEY"' if needs_key else ""
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'"

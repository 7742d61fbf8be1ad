"""What a server tells: log lines for people or as JSON, and the introduction when it starts.

Nothing of it may hurt the server: a line that cannot be written, since the disk is full, the reader has gone or reads
nothing, is dropped.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import select
import shlex
import sys
import threading
from collections import deque
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO, cast

import orjson
from rich.table import Table

from sleb.terminal import CONTROLS, Console, LineFormatter

if TYPE_CHECKING:
    from sleb.server.context import ServerContext
    from sleb.server.names import AutoModel

logger = logging.getLogger("sleb.server")

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_MAX_WAITING = 1 << 20  # characters that wait to be written
_SECONDS_TO_WRITE = 0.5  # at the end
_NOISY = ("uvicorn.error", "httpx", "transformers")


class SafeHandler(logging.StreamHandler[Any]):
    """Writes to standard error, as that is now, and drops a record that cannot be formatted or written."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says nothing: where it would be said is what has failed."""


class UnblockedStream(io.TextIOBase):
    """Standard error for a process that must not wait for whoever reads it, nor end when nobody does.

    A thread writes. What comes while _MAX_WAITING characters wait for it (a full pipe, a stopped terminal), or what the
    system refuses (a full disk, a closed pipe), is dropped; the next line that gets through says how much.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._descriptor = stream, stream.fileno()
        self._pieces: deque[str] = deque()
        self._changed = threading.Condition()
        self._num_waiting = self._num_dropped = 0
        threading.Thread(target=self._write_pieces, name="sleb-stderr", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return self._stream.isatty()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._changed:
            has_room = not self.closed and self._num_waiting + len(text) <= _MAX_WAITING
            num_dropped, self._num_dropped = self._num_dropped, 0 if has_room else self._num_dropped + 1
        if has_room:
            if num_dropped:  # a line of the log itself, so that it has the log's format
                logger.warning("%d lines were dropped here: standard error took no more", num_dropped)
            with self._changed:
                self._pieces.append(text)
                self._num_waiting += len(text)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Nothing: whoever logs does not wait."""

    def drain(self, seconds: float = _SECONDS_TO_WRITE) -> None:
        """Waits until everything is written, or for that long."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pieces, seconds)

    def _write_pieces(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pieces)
                text = self._pieces[0]
            is_written = self._write_all(text.encode(self.encoding, "backslashreplace"))
            with self._changed:
                self._pieces.popleft()
                self._num_waiting -= len(text)
                self._num_dropped += not is_written
                self._changed.notify_all()

    def _write_all(self, data: bytes) -> bool:
        """Past Python's own buffer: a thread that hangs in it at the end would abort the interpreter."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody made the pipe non-blocking, for us too
                select.select([], [self._descriptor], [], 1)
            except OSError:
                return False
        return True


def unblock_stderr() -> None:
    """Makes sys.stderr an UnblockedStream, which it then stays; does nothing where it is no file of the system."""
    if (
        sys.stderr is None
    ):  # closed by who started us: else the next file opened would be where errors are written
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stderr, UnblockedStream):
        return
    with suppress(OSError, ValueError):
        stream = UnblockedStream(sys.stderr)
        sys.stderr = cast("TextIO", stream)
        atexit.register(stream.drain)


def drain_stderr() -> None:
    """Before the process ends without Python's own way out: what has been said is written, if that is quick."""
    if isinstance(sys.stderr, UnblockedStream):
        sys.stderr.drain()


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
        try:
            line = orjson.dumps(content, default=str).decode()
        except TypeError:  # a lone surrogate, as a path may hold, or an integer beyond 64 bits
            line = json.dumps(content, default=str)
        # JSON itself escapes the controls below U+0020 alone
        return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", line)


def configure(log_format: str, level: str) -> None:
    """Sends all log lines of this process from `level` on to standard error; `log_format` is one of FORMATS."""
    unblock_stderr()
    handler = SafeHandler()
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))


class Teller:
    """Tells people on standard error how the start goes; where lines are JSON, as log lines."""

    def __init__(self, log_format: str) -> None:
        self._console = Console(stderr=True, highlight=False) if log_format == "text" else None

    def say(self, message: str, **facts: Any) -> None:
        if self._console is None:
            logger.info("%s", message, extra={"facts": facts})
        else:
            self._print(message)

    def introduce(self, context: ServerContext, url: str, can_chat: bool) -> None:
        """What is served, where, and how to try it."""
        served = context.engine.model
        if self._console is None:
            tiers = [tier.id for tier in served.tiers]
            self.say(f"Serving at {api_url(url)}", url=url, models=tiers, max_model_len=served.max_model_len)
            return
        self._print(self._table(context))
        others = [f"{name} ({tier.id})" for name, tier in context.names.items() if name != tier.id]
        if others:
            self._print(f"Other names: {', '.join(others)}")
        if context.auto is not None:
            self._print(describe_auto(context.auto))
        needs_key = bool(context.options.keys)
        key = ", with a key in SLEB_API_KEY" if needs_key else ""
        self._print(
            f"Serving at {api_url(url)} (context {served.max_model_len} tokens). Ctrl-C drains and stops. "
            f"Try it{key}:\n"
        )
        self._print(curl_line(url, served.default_tier.id, can_chat, needs_key) + "\n")

    @staticmethod
    def _table(context: ServerContext) -> Table:
        served = context.engine.model
        table = Table()
        table.add_column("model")
        table.add_column("blocks", justify="right")
        table.add_column("removed")
        table.add_column("weights", justify="right")
        for tier in served.tiers:
            name = tier.id + (" (default)" if tier == served.default_tier else "")
            removed = ", ".join(map(str, tier.removed)) or "none"
            kept = f"{tier.num_blocks_kept} of {served.layer_map.num_blocks}"
            table.add_row(name, kept, removed, f"{served.weight_bytes(tier.depth) / 2**20:.0f} MiB")
        return table

    def _print(self, content: str | Table) -> None:
        assert self._console is not None
        self._console.print(content, markup=False, soft_wrap=isinstance(content, str))


def describe_auto(auto: AutoModel) -> str:
    """What a model whose depth the server chooses may be."""
    past = [str(depth) for depth in auto.policy.depths if depth not in auto.depths]
    bound = f"of which more than {auto.policy.max_perplexity:.0%} of perplexity is lost, or is not known"
    if len(auto.depths) == 1:
        only = f"{auto.name} is always depth {auto.depths[0]}"
        return f"{only}: no other of its policy is allowed ({', '.join(past)}, {bound})"
    left_out = f", and not {', '.join(past)}, {bound}" if past else ""
    return f"{auto.name} takes of depths {', '.join(map(str, auto.depths))} while requests wait{left_out}"


def api_url(url: str) -> str:
    """What clients are told; a Unix socket as nginx writes it."""
    return f"http://{url}:/v1" if url.startswith("unix:") else f"{url}/v1"


def curl_line(url: str, model: str, can_chat: bool, needs_key: bool) -> str:
    """A command that works as it stands; a key is taken from the shell's SLEB_API_KEY, not shown."""
    path, prompt = "completions", '"prompt": "The sea is"'
    if can_chat:
        path, prompt = (
            "chat/completions",
            '"messages": [{"role": "user", "content": "What is the capital of Japan?"}]',
        )
    body = f'{{"model": {json.dumps(model)}, {prompt}, "max_tokens": 64, "temperature": 0}}'
    key = ' -H "Authorization: Bearer $SLEB_API_KEY"' if needs_key else ""
    if url.startswith("unix:"):
        url = f"--unix-socket {shlex.quote(url.removeprefix('unix:'))} http://localhost"
    return f"curl {url}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'"

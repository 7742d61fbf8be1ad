"""Where text leaves for a terminal: what a file, a model or a client wrote cannot command it.

A model's name in a layer map may hold the escape sequences that retitle a window, move the cursor or overwrite lines.
Everything that people see passes here (tables, bars, errors, log lines), so no caller has to think of it. What is a
result on standard output, as a folder's path or JSON, stays as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from contextlib import suppress

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but tab and line feed, DEL, C1 (U+009B begins a sequence as ESC [ does), and what UTF-8 cannot carry.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def escaped(text: str) -> str:
    """`text` with control characters as Python's escapes; tabs and line ends pass."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


class Console(rich_console.Console):  # noqa: TID251
    """rich's console, with control characters escaped; on standard error it never ends the process."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))

    def on_broken_pipe(self) -> None:
        """The reader of a message has gone: silence. The reader of a result: the end, as rich has it."""
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True


def tell(text: object, style: str | None = None) -> None:
    """A line for people on standard error; where it cannot be written, nothing."""
    with suppress(OSError, ValueError):  # ValueError: the stream is closed
        Console(stderr=True).print(str(text), style=style, markup=False, highlight=False, soft_wrap=True)


class LineFormatter(logging.Formatter):
    """A record for people. A message of several lines goes on indented: none of it can look like another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return _indented(super().formatMessage(record))

    def formatException(self, ei: object) -> str:  # noqa: N802
        return _indented(super().formatException(ei))  # type: ignore[arg-type]


def _indented(text: str) -> str:
    return escaped(text).replace("\n", "\n    ")

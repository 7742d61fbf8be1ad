"""Reading and writing of `sleb chat`: a terminal with history, or pipes."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from types import ModuleType

from sleb.files import make_folder
from sleb.terminal import Console

try:
    import readline as _readline

    readline: ModuleType | None = _readline
except ImportError:  # a Python built without it
    readline = None

_MAX_HISTORY = 1000  # lines
_QUOTES = '"""'


class ChatConsole:
    """Where questions come from and answers go.

    On a terminal: a prompt, editing and history, reasoning dim. Otherwise plain: answers and what commands print
    on standard output, reasoning and errors on standard error, no prompt.
    """

    def __init__(self, history: Path | None = None) -> None:
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._out = Console(highlight=False, soft_wrap=True)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._history = history if self.is_terminal and readline is not None else None
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")

    def __enter__(self) -> ChatConsole:
        if self._history is not None and readline is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(self._history)
            readline.set_history_length(_MAX_HISTORY)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._history is not None and readline is not None:
            with contextlib.suppress(OSError):
                make_folder(self._history.parent)
                os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))  # what one asks is private
                readline.write_history_file(self._history)

    def read(self) -> str | None:
        """The next message or command, its lines joined; None at the end of the input.

        Lines go on after a trailing backslash, and between triple quotes.
        """
        line = self._read_line("> ")
        if line is None:
            return None
        if line.lstrip().startswith(_QUOTES):
            return self._read_quoted(line.lstrip()[len(_QUOTES) :])
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._read_line("… ")
            if following is None:
                break
            lines.append(following)
        return _clean("\n".join(lines))

    def _read_quoted(self, line: str | None) -> str:
        lines: list[str] = []
        while line is not None and not line.rstrip().endswith(_QUOTES):
            lines.append(line)
            line = self._read_line("… ")
        if line is not None:
            lines.append(line.rstrip()[: -len(_QUOTES)])
        return _clean("\n".join(lines))

    def _read_line(self, prompt: str) -> str | None:
        if self.is_terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
        line = sys.stdin.readline()
        return line.rstrip("\n").rstrip("\r") if line else None

    def write_content(self, text: str) -> None:
        """A piece of an answer."""
        if self._out.is_terminal:
            self._out.out(text, end="", highlight=False)
        else:
            sys.stdout.write(text)
        sys.stdout.flush()

    def write_reasoning(self, text: str) -> None:
        """A piece of the thoughts before an answer."""
        if self.is_terminal:
            self._out.out(text, style="dim", end="", highlight=False)
        else:
            self._err.out(text, style="dim", end="", highlight=False)

    def note(self, text: str) -> None:
        """A line about the chat, dim; for a person only."""
        if self.is_terminal:
            self._out.out(text, style="dim", highlight=False)

    def say(self, text: str) -> None:
        """Lines that a command asked for."""
        self._out.out(text, highlight=False)

    def complain(self, error: Exception) -> None:
        """An error as a line."""
        self._err.out(f"error: {' '.join(str(error).split())}", style="red", highlight=False)


def _clean(text: str) -> str:
    """Without the lone surrogates that undecodable input leaves: JSON cannot carry them."""
    return text.encode("utf-8", "replace").decode("utf-8")

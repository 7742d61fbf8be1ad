"""How far a job is, and how it ends before its end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from sleb.errors import SlebError

NUM_UNDER_WAY = 2  # blocks of an engine, so that its own batch does not run empty
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a job


@dataclass(frozen=True)
class Progress:
    """What has been done so far. num_errors: rows that are errors, of whichever kind. num_tokens: generated ones."""

    num_lines: int
    num_errors: int
    num_tokens: int


OnProgress = Callable[[Progress], None]


class Stopped(Exception):  # noqa: N818
    """A signal ended the job; `number` is its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def first_error(errors: BaseExceptionGroup[SlebError]) -> SlebError:
    """One of those that ended the job, out of the groups of its tasks."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, SlebError)
    return error

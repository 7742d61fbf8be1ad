"""What is noted of one HTTP request on its way: why it failed, how long its phases took, what was made."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    """One HTTP request and its answer, as far as they are counted.

    Attributes:
        failure: the code of the error that answered it, or its status as text.
        phases: milliseconds by name, for the header Server-Timing.
        key: the name of the API key, if it has one.
        answer: what the log tells of a generation, by name.
    """

    failure: str | None = None
    phases: dict[str, float] = field(default_factory=dict)
    key: str | None = None
    answer: dict[str, Any] = field(default_factory=dict)


EXCHANGE: ContextVar[Exchange | None] = ContextVar("sleb_exchange", default=None)


def note_failure(code: str) -> None:
    """Remembers the error that answers the present exchange; outside of one it does nothing."""
    exchange = EXCHANGE.get()
    if exchange is not None:
        exchange.failure = code

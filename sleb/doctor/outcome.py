"""How a check ends: passed, or by one of these exceptions."""

from __future__ import annotations

from enum import StrEnum
from typing import NoReturn


class Outcome(StrEnum):
    """How a check ended. Of a check that is not required, a failure counts as "differs"."""

    PASS = "pass"
    FAIL = "fail"
    MISSING = "missing"  # the server says 404, 405 or 501
    DIFFERS = "differs"
    SKIPPED = "skipped"  # this server gives no occasion for it


class CheckFailedError(Exception):
    """The server does not do what the check expects; the message says what it did."""


class MissingFeatureError(Exception):
    """The server has no such endpoint."""


class CheckSkippedError(Exception):
    """The check has nothing to say about this server."""


def fail(reason: str) -> NoReturn:
    """Ends the check as failed."""
    raise CheckFailedError(reason)


def skip(reason: str) -> NoReturn:
    """Ends the check as skipped."""
    raise CheckSkippedError(reason)


def expect(condition: object, reason: str) -> None:
    """Ends the check as failed unless `condition` holds."""
    if not condition:
        fail(reason)

"""What a check is, and how it tells its outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from inspect import cleandoc
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sleb.doctor.target import Target


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


CheckFunction = Callable[["Target"], None]


@dataclass(frozen=True)
class Check:
    """A function that asks the server something and raises if the answer is not as its docstring says.

    Attributes:
        group: such as "streaming".
        name: the function's name, in words.
        required: whether OpenAI's clients rely on it; else only sleb promises it.
        expected: what the docstring expects, up to its "Source:".
        source: where that comes from.
    """

    group: str
    name: str
    required: bool
    expected: str
    source: str
    run: CheckFunction = field(repr=False)


class Group:
    """Collects the checks of a module in the order of their definition."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.checks: list[Check] = []

    def required(self, function: CheckFunction) -> CheckFunction:
        """Decorator: OpenAI's clients rely on this."""
        return self._add(function, required=True)

    def sleb_only(self, function: CheckFunction) -> CheckFunction:
        """Decorator: part of sleb's contract, and often of vLLM's or llama.cpp's, but not of OpenAI's description."""
        return self._add(function, required=False)

    def _add(self, function: CheckFunction, *, required: bool) -> CheckFunction:
        expected, mark, source = " ".join(cleandoc(function.__doc__ or "").split()).partition(" Source: ")
        assert mark, f"{function.__name__} does not say where it comes from"
        name = function.__name__.replace("_", " ")
        self.checks.append(Check(self.name, name, required, expected, source.rstrip("."), function))
        return function

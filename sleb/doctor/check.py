"""What a check is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import cleandoc

from sleb.doctor.target import Target

CheckFunction = Callable[[Target], None]


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

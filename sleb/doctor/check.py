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
        required: whether the clients of that format rely on it; else only sleb promises it.
        further: whether it is of a further wire format, which a server may lack.
        expected: what the docstring expects, up to its "Source:".
        source: where that comes from.
    """

    group: str
    name: str
    required: bool
    further: bool
    expected: str
    source: str
    run: CheckFunction = field(repr=False)


class Group:
    """Collects the checks of a module in the order of their definition.

    further: whether they are of a wire format beside OpenAI's chat and completions.
    """

    def __init__(self, name: str, *, further: bool = False) -> None:
        self.name = name
        self.further = further
        self.checks: list[Check] = []

    def required(self, function: CheckFunction) -> CheckFunction:
        """Decorator: clients rely on this."""
        return self._add(function, required=True)

    def sleb_only(self, function: CheckFunction) -> CheckFunction:
        """Decorator: of sleb's contract, and often of vLLM's or llama.cpp's, but not of what defines the format."""
        return self._add(function, required=False)

    def _add(self, function: CheckFunction, *, required: bool) -> CheckFunction:
        expected, mark, source = " ".join(cleandoc(function.__doc__ or "").split()).partition(" Source: ")
        assert mark, f"{function.__name__} does not say where it comes from"
        name = function.__name__.replace("_", " ")
        check = Check(self.name, name, required, self.further, expected, source.rstrip("."), function)
        self.checks.append(check)
        return function

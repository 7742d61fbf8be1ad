"""What a grammar is before it is compiled: named parts, values that can be compared and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["json", "arguments", "regex", "lark", "any"]


@dataclass(frozen=True)
class Part:
    """A named grammar: a JSON schema as text, a regular expression, a grammar in llguidance's dialect of Lark, or in
    any notation that is known (GBNF too).

    "arguments" of a call are a JSON schema too; a model may write them with the spaces that it was shown.
    """

    name: str
    kind: Kind
    text: str


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer must be: the first part, which may refer to the others as `@name`.

    Attributes:
        param: the field of the request that asked for it, for errors.
        beside: another field that asked for some of the parts.
    """

    parts: tuple[Part, ...]
    param: str
    beside: str | None = None

    @property
    def fields(self) -> str:
        """Where a part that cannot be used may be from."""
        return self.param if self.beside is None else f"{self.beside} or {self.param}"

    def after(self, rules: str) -> GrammarSpec:
        """The same after what the rule `before` of `rules` matches, in Lark."""
        whole = Part("whole", "lark", f"start: before @{self.parts[0].name}\n{rules}")
        return replace(self, parts=(whole, *self.parts))

    def or_else(self, other: GrammarSpec) -> GrammarSpec:
        """Either this or `other`."""
        either = Part("either", "lark", f"start: @{self.parts[0].name} | @{other.parts[0].name}")
        return GrammarSpec((either, *self.parts, *other.parts), other.param, self.param)

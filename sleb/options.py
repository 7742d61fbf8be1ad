"""An option, written once: a field of a dataclass with its help.

The command line makes a flag, a variable and a line of a file from it (`sleb.cli.options`), Python an argument, and
`docs/` a row of the reference. The dataclass belongs to the thing that the options are of, and checks its own values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Option:
    """What the command line and the documentation say of a field.

    Attributes:
        help: one or two sentences, without the default and without the choices.
        choices: the words that are allowed; empty: any value of the field's type.
        group: the heading under which `--help` lists it.
        flags: names other than --the-field-name, "-o" or "--device" say; empty: that one.
        metavar: what stands for the value in `--help`; empty: the type's name.
    """

    help: str
    choices: tuple[str, ...] = ()
    group: str = ""
    flags: tuple[str, ...] = ()
    metavar: str = ""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    group: str = "",
    flags: Sequence[str] = (),
    metavar: str = "",
) -> Any:
    """A field of an options dataclass: `threads: int | None = option(None, "CPU threads.")`."""
    about = Option(help, tuple(choices), group, tuple(flags), metavar)
    return field(default=default, metadata={"option": about})


def options_of(kind: type) -> Mapping[str, tuple[Field[Any], Option]]:
    """The fields of an options dataclass that are options, by name, in order."""
    return {each.name: (each, each.metadata["option"]) for each in fields(kind) if "option" in each.metadata}

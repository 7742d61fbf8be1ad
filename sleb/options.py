"""An option, written once: a field of a dataclass with its help.

The command line makes a flag, a variable and a line of a file from it (`sleb.cli.options`), Python an argument, and
`docs/` a row of the reference. The dataclass belongs to the thing that the options are of, and checks its own values
in a method `check`, which begins with `check_values`.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sleb.errors import ConfigError

_Arguments = ParamSpec("_Arguments")
_Options = TypeVar("_Options")
_Self = TypeVar("_Self")
_Result = TypeVar("_Result")
_NAMES: dict[type, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
    Path: ("a path", "paths"),
}


@dataclass(frozen=True)
class Option:
    """What the command line and the documentation say of a field.

    Attributes:
        help: one or two sentences, without the default and without the choices.
        choices: the words that are allowed; empty: any value of the field's type.
        aliases: further words that are allowed, which help does not list.
        unset: what is done where the value is None or empty, as "one a physical core".
        minimum, maximum: bounds of a number, themselves allowed. above: a bound that is not.
        commas: whether a text may name several of a list with commas between. Numbers and choices always may.
        group: the heading under which `--help` lists it.
        flags: names other than --the-field-name, such as "--json"; a short one alone, "-o", comes beside it.
        metavar: what stands for the value in `--help`; empty: a letter for the type.
    """

    help: str
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    unset: str = ""
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    commas: bool = False
    group: str = ""
    flags: tuple[str, ...] = ()
    metavar: str = ""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    aliases: Sequence[str] = (),
    unset: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    commas: bool = False,
    group: str = "",
    flags: Sequence[str] = (),
    metavar: str = "",
) -> Any:
    """A field of an options dataclass: `threads: int | None = option(None, "CPU threads.", minimum=1)`.

    A list is a `Sequence` with a tuple or None as default. dataclasses.MISSING as default: it must be given.
    """
    about = Option(
        help,
        tuple(choices),
        tuple(aliases),
        unset,
        minimum,
        maximum,
        above,
        commas or bool(choices),
        group,
        tuple(flags),
        metavar,
    )
    return field(default=default, metadata={"option": about})


def option_of(kind: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """The option `name` of another dataclass, as a field of this one: `dtype: str = option_of(EngineConfig, "dtype")`.

    default and changes (fields of Option) replace what is to be otherwise here.
    """
    origin, about = options_of(kind)[name]
    return field(
        default=origin.default if default is MISSING else default,
        metadata={"option": replace(about, **changes)},
    )


def options_of(kind: type) -> Mapping[str, tuple[Field[Any], Option]]:
    """The fields of an options dataclass that are options, by name, in order."""
    return {each.name: (each, each.metadata["option"]) for each in fields(kind) if "option" in each.metadata}


@dataclass(frozen=True)
class ValueType:
    """What an option's value is: of which type, one or several, and whether the type alone tells what is allowed.

    Of several types that a field takes, `kind` is the one that a text can be made into; `is_strict` is then False.
    """

    kind: type
    is_list: bool
    is_strict: bool = True

    def describe(self, about: Option) -> str:
        """What is wanted, for an error: "an integer from 0 to 65535"."""
        bounds = {"of at least": about.minimum, "above": about.above, "at most": about.maximum}
        told = ", ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)
        if about.minimum is not None and about.maximum is not None:
            told = f"from {about.minimum:g} to {about.maximum:g}"
        text = f"{_NAMES[self.kind][self.is_list]} {told}".rstrip()
        return f"a list of {text}" if self.is_list else text


def value_types(kind: type) -> Mapping[str, ValueType]:
    """The types of all options of a dataclass, by name."""
    hints = typing.get_type_hints(kind)
    return {name: _value_type(hints[name]) for name in options_of(kind)}


def _value_type(hint: Any) -> ValueType:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    parts = [part for part in (typing.get_args(hint) if union else (hint,)) if part is not types.NoneType]
    if len(parts) == 1 and typing.get_origin(parts[0]) is not None:  # Sequence[int], tuple[str, ...]
        return replace(_value_type(typing.get_args(parts[0])[0]), is_list=True)
    for kind in (str, Path, bool, int, float):
        if kind in parts:
            return ValueType(kind, False, is_strict=len(parts) == 1)
    return ValueType(str, False, is_strict=False)


def check_values(options: Any, spell: Callable[[str], str] = str) -> None:
    """Raises ConfigError for the first value of an options dataclass of a wrong type, choice or range.

    spell: how an error writes the name of a field: the command line gives its flag.
    """
    kinds = value_types(type(options))
    for name, (_, about) in options_of(type(options)).items():
        value = getattr(options, name)
        if value is not None:
            _check(spell(name), value, kinds[name], about)


def _check(name: str, value: Any, kind: ValueType, about: Option) -> None:
    if kind.is_list:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{name} is {value!r}; it must be {kind.describe(about)}")
        for each in value:
            _check(name, each, replace(kind, is_list=False), about)
        return
    if about.choices:
        if value not in (*about.choices, *about.aliases):
            also = f" (or {', '.join(about.aliases)})" if about.aliases else ""
            raise ConfigError(
                f"{name} '{value}' is not known; choose one of: {', '.join(about.choices)}{also}"
            )
    elif kind.is_strict and not _fits(value, kind.kind, about):
        raise ConfigError(f"{name} is {value!r}; it must be {kind.describe(about)}")


def _fits(value: Any, kind: type, about: Option) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind not in (int, float):
        return True
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    if kind is int:
        try:
            operator.index(value)  # type: ignore[arg-type]  # a float has none; numpy's integers have
        except TypeError:
            return False
    number = float(value)
    return (
        number == number  # no NaN
        and (about.minimum is None or number >= about.minimum)
        and (about.maximum is None or number <= about.maximum)
        and (about.above is None or number > about.above)
    )


def takes_options(
    kind: Callable[_Arguments, _Options],
    *,
    first: str,
    renamed: Mapping[str, str] = types.MappingProxyType({}),
) -> Callable[[Callable[[_Self, _Options], _Result]], Callable[Concatenate[_Self, _Arguments], _Result]]:
    """Makes a function of `first` and options one of `first` and the arguments of the options' dataclass.

    Type checkers and `help()` see them too. renamed: former names and what is their name now. The function raises
    ConfigError for a name that is not known.
    """

    def decorate(
        function: Callable[[_Self, _Options], _Result],
    ) -> Callable[Concatenate[_Self, _Arguments], _Result]:
        signature = inspect.signature(kind)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> _Result:
            before = kwargs.pop(first) if first in kwargs and not args else args[0]
            for name in kwargs:
                if name in renamed:
                    raise ConfigError(f"option '{name}' is called '{renamed[name]}' now")
                if name not in signature.parameters:
                    known = ", ".join(signature.parameters)
                    raise ConfigError(f"option '{name}' does not exist; options: {known}")
            return function(before, kind(*args[1:], **kwargs))

        before = inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [before, *signature.parameters.values()]
        call.__signature__ = inspect.signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
        return typing.cast("Callable[Concatenate[_Self, _Arguments], _Result]", call)

    return decorate

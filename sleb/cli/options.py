"""From options dataclasses to a command.

Each option becomes a flag: --x VALUE, --x/--no-x for what is true or false, repeatable for a list. Texts become values
here and nowhere else, whether they come from the command line, the environment or a file, so that whatever is wrong
with one is told in one line, before anything slow is imported.

    @with_options
    def prune(model: Model, options: PruneOptions) -> None: ...

    typer.Typer().command(cls=OptionsCommand)(prune)
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from sleb.errors import ConfigError
from sleb.models.aliases import ALIASES
from sleb.options import Option, ValueType, check_values, options_of, value_types

_METAVARS: dict[type, str] = {int: "N", float: "X", Path: "PATH"}
_SWITCHES = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
_LONGEST_RANGE = 4096  # numbers that "0-3" may stand for


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """A command with a flag for every option of the dataclasses among its parameters.

    What else it takes stays as typer reads it. A field of a dataclass that is no option gets the value of the
    command's parameter of that name. Values are checked (`check_values`, then the dataclass's own `check`) before the
    function runs.
    """
    return make_command(function)


def make_command(
    function: Callable[..., None], extra: Mapping[str, inspect.Parameter] | None = None, settings: str = ""
) -> Callable[..., None]:
    """As `with_options`.

    extra: further parameters. settings: the one of them that is not handed on but gives values by field, which go
    behind the flags.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    kinds = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters = dict(extra or {})
    for name, parameter in inspect.signature(function).parameters.items():
        if name in kinds:
            parameters |= flags_of(kinds[name])
        else:
            changed = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            parameters[name] = changed

    def run(**given: Any) -> None:
        fallback = given.pop(settings) if settings else {}
        plain = {name: given[name] for name in hints if name in given}
        try:
            made = {name: make_options(kind, given, plain, fallback) for name, kind in kinds.items()}
            function(**plain, **made)
        except ConfigError as error:
            error.args = (_with_flags(str(error), kinds.values()),)
            raise

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    run.options = tuple(kinds.values())  # type: ignore[attr-defined]  # for the reference page
    return run


def make_options(
    kind: type, given: Mapping[str, Any], plain: Mapping[str, Any], fallback: Mapping[str, Any]
) -> Any:
    """The dataclass from flags as typer read them; `plain` fills fields that are no options. Raises ConfigError."""
    known, readers = options_of(kind), value_types(kind)
    values: dict[str, Any] = {
        each.name: plain[each.name] for each in fields(kind) if each.name not in known and each.name in plain
    }
    for name, (_, about) in known.items():
        if given.get(name) is not None:
            values[name] = from_words(flag(name, about), given[name], readers[name], about)
        elif name in fallback:
            values[name] = fallback[name]
    made = kind(**values)
    check_values(made, lambda name: flag(name, known[name][1]))
    if hasattr(made, "check"):
        made.check()
    return made


def flag(name: str, about: Option) -> str:
    """The name by which people know an option: --the-field-name, unless it says otherwise."""
    return next((each for each in about.flags if each.startswith("--")), f"--{name.replace('_', '-')}")


def _with_flags(message: str, kinds: Iterable[type]) -> str:
    """An error of the library names a field of the options; who wrote a command line knows its flag.

    A name of one word is one only where it begins the sentence: "device 'x' is", "remove is 9".
    """
    for kind in kinds:
        for name, (_, about) in options_of(kind).items():
            is_word = "_" not in name
            pattern = (
                rf"^{name}(?= is | '| names | needs )" if is_word else rf"(?<![\w./-]){name}(?![\w./=-])"
            )
            message = re.sub(pattern, flag(name, about), message)
    return message


def flags_of(kind: type) -> dict[str, inspect.Parameter]:
    """A parameter that typer reads for every option of a dataclass: texts, or booleans, None where none is given."""
    readers = value_types(kind)
    return {
        name: _parameter(origin, about, readers[name]) for name, (origin, about) in options_of(kind).items()
    }


def _parameter(origin: Field[Any], about: Option, reader: ValueType) -> inspect.Parameter:
    name = flag(origin.name, about)
    is_switch = reader.kind is bool and not reader.is_list
    metavar = about.metavar or ("NAME" if about.choices else _METAVARS.get(reader.kind, "TEXT"))
    if reader.is_list and not about.metavar and _is_split(reader, about):
        metavar = f"{metavar},…"
    info = typer.Option(
        *((f"{name}/--no-{name[2:]}",) if is_switch else (name,)),
        *(each for each in about.flags if not each.startswith("--")),
        help=help_text(origin, about),
        metavar="" if is_switch else metavar,
        show_default=False,
        rich_help_panel=about.group or None,
        autocompletion=_completer(about.choices, reader.is_list) if about.choices else None,
    )
    hint: Any = bool if is_switch else list[str] if reader.is_list else str
    required = origin.default is MISSING and origin.default_factory is MISSING
    return inspect.Parameter(
        origin.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[hint if required else hint | None, info],
    )


def _completer(choices: tuple[str, ...], is_list: bool) -> Callable[[str], list[str]]:
    """What a shell asks for the choices that go on from what is typed; of a list, from what is behind the comma."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        return [f"{before}{comma}{choice}" for choice in choices if choice.startswith(last)]

    return complete


def help_text(origin: Field[Any], about: Option, *, plain: bool = False) -> str:
    """An option's help with its choices and its default; `plain`: without rich's markup."""
    choices = f" ({', '.join(about.choices)})" if about.choices else ""
    shown = default_text(origin, about)
    if plain:
        return f"{about.help}{choices}" + (f" [{shown}]" if shown else "")
    return escape(f"{about.help}{choices}") + (f" [dim]\\[{escape(shown)}][/dim]" if shown else "")


def default_text(origin: Field[Any], about: Option) -> str:
    """An option's default as people read it; empty: there is none."""
    if origin.default is MISSING or origin.default is None or origin.default == ():
        return about.unset
    if isinstance(origin.default, bool):
        return "yes" if origin.default else "no"
    if isinstance(origin.default, tuple):
        return ",".join(map(str, origin.default))
    return f"{origin.default:g}" if isinstance(origin.default, float) else str(origin.default)


def from_words(name: str, words: Any, reader: ValueType, about: Option) -> Any:
    """An option's value from text, or from several texts for a list. Raises ConfigError naming `name`."""
    if isinstance(words, bool):
        return words
    if not reader.is_list:
        return _from_word(name, words, reader, about)
    split = _is_split(reader, about)
    parts = [part for word in words for part in (word.split(",") if split else [word])]
    if reader.kind is int:
        parts = [number for part in parts for number in _range(part)]
    return tuple(_from_word(name, part.strip() if split else part, reader, about) for part in parts)


def _is_split(reader: ValueType, about: Option) -> bool:
    return about.commas or reader.kind in (int, float)


def _range(text: str) -> list[str]:
    """ "0-3" is 0, 1, 2, 3; every other text itself."""
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal() and 0 <= int(last) - int(first) < _LONGEST_RANGE:
        return list(map(str, range(int(first), int(last) + 1)))
    return [text]


def _from_word(name: str, word: str, reader: ValueType, about: Option) -> Any:
    try:
        if reader.kind is bool:
            return _SWITCHES[word.lower()]
        return reader.kind(word)
    except (ValueError, KeyError):
        wanted = reader.describe(about)
        example = ", such as 0,3,6" if reader.is_list else ""
        raise ConfigError(f"{name} is {word!r}; it must be {wanted}{example}") from None


class OptionsCommand(TyperCommand):
    """A command whose help writes what can be switched on and off as one flag, --[no-]x, to leave room for words.

    Its paragraphs are as wide as the terminal, however wide they stand in the code.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(self.help or ""))
        for parameter in self.params:
            off = getattr(parameter, "secondary_opts", ())
            if off == [f"--no-{parameter.opts[0][2:]}"]:
                parameter.opts, parameter.secondary_opts = [f"--[no-]{off[0][5:]}", *parameter.opts[1:]], []
        super().format_help(ctx, formatter)


def _check_model(model: str | None) -> str | None:
    from sleb.models.resolve import check_model

    if model is not None:
        check_model(model)
    return model


def _check_any_model(model: str) -> str:
    from sleb.models.resolve import check_model

    check_model(model, any_architecture=True)
    return model


def _complete_model(incomplete: str) -> list[str]:
    """The aliases; where none fits, the shell goes on with files."""
    return [name for name in ALIASES if name.startswith(incomplete)]


def _model_argument(check: Callable[..., str | None], default: str = "") -> Any:
    return typer.Argument(
        metavar="MODEL",
        help=f"Folder, hub id (owner/name), .gguf file, {' or '.join(ALIASES)}."
        + (f" [dim]\\[{default}][/dim]" if default else ""),
        callback=check,
        autocompletion=_complete_model,
        show_default=False,
    )


_MODEL = _model_argument(_check_model)
Model = Annotated[str, _MODEL]
"""MODEL, the same in every command that takes one; a name that can be none is refused at once."""
DEMO = "smollm2"
DemoModel = Annotated[str, _model_argument(_check_model, f"{DEMO}, the demo")]
"""MODEL where one need not be named: DEMO then, as the parameter's default."""
AnyModel = Annotated[str, _model_argument(_check_any_model)]
"""MODEL, of an architecture that need not be one of the engine's."""
OptionalModel = Annotated[str | None, _MODEL]

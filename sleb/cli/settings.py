"""Values of a command's options from the environment and from a TOML file.

An option given as a flag goes before the environment, that before the file, and that before the default. Every
source is checked whether or not another one goes before it, so that a mistake is told when it is made.
"""

from __future__ import annotations

import difflib
import inspect
import os
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from sleb.cli.options import flag, from_words, make_command
from sleb.errors import ConfigError
from sleb.options import Option, ValueType, options_of, value_types
from sleb.terminal import tell

PREFIX = "SLEB_"


@dataclass(frozen=True)
class Setting:
    """An option outside of the command line: its name is the flag's, with underscores; `field` the dataclass's."""

    name: str
    field: str
    reader: ValueType
    about: Option

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def with_settings(table: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `with_options`, with an option --config-file besides: a TOML file with a table of that name.

    The command's parameters that are texts, such as MODEL, are settings as well.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        settings = settings_of(function)

        def use(context: typer.Context, config_file: str | None) -> Any:
            if context.resilient_parsing:  # a shell only asks how to complete a line
                return {}
            file = config_file or os.environ.get(f"{PREFIX}CONFIG_FILE") or None
            values = gather(settings, os.environ, file, table)
            for line in misspelt(settings, os.environ):
                tell(line, "yellow")
            plain = {
                setting.field for setting in settings if not setting.about.help
            }  # which typer alone knows
            context.default_map = {name: value for name, value in values.items() if name in plain}
            return values

        info = typer.Option(
            help=f"TOML file with a table \\[{table}] of these options. Each can also be a variable of the "
            f"environment, {PREFIX}PORT for --port; flags go before those, and those before the file.",
            callback=use,
            is_eager=True,
            metavar="FILE",
            show_default=False,
        )
        extra = inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, info],
        )
        return make_command(function, {"config_file": extra}, "config_file")

    return decorate


def settings_of(function: Callable[..., None]) -> list[Setting]:
    """What can be set of a command: its options and its parameters that are texts."""
    found = []
    for name, hint in typing.get_type_hints(function).items():
        if is_dataclass(hint) and isinstance(hint, type):
            readers = value_types(hint)
            for each, (_, about) in options_of(hint).items():
                public = flag(each, about)[2:].replace("-", "_")
                found.append(Setting(public, each, readers[each], about))
        elif hint is str:
            found.append(Setting(name, name, ValueType(str, False), Option("")))
    return found


def gather(
    settings: list[Setting], environment: Mapping[str, str], file: str | None, table: str
) -> dict[str, Any]:
    """Values by field; the environment goes before the file.

    Raises ConfigError, which names the place, the key and the value, for what an option cannot be.
    """
    values = {} if file is None else read_file(file, table, settings)
    for setting in settings:
        text = environment.get(setting.variable)
        if text:  # an empty one counts as none, as shells have no better way to take one back
            where = f"{setting.variable} in the environment"
            words = text.split() if setting.reader.is_list else text.strip()
            values[setting.field] = from_words(where, words, setting.reader, setting.about)
    return values


def misspelt(settings: list[Setting], environment: Mapping[str, str]) -> list[str]:
    """A line for each variable that is none of the settings, but written much like one."""
    known = [setting.variable for setting in settings]
    lines = []
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
            lines += [
                f"warning: {name} in the environment is no setting; did you mean {each}?" for each in near
            ]
    return lines


def read_file(path: str, table: str, settings: list[Setting]) -> dict[str, Any]:
    """The values in a table of a TOML file; keys may be written with - or _. Raises ConfigError."""
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"the settings file {path} is not TOML: {error}") from None
    for key in document:
        if key != table:
            raise ConfigError(f"'{key}' in {path} is not known; all settings belong below a line [{table}]")
    content = document.get(table, {})
    if not isinstance(content, dict):
        raise ConfigError(f"'{table}' in {path} must be a table; write a line [{table}] and settings below")
    known = {setting.name: setting for setting in settings}
    values: dict[str, Any] = {}
    for key, value in content.items():
        setting = known.get(key.replace("-", "_"))
        if setting is None:
            raise ConfigError(_unknown(key, path, list(known)))
        if setting.field in values:
            raise ConfigError(f"'{key}' in {path} is there twice, with - and with _; keep one")
        values[setting.field] = _from_toml(f"{key} in {path}", setting, value)
    return values


def _unknown(key: str, path: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
    return f"the setting '{key}' in {path} is not known; {hint}"


def _from_toml(where: str, setting: Setting, value: Any) -> Any:
    """A list may be written as a list, or as on the command line: 0,3 or 0-3."""
    reader, about = setting.reader, setting.about
    values = value if reader.is_list and isinstance(value, list) else [value]
    wanted = str if reader.kind is Path else reader.kind
    for each in values or [value]:
        number = type(each) is int and wanted in (int, float)
        if not (number or type(each) is wanted or (reader.is_list and type(each) is str)):
            shown = str(value).lower() if isinstance(value, bool) else repr(value)[:80]
            raise ConfigError(f"{where} is {shown}; it must be {reader.describe(about)}")
    if reader.is_list:
        return from_words(where, [str(each) for each in values], reader, about)
    return reader.kind(value)

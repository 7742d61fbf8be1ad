"""Values of a command's options from the environment and from a TOML file.

An option given as a flag goes before the environment, that before the file, and that before the default. Every
source is checked whether or not another one goes before it, so that a mistake is told when it is made.
"""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sleb.errors import ConfigError

PREFIX = "SLEB_"
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_NAMES: dict[type, str] = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
_MAX_KEYS_FILE = 2**20  # bytes
_MAX_ALIAS = 200  # characters


@dataclass(frozen=True)
class Setting:
    """An option: what its value is, and whether it may be given several times.

    joined: whether the flag takes a list written with commas, which a file may write as a list.
    """

    name: str
    kind: type
    repeatable: bool = False
    joined: bool = False

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def wanted(self) -> str:
        return f"a list of {_NAMES[self.kind]}" if self.repeatable else _NAMES[self.kind]


def settings_of(
    command: Callable[..., Any], *, joined: tuple[str, ...] = (), without: str = ""
) -> list[Setting]:
    """The options of a command's function, by the types of its parameters; `without` is left out.

    joined: options whose text is a list with commas.
    """
    found = []
    hints = {name: hint for name, hint in typing.get_type_hints(command).items() if name != "return"}
    for name, hint in hints.items():
        alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kind = next(each for each in alternatives if each is not types.NoneType)
        repeatable = typing.get_origin(kind) is list
        kind = typing.get_args(kind)[0] if repeatable else kind
        if kind in _NAMES and name != without:
            found.append(Setting(name, kind, repeatable, name in joined))
    return found


def gather(
    settings: list[Setting], environment: Mapping[str, str], file: str | None, table: str
) -> dict[str, Any]:
    """Values by option; the environment goes before the file.

    Raises ConfigError, which names the place, the key and the value, for what an option cannot be.
    """
    values = {} if file is None else read_file(file, table, settings)
    for setting in settings:
        text = environment.get(setting.variable)
        if text:  # an empty one counts as none, as shells have no better way to take one back
            values[setting.name] = _from_text(setting, text)
    return values


def _from_text(setting: Setting, text: str) -> Any:
    """Several values of a repeatable option are separated by white space."""
    convert = _bool if setting.kind is bool else setting.kind
    try:
        return list(map(convert, text.split())) if setting.repeatable else convert(text.strip())
    except ValueError:
        shown = text if len(text) <= 80 else text[:80] + "..."
        raise ConfigError(
            f"{setting.variable}='{shown}' in the environment is not {setting.wanted}; mend or unset it"
        ) from None


def _bool(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError
    return text.lower() in _TRUE


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
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(_unknown(key, path, list(known)))
        if name in values:
            raise ConfigError(f"'{key}' in {path} is there twice, with - and with _; keep one")
        values[name] = _from_toml(known[name], value, f"{key} = {_shown(value)} in {path}")
    return values


def _unknown(key: str, path: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
    return f"the setting '{key}' in {path} is not known; {hint}"


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _from_toml(setting: Setting, value: Any, where: str) -> Any:
    if setting.repeatable:
        values = value if isinstance(value, list) else [value]
        if not values or not all(_is(setting.kind, each) for each in values):
            raise ConfigError(f"{where} is not {setting.wanted}")
        return list(map(setting.kind, values))
    if setting.joined and (isinstance(value, list) or type(value) is int):
        return ",".join(map(str, value if isinstance(value, list) else [value]))
    if not _is(setting.kind, value):
        raise ConfigError(f"{where} is not {setting.wanted}")
    return setting.kind(value)


def _is(kind: type, value: Any) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def read_keys(path: str) -> list[str]:
    """API keys from a file, one a line; empty lines and lines that begin with # do not count. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_KEYS_FILE + 1)
    except OSError as error:
        raise ConfigError(f"--api-key-file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file {path} is not text in UTF-8") from None
    if len(text) > _MAX_KEYS_FILE:
        raise ConfigError(f"--api-key-file {path} is larger than 1 MiB; name a file with a key a line")
    lines = map(str.strip, text.splitlines())
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key; write one a line")
    return keys


def check_origin(origin: str) -> str:
    """The origin as browsers send it. Raises ConfigError for what is none."""
    if origin == "*":
        return origin
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query:
        raise ConfigError(
            f"--cors-origin '{origin}' is no origin; write it like https://example.org, or * for all"
        )
    return f"{parts.scheme}://{parts.netloc}".lower()


def check_alias(alias: str) -> str:
    """A name for the model. Raises ConfigError for one that a request could not give."""
    if not 0 < len(alias) <= _MAX_ALIAS or not alias.isprintable() or any(map(str.isspace, alias)):
        raise ConfigError(
            f"--served-model-name {alias[:80]!r} is no name; use up to {_MAX_ALIAS} characters without spaces"
        )
    return alias

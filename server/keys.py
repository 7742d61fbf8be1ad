"""API keys: files of them, their names, and the comparison that tells nothing by the time that it takes."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from sleb.errors import ConfigError
from sleb.fields import shown_path
from sleb.server.errors import ApiError

if TYPE_CHECKING:
    from sleb.server.routing import Route

_MAX_FILE = 2**20  # bytes
_MAX_NAMES = 1000  # each is a label of metrics
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_NAMED = re.compile(r"([^:]*):(?:\s+(.*))?")  # a key may hold a colon, but not with a space after it


@dataclass(frozen=True)
class Key:
    """A key's digest, and the name that the log and the metrics know it by. source: where it is from, for errors."""

    digest: bytes
    name: str | None = None
    source: str = field(default="", compare=False)


NO_KEY = Key(b"")


class ApiKeys:
    """Keys compared in constant time; without any key everybody may pass."""

    def __init__(self, keys: Sequence[Key], open_routes: Sequence[Route]) -> None:
        self._keys = keys
        self._open_routes = open_routes

    def check(self, path: str, headers: Headers) -> Key:
        """The key that the request bears, NO_KEY where none is needed. Raises ApiError 401."""
        if not self._keys or any(route.path_regex.match(path) for route in self._open_routes):
            return NO_KEY
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token if scheme.lower() == "bearer" else ""
        given = [_digest(key.strip().encode("latin-1")) for key in (bearer, headers.get("x-api-key", ""))]
        found = [key for each in given for key in self._keys if hmac.compare_digest(each, key.digest)]
        if not found:
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


def make_keys(plain: Iterable[str], files: Iterable[Path]) -> tuple[Key, ...]:
    """The keys of --api-key, and those of files; one that comes twice counts once.

    Raises ConfigError for an empty one, a file that cannot be read, two keys of one name, and a key with two names. It
    names places, never a key.
    """
    found: list[Key] = []
    for each in plain:
        if not each.strip():
            raise ConfigError("--api-key is empty; give a key, or leave the flag out")
        found.append(Key(_digest(each.strip().encode()), None, "--api-key"))
    for path in files:
        found += read_keys(path)
    keys: dict[bytes, Key] = {}
    names: dict[str, Key] = {}
    for key in found:
        known = keys.setdefault(key.digest, key)
        if known.name != key.name:
            raise ConfigError(f"{key.source} is the key that {known.source} has under another name; keep one")
        if key.name is not None and names.setdefault(key.name, key) != key:
            raise ConfigError(
                f"{key.source} is another key of the name {key.name}, which {names[key.name].source} has; "
                "give each key a name of its own"
            )
    if len(names) > _MAX_NAMES:
        raise ConfigError(f"--api-key-file names {len(names)} keys; at most {_MAX_NAMES} may have names")
    return tuple(keys.values())


def read_keys(path: Path) -> list[Key]:
    """API keys from a file, one a line, as KEY or NAME: KEY; empty lines and those that begin with # do not count.

    Raises ConfigError.
    """
    where = f"--api-key-file {shown_path(path)}"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{where} is not text in UTF-8") from None
    if len(text) > _MAX_FILE:
        raise ConfigError(f"{where} is larger than 1 MiB; name a file with a key a line")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    keys = [_read_line(line, f"{where}, line {number}") for number, line in lines if line and line[0] != "#"]
    if not keys:
        raise ConfigError(f"{where} holds no key; write one a line, as KEY or NAME: KEY")
    return keys


def _read_line(line: str, where: str) -> Key:
    named = _NAMED.fullmatch(line)
    if named is None:
        return Key(_digest(line.encode()), None, where)
    name, key = named.groups()
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where} gives a name that cannot be one; use up to 64 letters, digits, dots, dashes, underscores and @, "
            "as in 'alice: KEY'"
        )
    if not key:
        raise ConfigError(f"{where} has no key behind the name {name}; write {name}: KEY")
    return Key(_digest(key.encode()), name, where)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

"""Files that appear whole or not at all, and the folder where sleb keeps what it makes. The standard library alone."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sleb.errors import ConfigError


def cache_dir() -> Path:
    """Where models, quantised weights and kernels are kept: SLEB_CACHE, else sleb/ in the user's cache directory.

    Raises RuntimeError where a user has no home folder.
    """
    if chosen := os.environ.get("SLEB_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "sleb"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sleb"


@contextmanager
def replacement(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The name of a file to write beside `path`, which takes its place at the end and is gone after an error.

    A reader, or a crash, sees the old file or the new one; `durable`: also a crash of the whole machine. Raises the
    OSError of a disk that refuses.
    """
    target = path.resolve()  # where `path` is a link, what it points to is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 by way of `replacement`. Raises ConfigError that names the path and the reason."""
    try:
        with replacement(path) as temporary:
            # Names in a command line may be no UTF-8; in JSON the escapes read back as what they were.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise _not_writable(path, error) from None


def check_writable(path: Path) -> None:
    """Raises ConfigError, before hours are spent, if a file cannot be written at `path`. Leaves nothing behind."""
    if os.path.isdir(path):  # unlike Path.is_dir, false for what cannot be looked at; the probe says why
        raise ConfigError(f"{path} is a folder; name a file in it")
    target = path.resolve()
    probe = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to the disk, where the system can."""
    if path.is_dir() and sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_writable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be written ({error.strerror}); name a file in a folder that exists and is yours"
    )

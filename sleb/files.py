"""Files that appear whole or not at all, what tells that one changed, and the folder where sleb keeps what it makes.

The standard library alone.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
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


def make_folder(path: Path) -> None:
    """Makes `path` and what is missing above it, for others to read but not to write, whatever the umask.

    Raises OSError.
    """
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(mode=0o755, exist_ok=True)


def untrusted(path: Path, root: Path) -> str | None:
    """Why somebody else may have made what is at `path`, and the remedy; None where only this user or root can have.

    Those and nobody else must own, and be able to write, `path` and each folder from it up to `root`. Of use for what
    is run: a library that is loaded, say. Raises OSError if it cannot be looked at.
    """
    if sys.platform == "win32":  # whose rights os.stat does not tell
        return None
    path, root = path.resolve(), root.resolve()
    for place in (path, *path.parents):
        facts = place.stat()
        if facts.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to another user (number {facts.st_uid}): remove it, or point SLEB_CACHE elsewhere"
        if facts.st_mode & 0o022:
            return f"other users can write {place}: run `chmod go-w {place}`, or point SLEB_CACHE elsewhere"
        if place == root:
            break
    return None


def file_state(path: Path) -> str:
    """A word that changes when the contents of `path` do; a few megabytes of them are read. Raises OSError.

    It is made of inode, size, both times and 64 pieces of the contents, first and last among them. Size and time of
    modification alone tell nothing: weights of one shape have one size, and `cp -p`, tar, rsync and os.utime set that
    time. The time of change (ctime) no call can set: a write, a rename over the file, a setting of the other time each
    make it the system's now. The pieces are for where it says less: filesystems that keep none (images that are
    mounted read-only, Windows), and a write within the same tick of the clock, some milliseconds, as one that was seen.
    A file that is moved, or gets a link or other rights, has a new word too: what was made of it is made once more.
    """
    facts = path.stat()
    digest = hashlib.sha256(
        f"{facts.st_ino} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}".encode()
    )
    count, length = 64, 1 << 16
    with path.open("rb") as file:
        for index in range(count):
            file.seek(max(0, facts.st_size - length) * index // (count - 1))
            digest.update(file.read(length))
    return digest.hexdigest()[:32]


def content_digest(path: Path, report: Callable[[int, int], None] | None = None) -> str:
    """The SHA-256 of a file's contents, in hexadecimal digits; remembered in the cache folder while `file_state` stays.

    report: called with bytes read, and of how many, while they are read. Raises OSError if `path` cannot be read.
    """
    note = cache_dir() / "digests" / file_state(path)
    with suppress(OSError, ValueError):
        if re.fullmatch("[0-9a-f]{64}", remembered := note.read_text(encoding="ascii")):
            return remembered
    digest, size, num_read = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
            num_read += len(piece)
            if report is not None:
                report(num_read, size)
    with suppress(OSError):
        if file_state(path) == note.name:  # else it changed while it was read
            make_folder(note.parent)
            with replacement(note, durable=False) as temporary:
                temporary.write_text(digest.hexdigest(), encoding="ascii")
    return digest.hexdigest()


@contextmanager
def replacement(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """The name of a file to write beside `path`, which takes its place at the end and is gone after an error.

    A reader, or a crash, sees the old file or the new one; `durable`: also a crash of the whole machine. Raises the
    OSError of a disk that refuses.
    """
    target = path.resolve()  # where `path` is a link, what it points to is replaced
    _refuse_device(target)
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
        _refuse_device(target)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def _refuse_device(path: Path) -> None:
    """OSError for a device, pipe or socket: a file in its place would take it from every other program."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(errno.EEXIST, "it is a device, pipe or socket")


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

"""Files and folders that appear whole or not at all, and replace nothing that they should not."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sleb.errors import ConfigError
from sleb.files import replacement, sync

PROVENANCE = "sleb.json"  # in every folder that was exported; what --force may replace
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_file(path: Path, *, force: bool) -> None:
    """Raises ConfigError for a place where `write_file` must not write."""
    if path.is_dir():
        raise ConfigError(f"output {path} is a folder: name a file in it")
    if os.path.lexists(path) and not force:
        raise ConfigError(f"output {path} exists: replace it with --force, or name another")


def write_file(path: Path, text: str, *, force: bool) -> None:
    """The text as UTF-8, by way of a temporary file. Raises ConfigError."""
    with new_file(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[Path]:
    """A temporary file to fill, which takes the name `path` at the end and is gone after an error.

    Raises ConfigError.
    """
    check_file(path, force=force)
    try:
        with replacement(path) as temporary:
            yield temporary
    except OSError as error:
        raise _refused(path, error) from None


def check_folder(path: Path, *, force: bool, source: Path | None = None) -> None:
    """Raises ConfigError where `new_folder` must not write: only an earlier export, or nothing, is replaced.

    `source` is the model's folder, once it is known.
    """
    folder = path.expanduser().resolve()
    if source is not None and (folder == source.resolve() or folder in source.resolve().parents):
        raise ConfigError(f"output {path} holds the model that is exported: name another folder")
    try:
        if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise _refused(path, error) from None
    if not (folder / PROVENANCE).is_file():
        raise ConfigError(
            f"output {path} exists and was not exported by sleb: name another folder, or remove it"
        )
    if not force:
        raise ConfigError(f"output {path} exists: replace it with --force, or name another")


@contextmanager
def new_folder(path: Path, *, force: bool, source: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `path` at the end and is gone after an error.

    `source` is the model's folder, which is never replaced. Raises ConfigError.
    """
    check_folder(path, force=force, source=source)
    target = path.expanduser().resolve()
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.sleb-tmp-", dir=target.parent))
        made = work / "made"
        made.mkdir()
        yield made
        for each in sorted(made.rglob("*")):
            sync(each)
        _put(made, target, work / "replaced")
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _put(made: Path, target: Path, replaced: Path) -> None:
    if target.exists():
        target.rename(replaced)
    try:
        made.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    sync(target.parent)


def _refused(path: Path, error: OSError) -> ConfigError:
    if error.errno in _FULL:
        return ConfigError(f"no space left for {path}: free some, or name another place")
    return ConfigError(f"output {path} cannot be written ({error.strerror or error}): name another place")

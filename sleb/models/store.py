"""Model folders that appear whole or not at all.

A folder is built beside its place and renamed into it, its marker file written last. So whatever carries a
marker that agrees with its files is a complete model, and whatever an interruption leaves behind carries a
name that nothing looks for; the next build of the same folder sweeps it away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from sleb.errors import ModelError
from sleb.files import cache_dir, make_folder, sync

MARKER = ".sleb-model.json"
FORMAT = 1  # raise it when the converter changes what it writes: older folders are then built anew
_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_complete(folder: Path, source: dict[str, Any] | None = None) -> bool:
    """Whether `folder` was built, from `source` if it is given, in this format, and every file still has its size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    known = source is None or marker.get("source") == source
    return bool(known and marker.get("format") == FORMAT and sizes == marker["files"])


def build_once(folder: Path, source: dict[str, Any], build: Callable[[Path, Path], None]) -> Path:
    """Returns `folder`, built by `build(target, scratch)` unless it is complete already, from the same `source`.

    `target` and `scratch` are empty folders on the same file system as `folder`; `scratch` is thrown away.
    `source` goes into the marker. Of two processes that want the same folder one builds
    and the other waits. Raises ModelError when `folder` holds something else, or the disk refuses.
    """
    folder = Path(os.path.abspath(folder.expanduser()))
    if is_complete(folder, source):
        return folder
    try:
        make_folder(folder.parent)
        with _locked(folder):
            _sweep(folder)
            if not is_complete(folder, source):
                _refuse_foreign(folder)
                _build(folder, source, build)
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder


def disk_error(error: OSError, folder: Path) -> ModelError:
    """What to tell a user whose disk refused to hold `folder`."""
    remedy = "point SLEB_CACHE (or --to) at another place"
    if error.errno in _FULL:
        return ModelError(f"no space left for {folder}: free some, or {remedy}")
    return ModelError(f"cannot write {folder} ({error}): {remedy}")


def check_space(folder: Path, num_bytes: int) -> None:
    """Raises ModelError, before anything is written, if the disk of `folder` has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ModelError(
            f"the model takes {num_bytes / 1e9:.1f} GB when it is converted, but the disk of {folder} has "
            f"{free / 1e9:.1f} GB free: free some, or point SLEB_CACHE (or --to) at another place"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclusive among processes; the system lets go of it when its holder dies."""
    locks = cache_dir() / "locks"
    make_folder(locks)
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    with FileLock(locks / f"{name}.lock"):
        yield


def _prefix(folder: Path) -> str:
    return f".{folder.name}.sleb-tmp-"


def _sweep(folder: Path) -> None:
    """Removes what killed builds of `folder` left; its lock is held, so nobody else is building it."""
    for leftover in folder.parent.glob(f"{_escape(_prefix(folder))}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _escape(text: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in text)


def _refuse_foreign(folder: Path) -> None:
    """Only what this module made, or nothing, may be replaced."""
    if not os.path.lexists(folder):
        return
    ours = folder.is_dir() and ((folder / MARKER).is_file() or not any(folder.iterdir()))
    if not ours:
        raise ModelError(
            f"{folder} exists and is not a model folder made by sleb: name another folder, or remove it"
        )


def _build(folder: Path, source: dict[str, Any], build: Callable[[Path, Path], None]) -> None:
    work = Path(tempfile.mkdtemp(prefix=_prefix(folder), dir=folder.parent))
    try:
        target, scratch = work / "model", work / "scratch"
        target.mkdir()
        scratch.mkdir()
        build(target, scratch)
        files = sorted(file for file in target.iterdir() if file.is_file())
        for file in files:
            sync(file)
        marker = {
            "format": FORMAT,
            "source": source,
            "files": {file.name: file.stat().st_size for file in files},
        }
        (target / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        sync(target / MARKER)
        sync(target)
        if folder.exists():  # damaged, of an older format or of another source
            folder.rename(work / "replaced")
        target.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)

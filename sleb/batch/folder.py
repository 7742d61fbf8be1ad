"""OUT: a file a block, whole or not there, and what the job was that wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from sleb.batch.sources import Block
from sleb.errors import ConfigError
from sleb.files import make_folder, replacement, write_text

JOB = "job.json"
_LOCK = ".lock"
_BLOCK = re.compile(r"\d{8}-[0-9a-f]{16}\.jsonl")
_UNFINISHED = re.compile(rf"\.{_BLOCK.pattern}\.\d+-\d+\.tmp")
_SHOWN = 5  # names of files in a message


class OutFolder:
    """The folder of one job, which no other process writes to while this one has it open.

    Args:
        job: what the answers depend on, by name; it is written down, and a later run must say the same.

    Raises ConfigError where the folder cannot be written, is in use, or is another job's.
    """

    def __init__(self, path: Path, job: Mapping[str, str]) -> None:
        self.path = path
        try:
            make_folder(path)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be made ({error.strerror}); name a folder that is yours"
            ) from None
        self._lock = FileLock(path / _LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"another sleb batch writes to {path}; wait for it, or name another folder"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written ({error.strerror}); name a folder that is yours"
            ) from None
        try:
            self._check_job(job)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._lock.release()

    def has(self, block: Block) -> bool:
        """Whether the block is answered."""
        return (self.path / block.name).is_file()

    def tidy(self, blocks: Iterable[Block]) -> list[str]:
        """Removes what an interrupted run left half written; what a person should know of the folder, a line each.

        Raises ConfigError where there are answers to lines that the input does not have: an id could be there twice.
        """
        known = {block.name for block in blocks}
        names = sorted(path.name for path in self.path.iterdir() if path.name not in known | {JOB, _LOCK})
        stale = [name for name in names if _BLOCK.fullmatch(name)]
        if stale:
            raise ConfigError(
                f"{self.path} has answers to lines that the input has not (any more): {_listed(stale)}; remove those "
                "files, or name another folder"
            )
        unfinished = [name for name in names if _UNFINISHED.fullmatch(name)]
        for name in unfinished:
            (self.path / name).unlink(missing_ok=True)
        foreign = [name for name in names if name not in unfinished]
        told = []
        if unfinished:
            told.append(
                f"{self.path}: removed what an interrupted run left unfinished: {_listed(unfinished)}"
            )
        if foreign:
            told.append(f"{self.path}: files that are not of this job stay as they are: {_listed(foreign)}")
        return told

    def _check_job(self, job: Mapping[str, str]) -> None:
        path = self.path / JOB
        try:
            before = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            write_text(path, json.dumps(job, indent=1) + "\n")
            return
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise ConfigError(f"{path} is not what sleb batch writes; name another folder")
        for name in {**before, **job}:
            if before.get(name) != job.get(name):
                raise ConfigError(
                    f"{self.path} has the answers of another job, whose {name} was {_shown(before.get(name))} and is "
                    f"{_shown(job.get(name))} now; run it as it was, or name another folder"
                )


def write_block(folder: Path, block: Block, rows: Iterable[bytes]) -> None:
    """Writes the answers to a block, all or none of them. Raises ConfigError for a disk that refuses."""
    path = folder / block.name
    try:
        with replacement(path) as temporary, temporary.open("wb") as file:
            for row in rows:
                file.write(row)
                file.write(b"\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); what is answered is kept, run the command again"
        ) from None


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _shown(value: object) -> str:
    return "not there" if value is None else repr(str(value)[:80])

"""The input: its lines in blocks, each of which can be read again by itself."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import orjson

from sleb.batch.options import BatchOptions
from sleb.errors import ConfigError

_BLOCK_BYTES = (
    32 << 20
)  # after which a block has no further line: two blocks, and their answers, are in memory
_SKIP_BYTES = 1 << 20
_SHOWN_COLUMNS = 20


@dataclass(frozen=True)
class Block:
    """Lines that stand together and are answered into the file `name`.

    name: from the block's place and the hash of its lines. first: the number of its first line, from 1. start: where
    reading begins, in the source's own way.
    """

    index: int
    name: str
    first: int
    num_lines: int
    start: int


@dataclass(frozen=True)
class Row:
    """A line as it stands, cut behind the longest that is allowed; its number, and where it begins."""

    number: int
    text: bytes
    start: int


class Source(Protocol):
    """An input file. Raises ConfigError when it is opened, or read, and cannot be."""

    def rows(self, number: int = 1, start: int = 0) -> Iterator[Row]:
        """Its lines from that one on, in order."""


class JsonLines:
    """A file with a JSON value a line; empty lines count, and are passed over. `Row.start` is in bytes."""

    def __init__(self, path: Path, max_line_bytes: int) -> None:
        self._path = path
        self._limit = max_line_bytes + 1

    def rows(self, number: int = 1, start: int = 0) -> Iterator[Row]:
        try:
            with self._path.open("rb") as file:
                file.seek(start)
                while line := file.readline(self._limit + 1):
                    more = line
                    while more and not more.endswith(b"\n"):  # too long, or the file's last
                        more = file.readline(_SKIP_BYTES)
                    text = line[: self._limit].rstrip(b"\r\n")
                    if number == 1:
                        text = text.removeprefix(b"\xef\xbb\xbf")
                    if text.strip():
                        yield Row(number, text, start)
                    number, start = number + 1, file.tell()
        except OSError as error:
            raise ConfigError(
                f"{self._path} cannot be read: {error.strerror}; name a file of JSON lines or a Parquet file"
            ) from None


class ParquetColumn:
    """A column of a Parquet file, its values as JSON. `Row.start` is a row's number, from 0."""

    def __init__(self, path: Path, column: str | None, max_line_bytes: int) -> None:
        self._path, self._column = path, column
        self._limit = max_line_bytes + 1
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ConfigError(
                f"{path} needs the package pyarrow: pip install 'sleb[eval]', or give a file of JSON lines"
            ) from None
        names = list(map(str, self._file.schema_arrow.names))
        if column not in names:
            shown = ", ".join(names[:_SHOWN_COLUMNS]) or "none"
            what = "--column is missing" if column is None else f"--column {column} is not in {path}"
            raise ConfigError(f"{what}; its columns are: {shown}; name one of them")
        self._ends = []  # of each row group, in rows
        end = 0
        for group in range(self._file.num_row_groups):
            end += self._file.metadata.row_group(group).num_rows
            self._ends.append(end)
        self._last: tuple[int, Any] = (-1, None)

    @cached_property
    def _file(self) -> Any:
        try:
            return self._parquet.ParquetFile(self._path, pre_buffer=False, buffer_size=2**20)
        except (OSError, self._arrow.ArrowException, ValueError) as error:
            raise self._broken(error) from None

    def rows(self, number: int = 1, start: int = 0) -> Iterator[Row]:
        begin = 0
        for group, end in enumerate(self._ends):
            if start < end:
                values = self._values(group)
                for at in range(max(start, begin), end):
                    text = orjson.dumps(values[at - begin].as_py(), default=str)
                    yield Row(number, text[: self._limit], at)
                    number += 1
            begin = end

    def _values(self, group: int) -> Any:
        """A row group's column; the last one is kept, for the next block."""
        if self._last[0] != group:
            try:
                table = self._file.read_row_group(group, columns=[self._column])
            except (OSError, self._arrow.ArrowException, ValueError) as error:
                raise self._broken(error) from None
            self._last = (group, table.column(0))
        return self._last[1]

    def _broken(self, error: Exception) -> ConfigError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ConfigError(f"{self._path} cannot be read as Parquet ({reason}); write it anew")


def open_source(path: Path, options: BatchOptions) -> Source:
    """The input at `path`. Raises ConfigError for a file that is not there, or options that do not fit it."""
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; name a file of JSON lines or a Parquet file")
    if path.suffix.lower() == ".parquet":
        return ParquetColumn(path, options.column, options.max_line_bytes)
    if options.column is not None:
        raise ConfigError(f"--column is of Parquet files, and {path} does not end in .parquet; leave it out")
    return JsonLines(path, options.max_line_bytes)


def cut(rows: Iterator[Row], block_size: int) -> Iterator[tuple[Block, list[Row]]]:
    """The blocks of a source, with their lines."""
    index, size, lines = 0, 0, list[Row]()
    for row in rows:
        lines.append(row)
        size += len(row.text)
        if len(lines) >= block_size or size >= _BLOCK_BYTES:
            yield _block(index, lines), lines
            index, size, lines = index + 1, 0, []
    if lines:
        yield _block(index, lines), lines


def read_block(source: Source, block: Block) -> list[Row]:
    """The lines of a block. Raises ConfigError if they are not those any more."""
    lines = list[Row]()
    if block.num_lines:
        for row in source.rows(block.first, block.start):
            lines.append(row)
            if len(lines) == block.num_lines:
                break
    if not lines or _block(block.index, lines) != block:
        raise ConfigError(
            f"the input changed while it was being answered, at line {block.first}; run the command again"
        )
    return lines


def _block(index: int, lines: list[Row]) -> Block:
    digest = hashlib.blake2b(digest_size=8)
    for row in lines:
        digest.update(len(row.text).to_bytes(8, "little"))
        digest.update(row.text)
    name = f"{index:08d}-{digest.hexdigest()}.jsonl"
    return Block(index, name, lines[0].number, len(lines), lines[0].start)

"""One column of a .jsonl or .parquet file, row by row, in bounded memory. Nothing is unpickled."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sleb.errors import ConfigError

_BATCH_ROWS = 128
_SHOWN_COLUMNS = 20


def read_column(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    """Where each row stands (for messages) and its value in `column`.

    Raises ConfigError for a file or a row that cannot be read, and for a column that does not exist.
    """
    with _readable(path):
        yield from (_read_parquet if _is_parquet(path) else _read_jsonl)(path, column)


def read_text(path: Path, num_characters: int = -1) -> str:
    """The text of a file, or its beginning. Raises ConfigError for one that cannot be read or is not UTF-8."""
    try:
        with _readable(path), path.open(encoding="utf-8") as file:
            return file.read(num_characters)
    except UnicodeDecodeError:
        raise ConfigError(f"calibration file {path} is not UTF-8 text") from None


def check_table(path: Path, column: str) -> None:
    """ConfigError for what the beginning of the file shows to be wrong."""
    if next(read_column(path, column), None) is None:
        raise ConfigError(f"calibration file {path} has no rows: give another")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"calibration file {path} cannot be read: {error.strerror or error}") from None


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _read_jsonl(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            row = _parse_line(line, where)
            if column not in row:
                raise _no_column(where, path, column, row)
            yield where, row[column]


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig").rstrip()
        row = json.loads(text)
        if "\\u" in text:  # may escape half of a character, which no tokenizer takes
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"calibration {where} is not UTF-8 text") from None
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ConfigError(
            f"calibration {where} has half a character, {half}: mend or remove that line"
        ) from None
    except (ValueError, RecursionError) as error:
        at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise ConfigError(f"calibration {where} is not JSON ({at}): mend or remove that line") from None
    if not isinstance(row, dict):
        raise ConfigError(
            f"calibration {where} is no JSON object: a .jsonl file has an object on every line, "
            'like {"text": "..."}'
        )
    return row


def _read_parquet(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"calibration {path} needs the package pyarrow: pip install 'sleb[eval]', or give a .jsonl file"
        ) from None
    try:
        # Without pre_buffer a row group is read as it is needed, not as a whole.
        file = parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20)
    except (pyarrow.ArrowException, ValueError) as error:
        raise _broken(path, error) from None
    with file:
        names = file.schema_arrow.names
        if column not in names:
            raise _no_column(str(path), path, column, names)
        batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=[column])
        number = 0
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else batch.column(0).to_pylist()
            except (pyarrow.ArrowException, ValueError) as error:
                raise _broken(path, error) from None
            if batch is None:
                return
            for value in values:
                number += 1
                yield f"{path} row {number}", value


def _broken(path: Path, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(f"calibration file {path} cannot be read as Parquet ({reason}): write it anew")


def _no_column(where: str, path: Path, column: str, columns: Iterable[str]) -> ConfigError:
    names = [str(name) for name in columns]
    shown = ", ".join(names[:_SHOWN_COLUMNS]) + (", ..." if len(names) > _SHOWN_COLUMNS else "")
    return ConfigError(
        f"calibration {where} has no column {column!r}; it has: {shown or 'none'}. "
        f"Name one of them after a colon, as {path.name}:{names[0] if names else 'text'}"
    )

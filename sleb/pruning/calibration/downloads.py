"""The public data sets wikitext2 and c4, through the package datasets."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from sleb.errors import ConfigError, SlebError

# How much of C4 is read for packed windows: about 450 windows of 2,048 tokens, without loading a whole shard.
_C4_DOCUMENTS = 2000
_C4_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz"}
_C4_VALIDATION = {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def wikitext2_lines(split: str = "train", flag: str = "--calibration") -> Sequence[str]:
    """The lines of one split; `flag` asked for them, for errors."""
    lines: Sequence[str] = _load(flag, "wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)[
        "text"
    ]
    return lines


def c4_shard() -> Sequence[str]:
    """Every document of the first training shard, which is downloaded whole."""
    documents: Sequence[str] = _load(
        "--calibration", "c4", "allenai/c4", data_files=_C4_SHARD, split="train"
    )["text"]
    return documents


def c4_validation(flag: str) -> Sequence[str]:
    """Every document of the first validation file; `flag` asked for them, for errors."""
    files: Sequence[str] = _load(flag, "c4", "allenai/c4", data_files=_C4_VALIDATION, split="validation")[
        "text"
    ]
    return files


def c4_beginning() -> Sequence[str]:
    """The first documents of the first shard."""
    flag = "--calibration"
    stream: Iterable[dict[str, Any]] = _load(
        flag, "c4", "allenai/c4", data_files=_C4_SHARD, split="train", streaming=True
    )
    try:
        return [document["text"] for document in islice(stream, _C4_DOCUMENTS)]
    except Exception as error:
        raise _download_error(flag, "c4", error) from error


def _load(flag: str, source: str, *path: str, **options: Any) -> Any:
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise ConfigError(
            f"{flag} {source} needs the package datasets: pip install 'sleb[eval]', or name a text file ({flag} FILE)"
        ) from None
    try:
        return load_dataset(*path, **options)
    except Exception as error:  # the package raises whatever its network and file layers do
        raise _download_error(flag, source, error) from error


def _download_error(flag: str, source: str, error: Exception) -> SlebError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return SlebError(
        f"{flag} {source} could not be downloaded ({reason}): check the network, or name a text file ({flag} FILE)"
    )

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
_FILE_REMEDY = "or name a text file (--calibration FILE)"


def wikitext2_lines() -> Sequence[str]:
    """The lines of the training text."""
    lines: Sequence[str] = _load("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split="train")[
        "text"
    ]
    return lines


def c4_shard() -> Sequence[str]:
    """Every document of the first shard, which is downloaded whole."""
    documents: Sequence[str] = _load("c4", "allenai/c4", data_files=_C4_SHARD, split="train")["text"]
    return documents


def c4_beginning() -> Sequence[str]:
    """The first documents of the first shard."""
    return _texts("c4", _load("c4", "allenai/c4", data_files=_C4_SHARD, split="train", streaming=True))


def _texts(source: str, stream: Iterable[dict[str, Any]]) -> list[str]:
    try:
        return [document["text"] for document in islice(stream, _C4_DOCUMENTS)]
    except Exception as error:
        raise _download_error(source, error) from error


def _load(source: str, *path: str, **options: Any) -> Any:
    try:
        load_dataset = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise ConfigError(
            f"calibration {source} needs the package datasets: pip install 'sleb[eval]', {_FILE_REMEDY}"
        ) from None
    try:
        return load_dataset(*path, **options)
    except Exception as error:  # the package raises whatever its network and file layers do
        raise _download_error(source, error) from error


def _download_error(source: str, error: Exception) -> SlebError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return SlebError(
        f"calibration {source} could not be downloaded ({reason}): check the network, {_FILE_REMEDY}"
    )

"""Windows of tokens for the search, from a text file or a public data set.

Two samplers cut a text [T tokens] into windows [W, L]:

packed  the whole text is tokenised at once and cut into consecutive windows from its first token; with a
        seed, windows are drawn from all of them in a shuffled order.
rows    what the authors' implementation does (github.com/jiwonsong-dev/SLEB, utils/data_utils.py): the
        text's lines are shuffled, the first 128 joined and tokenised, and that is cut into windows. Its "128
        samples" are lines, blank ones included, so there are about 4 windows of 2,048 tokens rather than
        128. The tokenizer adds its special tokens there.

Both drop the tail that is shorter than a window.
"""

from __future__ import annotations

import hashlib
import importlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sleb.errors import ConfigError, SlebError
from sleb.units import CalibrationRecord

Sampler = Literal["packed", "rows"]
DATASETS = ("wikitext2", "c4")
DEFAULT_WINDOWS = 128
NUM_ROWS = 128
# How much of C4 is read for packed windows: about 450 windows of 2,048 tokens, without loading a whole shard.
_C4_DOCUMENTS = 2000
_C4_SHARD = {"train": "en/c4-train.00000-of-01024.json.gz"}
_FILE_REMEDY = "or name a text file (--calibration FILE)"


@dataclass(frozen=True)
class Calibration:
    """Windows [W, L] int64, what they are, and a note for people where a default was cut short."""

    windows: Tensor
    record: CalibrationRecord
    note: str | None = None


@dataclass(frozen=True)
class _Source:
    name: str
    rows: Sequence[str]  # lines of a text, or documents
    row_separator: str  # between the rows of the rows sampler, as the authors join them
    whole: Callable[[], str]


def calibration_windows(
    source: str | Path,
    encode: Callable[[str], Sequence[int]],
    *,
    sampler: str = "packed",
    seqlen: int = 2048,
    windows: int | None = None,
    seed: int | None = None,
) -> Calibration:
    """Tokens of `source` ("wikitext2", "c4" or a text file) as windows of `seqlen`.

    `encode` turns text into token ids; `adds_special_tokens` says whether with the special ones. `windows`
    None: as many as there are, up to 128. Raises ConfigError for options out of range and for a text
    that is too short for them, SlebError for one that cannot be read or downloaded.
    """
    check_options(source, sampler, seqlen, windows, seed)
    text_source = _open_source(str(source), sampler)
    if sampler == "rows":
        seed = seed or 0
        text = sample_rows(text_source.rows, seed, text_source.row_separator)
    else:
        text = text_source.whole()
    all_windows = cut_windows(encode(text), seqlen, text_source.name)
    if sampler == "packed" and seed is not None:
        all_windows = all_windows[_permutation(len(all_windows), seed).tolist()]
    wanted = min(len(all_windows), DEFAULT_WINDOWS) if windows is None else windows
    if wanted > len(all_windows):
        raise ConfigError(
            f"calibration {text_source.name} gives {len(all_windows)} windows of {seqlen} tokens, "
            f"not {wanted}: ask for --windows {len(all_windows)} or fewer, for a shorter --seqlen, "
            "or give a longer text"
        )
    note = None
    if windows is None and wanted < DEFAULT_WINDOWS:
        note = (
            f"calibration {text_source.name} gives {wanted} windows of {seqlen} tokens; all of them are used"
        )
    chosen = all_windows[:wanted].contiguous()
    record = CalibrationRecord(
        source=text_source.name,
        sampler=sampler,
        seed=seed,
        seqlen=seqlen,
        windows=wanted,
        token_hash=token_hash(chosen),
        special_tokens=adds_special_tokens(sampler),
    )
    return Calibration(chosen, record, note)


def adds_special_tokens(sampler: str) -> bool:
    """Whether the tokenizer adds its special tokens to the text: only where the authors' code did."""
    return sampler == "rows"


def cut_windows(token_ids: Sequence[int], seqlen: int, source: str = "the text") -> Tensor:
    """Consecutive windows [len // seqlen, seqlen] int64 from the first token on, without the tail."""
    num_windows = len(token_ids) // seqlen
    if num_windows == 0:
        raise ConfigError(
            f"calibration {source} has {len(token_ids)} tokens, fewer than one window of {seqlen}: "
            "give a longer text or a shorter --seqlen"
        )
    flat = torch.tensor(token_ids[: num_windows * seqlen], dtype=torch.int64)
    return flat.view(num_windows, seqlen)


def sample_rows(rows: Sequence[str], seed: int, separator: str = "\n\n", num_rows: int = NUM_ROWS) -> str:
    """The first `num_rows` of the rows, shuffled as `datasets.Dataset.shuffle(seed)` does, joined."""
    return separator.join(rows[int(index)] for index in _permutation(len(rows), seed)[:num_rows])


def text_rows(text: str) -> list[str]:
    """The lines of a text as the WikiText data set gives them: with their newline, "" for a blank one."""
    return [line if line.strip() else "" for line in io.StringIO(text)]


def token_hash(windows: Tensor) -> str:
    """ "sha256:" and the digest of the token ids in order, as little-endian int64."""
    return "sha256:" + hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def _permutation(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.random.default_rng(seed).permutation(count)


def check_options(
    source: str | Path, sampler: str, seqlen: int | None, windows: int | None, seed: int | None
) -> None:
    """ConfigError for what can be seen to be wrong before a model is loaded or a text is read."""
    if sampler not in get_args(Sampler):
        raise ConfigError(f"sampler {sampler!r} does not exist: choose {' or '.join(get_args(Sampler))}")
    if seqlen is not None and seqlen < 2:
        raise ConfigError(f"seqlen {seqlen} is too short: a window needs 2 tokens or more to predict one")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows {windows} must be 1 or more")
    if seed is not None and seed < 0:
        raise ConfigError(f"seed {seed} must be 0 or more")
    if str(source) not in DATASETS and not Path(source).exists():
        known = ", ".join(DATASETS)
        raise ConfigError(
            f"calibration {str(source)!r} is neither a data set ({known}) nor a file that exists"
        )


def _open_source(source: str, sampler: str) -> _Source:
    if source == "wikitext2":
        lines = _load_dataset(source, "Salesforce/wikitext", "wikitext-2-raw-v1", split="train")["text"]
        return _Source(source, lines, "\n\n", lambda: "\n\n".join(lines))
    if source == "c4":
        if sampler == "rows":
            shard = _load_dataset(source, "allenai/c4", data_files=_C4_SHARD, split="train")["text"]
            return _Source(source, shard, " ", lambda: " ".join(shard))
        stream = _load_dataset(source, "allenai/c4", data_files=_C4_SHARD, split="train", streaming=True)
        return _Source(source, (), " ", lambda: " ".join(_documents(source, stream)))
    text = _read_text(Path(source))
    return _Source(Path(source).name, text_rows(text), "\n\n", lambda: text)


def _documents(source: str, stream: Iterable[dict[str, Any]]) -> list[str]:
    try:
        return [document["text"] for document in islice(stream, _C4_DOCUMENTS)]
    except Exception as error:
        raise _download_error(source, error) from error


def _load_dataset(source: str, *path: str, **options: Any) -> Any:
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"calibration file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"calibration file {path} is not UTF-8 text") from None

"""How a text [T tokens] becomes windows [W, L].

packed  the whole text is tokenised at once and cut into consecutive windows from its first token; with a
        seed, windows are drawn from all of them in a shuffled order.
rows    what the authors' implementation does (github.com/jiwonsong-dev/SLEB, utils/data_utils.py): the
        text's lines are shuffled, the first 128 joined and tokenised, and that is cut into windows. Its "128
        samples" are lines, blank ones included, so there are about 4 windows of 2,048 tokens rather than
        128. The tokenizer adds its special tokens there.

Both drop the tail that is shorter than a window; a model that needs it has a beginning-of-text token in each
(`Family.needs_bos`). The rows of a table are its documents. A table is read no further than the windows need, and with
a seed no further than `POOL_TOKENS`, so it may be larger than the memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sleb.errors import ConfigError

Sampler = Literal["packed", "rows"]
Row = TypeVar("Row")
DEFAULT_WINDOWS = 128
NUM_ROWS = 128
# Tokens of a table that shuffled windows are drawn from: 512 windows of 2,048. A tokenizer takes about 1 KiB for each.
POOL_TOKENS = 2**20
# The last tokens of a text that was not read to its end may be others than those of the whole text.
_UNSURE_TOKENS = 64
_CHARACTERS_A_TOKEN = 5  # a guess that only decides how much is read at first


def adds_special_tokens(sampler: str) -> bool:
    """Whether the tokenizer adds its special tokens to the text: only where the authors' code did."""
    return sampler == "rows"


def cut_windows(
    token_ids: Sequence[int], seqlen: int, source: str = "the text", start: int | None = None
) -> Tensor:
    """Consecutive windows [W, seqlen] int64 from the first token on, without the tail; `start` begins each of them."""
    own = seqlen if start is None else seqlen - 1
    if start is not None and len(token_ids) and token_ids[0] == start:  # the tokenizer's own
        token_ids = token_ids[1:]
    num_windows = len(token_ids) // own
    if num_windows == 0:
        raise ConfigError(
            f"calibration {source} has {len(token_ids)} tokens, fewer than one window of {seqlen}: "
            "give a longer text or a shorter --seqlen"
        )
    windows = torch.tensor(token_ids[: num_windows * own], dtype=torch.int64).view(num_windows, own)
    return windows if start is None else F.pad(windows, (1, 0), value=start)


def sample_rows(rows: Sequence[str], seed: int, separator: str = "\n\n", num_rows: int = NUM_ROWS) -> str:
    """The first `num_rows` of the rows, shuffled as `datasets.Dataset.shuffle(seed)` does, joined."""
    return separator.join(rows[int(index)] for index in permutation(len(rows), seed)[:num_rows])


def pick_rows(read: Callable[[], Iterable[Row]], seed: int, num_rows: int = NUM_ROWS) -> list[Row]:
    """The rows of `sample_rows`, of rows too many to hold: they are counted first and read again."""
    chosen = permutation(sum(1 for _ in read()), seed)[:num_rows].tolist()
    wanted, last = set(chosen), max(chosen, default=-1)
    found = {at: row for at, row in enumerate(islice(read(), last + 1)) if at in wanted}
    return [found[at] for at in chosen]


def text_rows(text: str) -> list[str]:
    """The lines of a text as the WikiText data set gives them: with their newline, "" for a blank one."""
    return [line if line.strip() else "" for line in io.StringIO(text)]


def permutation(count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The order of `datasets.Dataset.shuffle(seed)`."""
    return np.random.default_rng(seed).permutation(count)


def first_tokens(
    documents: Iterator[str], encode: Callable[[str], Sequence[int]], separator: str, num_tokens: int
) -> Sequence[int]:
    """The first `num_tokens` tokens of the joined documents, of which no more are read than that takes.

    They are those of the whole text wherever a token depends on no more than `_UNSURE_TOKENS` that follow.
    """
    read: list[str] = []
    num_characters, enough = 0, (num_tokens + _UNSURE_TOKENS) * _CHARACTERS_A_TOKEN
    while True:
        ended = True
        for document in documents:
            read.append(document)
            num_characters += len(document) + len(separator)
            if num_characters >= enough:
                ended = False
                break
        token_ids = encode(separator.join(read))
        if ended or len(token_ids) >= num_tokens + _UNSURE_TOKENS:
            return token_ids[:num_tokens]
        enough = 2 * num_characters

"""Texts for `sleb eval`, cut into windows in one of two ways.

sleb     As the authors' implementation does (github.com/jiwonsong-dev/SLEB, utils/eval_utils.py), after GPTQ
         (arXiv:2210.17323): the whole text is tokenised at once, with whatever the tokenizer adds, and cut into
         windows of `seqlen` tokens; the tail that is shorter is left out. A window's first token is not predicted.
lm-eval  As lm-evaluation-harness does for loglikelihood_rolling (lm_eval/utils.py, get_rolling_token_windows with
         context_len 1): no token is added but a prefix, the tokenizer's token for the beginning of a text, or else for
         its end. The first window predicts `seqlen` tokens after the prefix; each further one as many after the last
         token of the one before; the last has what comes before its tokens as context, as far as there is room.
         Every token of the text is predicted once.

For a model that needs it (`Family.needs_bos`), each window of either kind begins with the beginning-of-text token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sleb.errors import ConfigError
from sleb.pruning.calibration.downloads import c4_validation, wikitext2_lines

if TYPE_CHECKING:
    from sleb.engine.text import TextProcessor

# lm-eval over HTTP keeps two of its max_length tokens free: one for the prefix, one that the server has to generate.
LM_EVAL_SPARE = 2


@dataclass(frozen=True)
class Text:
    """A text, the name to show, and how many windows of it are taken unless it is said; None: all."""

    name: str
    content: str
    default_windows: int | None = None

    @property
    def num_words(self) -> int:
        return len(re.split(r"\s+", self.content))  # as lm-eval counts them

    @property
    def num_bytes(self) -> int:
        return len(self.content.encode("utf-8"))


class Window(NamedTuple):
    """Token ids, of which the last `num_scored` are predicted, each from those before it."""

    token_ids: tuple[int, ...]
    num_scored: int


@dataclass(frozen=True)
class WindowedText:
    """A text's windows, and whether they predict all of its tokens."""

    text: Text
    windows: tuple[Window, ...]
    is_whole: bool


def read_text(source: str) -> Text:
    """The text file `source`, or the text that the paper evaluates on for "wikitext2" and "c4".

    Those are the test split of WikiText-2, and the first 1,100 documents of C4's first validation file, of which the
    authors take 256 windows (utils/data_utils.py). Raises ConfigError for a file that cannot be read, SlebError for a
    data set that cannot be downloaded.
    """
    if source == "wikitext2":
        return Text(source, "\n\n".join(wikitext2_lines("test", "--text")))
    if source == "c4":
        return Text(source, " ".join(c4_validation("--text")[:1100]), 256)
    return Text(Path(source).name, read_file(source, "--text", "name a text file, or wikitext2 or c4"))


def read_file(path: str, flag: str, remedy: str) -> str:
    """The text in a file. Raises ConfigError that names the flag, the reason and the remedy."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{flag} {path} cannot be read as text ({reason}); {remedy}") from None


def default_seqlen(scheme: str, max_length: int) -> int:
    """Tokens of a window where none are asked for: 2,048 or the model's context, less what lm-eval keeps free."""
    return min(2048, max_length) - (LM_EVAL_SPARE if scheme == "lm-eval" else 0)


def cut_text(
    text: Text, processor: TextProcessor, scheme: str, seqlen: int, num_windows: int | None
) -> WindowedText:
    """The first `num_windows` windows of a text; None: the text's own number. Raises ConfigError if there are none."""
    tokenizer = processor.tokenizer
    if tokenizer is None:
        raise ConfigError("the model has no tokenizer; add its tokenizer.json to the model's folder")
    token_ids = processor.encode(text.content, add_special_tokens=scheme == "sleb")
    if scheme == "sleb":
        windows = packed_windows(token_ids, seqlen, processor.window_start)
        least, remedy = f" of {seqlen}", " or a shorter --seqlen"
    else:
        again = processor.window_start is not None
        windows, least, remedy = rolling_windows(token_ids, prefix_token(processor), seqlen, again), "", ""
    if not windows:
        raise ConfigError(
            f"text {text.name} has {len(token_ids)} tokens, fewer than one window{least}; give a longer text{remedy}"
        )
    kept = tuple(windows[: text.default_windows if num_windows is None else num_windows])
    return WindowedText(text, kept, scheme == "lm-eval" and len(kept) == len(windows))


def packed_windows(token_ids: Sequence[int], seqlen: int, begin: int | None = None) -> list[Window]:
    """The windows of the scheme "sleb"; `begin` is the first token of each."""
    if begin is None:
        starts = range(0, len(token_ids) - seqlen + 1, seqlen)
        return [Window(tuple(token_ids[start : start + seqlen]), seqlen - 1) for start in starts]
    own = seqlen - 1
    starts = range(1 if token_ids[:1] == [begin] else 0, len(token_ids) - own + 1, own)
    return [Window((begin, *token_ids[start : start + own]), own) for start in starts]


def rolling_windows(token_ids: Sequence[int], prefix: int, seqlen: int, again: bool = False) -> list[Window]:
    """The windows of the scheme "lm-eval"; `again`: the prefix stands in the place of each one's first token."""
    ids, windows = [prefix, *token_ids], []
    for start in range(1, len(ids), seqlen):
        end = min(start + seqlen, len(ids))
        window = ids[max(0, end - seqlen - 1) : end]
        windows.append(Window((prefix, *window[1:]) if again else tuple(window), end - start))
    return windows


def prefix_token(processor: TextProcessor) -> int:
    """The id of the beginning-of-text token, or else of the end-of-text token. Raises ConfigError without either."""
    assert processor.tokenizer is not None
    for name in ("bos_token", "eos_token"):
        found: int | None = processor.tokenizer.token_to_id(processor.named_tokens.get(name) or "")
        if found is not None:
            return found
    raise ConfigError(
        "the tokenizer names no token for the beginning or the end of a text, with which lm-eval's windows begin; "
        "use --windows-like sleb"
    )


def batches(windows: Sequence[Window], num_tokens: int) -> Iterator[tuple[Tensor, int]]:
    """Windows of one shape that follow one another, as token ids [W, L] int64, and how many of a window are scored.

    A batch has about `num_tokens` tokens, and a window at least.
    """
    for (length, num_scored), alike in groupby(windows, lambda each: (len(each.token_ids), each.num_scored)):
        token_ids = torch.tensor([window.token_ids for window in alike])
        for batch in token_ids.split(max(1, num_tokens // length)):
            yield batch, num_scored

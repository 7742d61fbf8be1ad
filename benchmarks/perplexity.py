"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens, over windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.llm import LLM
from sleb.errors import ConfigError

# Rows of logits at once: 256 rows of 128k entries in float32 are 128 MiB.
_LOGIT_ROWS = 256


def split_windows(token_ids: Sequence[int], window: int) -> list[list[int]]:
    """token_ids cut into windows of `window` tokens, one after another; the last may be shorter.

    A window's first token is not predicted, so a remainder of one token is left out. Raises ConfigError when
    nothing is left to predict.
    """
    if window < 2:
        raise ConfigError(f"a window of {window} tokens predicts nothing; it must have at least 2")
    windows = [list(token_ids[start : start + window]) for start in range(0, len(token_ids), window)]
    windows = [each for each in windows if len(each) > 1]
    if not windows:
        raise ConfigError(f"the text has {len(token_ids)} tokens; perplexity needs at least 2")
    return windows


def perplexity(llm: LLM, token_ids: Sequence[int], window: int = 1024, depth: int | None = None) -> float:
    """Perplexity of token_ids under `llm` at `depth` (None: the default tier).

    Raises ConfigError for a text or a window too short, RequestError for a window that the context does not hold.
    """
    return windowed_perplexity(split_windows(token_ids, window), lambda part: llm.score(part, depth))


def windowed_perplexity(windows: Sequence[Sequence[int]], score: Callable[[Sequence[int]], Tensor]) -> float:
    """Perplexity over `windows`; `score` gives the log-probabilities [len − 1] of a window's tokens but the first."""
    scores = torch.cat([score(window) for window in windows])
    return math.exp(-scores.double().mean().item())


def transformers_perplexity(path: Path, windows: Sequence[Sequence[int]], dtype: torch.dtype) -> float:
    """The same with transformers' model of the folder `path`, on a CPU: an implementation that is not ours.

    Raises whatever transformers raises for a folder that it does not load.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).eval()

    @torch.inference_mode()
    def score(window: Sequence[int]) -> Tensor:
        logits: Tensor = model(torch.tensor([list(window)]), use_cache=False).logits[0, :-1]
        following = torch.tensor(window[1:])
        parts = [
            -torch.nn.functional.cross_entropy(rows.float(), tokens, reduction="none")
            for rows, tokens in zip(logits.split(_LOGIT_ROWS), following.split(_LOGIT_ROWS), strict=True)
        ]
        return torch.cat(parts)

    return windowed_perplexity(windows, score)

"""Grammars in a step: the masks of the rows that follow one, and each grammar's next state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sleb.engine.execute.transfer import to_device
from sleb.engine.requests.grammar import Mask
from sleb.engine.requests.request import Request

logger = logging.getLogger("sleb.engine")

BITS = 32  # tokens a word of a mask


def num_words(vocab_size: int) -> int:
    """Words of a mask."""
    return -(-vocab_size // BITS)


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens may come next in the rows of a batch that follow a grammar: words [G, W] for `rows` [G]."""

    rows: Sequence[int]
    words: Mask

    def apply(self, logits: Tensor) -> None:
        """Sets the logits [B, V] of what may not come next to minus infinity, in place."""
        device = logits.device
        words = to_device(self.words, torch.int32, device)
        bits = torch.arange(BITS, dtype=torch.int32, device=device)
        forbidden = ((words[:, :, None] >> bits) & 1 == 0).flatten(1)[:, : logits.shape[1]]
        if len(self.rows) == logits.shape[0]:
            logits.masked_fill_(forbidden, float("-inf"))
        else:
            rows = to_device(self.rows, torch.int64, device)
            logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))


def fill_masks(
    requests: Sequence[Request], vocab_size: int, eos_token_ids: frozenset[int]
) -> TokenMasks | None:
    """The masks of a batch, made on the host; None when no request follows a grammar.

    A request whose grammar fails gets `failure`; what is sampled for it then means nothing.
    """
    rows = [row for row, request in enumerate(requests) if request.grammar is not None]
    if not rows:
        return None
    masks = TokenMasks(rows, np.zeros((len(rows), num_words(vocab_size)), dtype=np.int32))
    for row, mask in zip(rows, masks.words, strict=True):
        request = requests[row]
        assert request.grammar is not None
        try:
            request.grammar.fill(mask)
            if not mask.any():
                raise RuntimeError("no token may come next")
        except Exception as error:
            _fail(request, error)
            mask.fill(-1)
        else:
            _keep_stops_back(request, mask, eos_token_ids)
    return masks


def advance(request: Request, token_id: int) -> bool:
    """Moves the request's grammar on, if it has one, and says whether nothing but the end can follow.

    `failure` is set when that fails.
    """
    if request.grammar is None:
        return False
    try:
        request.grammar.accept(token_id)
        return request.grammar.finished
    except Exception as error:
        _fail(request, error)
        return True


def _fail(request: Request, error: Exception) -> None:
    """Notes why the request cannot go on."""
    if request.failure is None:
        logger.error("request %s: its grammar failed: %s", request.request_id, str(error)[:500])
        request.failure = error


def _keep_stops_back(request: Request, mask: Mask, eos_token_ids: frozenset[int]) -> None:
    """Takes away what must not end the answer yet, unless nothing else may come next."""
    params = request.params
    early = request.num_sampled < params.min_tokens
    stops = eos_token_ids if early or params.ignore_eos else frozenset[int]()
    if early:
        stops |= set(params.stop_token_ids)
    if not stops:
        return
    kept = mask.copy()
    words = kept.view(np.uint32)
    for token_id in stops:
        words[token_id // BITS] &= np.uint32(~(1 << token_id % BITS) & 0xFFFFFFFF)
    if kept.any():
        mask[:] = kept

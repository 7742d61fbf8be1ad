"""Text that the model writes itself, for where there is no text like the one that it was trained on.

LLM-QAT (arXiv:2305.17888; github.com/facebookresearch/LLM-QAT, generate_data.py) calibrates on samples of the model
too. It begins a document with each token of the vocabulary in turn, takes the most probable token for the next two to
four and samples the rest. Here every document begins with the beginning-of-text token and every token after it is
sampled at temperature 1, so that documents have the probabilities that the model gives them. LLM-QAT also turns them
into text and tokenises that; here the sampled tokens themselves are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from sleb.errors import ConfigError

# (a seed for each document, tokens of one at most, called with the number of new tokens) -> their tokens. What the
# model is given to begin with is left out; each document has the end-of-text token at its end, if the model has one.
Generate = Callable[[Sequence[int], int, Callable[[int], None]], Sequence[Sequence[int]]]

_MAX_DOCUMENTS = 1024  # a call; bounds the queue
_ENOUGH_DOCUMENTS = 32  # to say that all of them are empty


def generated_tokens(
    generate: Generate,
    num_tokens: int,
    seed: int,
    max_tokens: int,
    on_progress: Callable[[float], None] = lambda share: None,
) -> list[int]:
    """The first `num_tokens` tokens of documents 0, 1, 2, …, each of `max_tokens` at most.

    Document i depends on `document_seed(seed, i)` alone, so how many are sampled at a time changes nothing.
    on_progress gets the share that is done, 0 to 1. Raises ConfigError if the model writes nothing.
    """
    token_ids: list[int] = []
    num_documents = num_new = 0

    def count(new: int) -> None:
        nonlocal num_new
        num_new += new
        on_progress(min(1.0, num_new / num_tokens))

    while len(token_ids) < num_tokens:
        missing = num_tokens - len(token_ids)
        if num_documents:  # a tenth more than looks needed: a few documents alone are computed slowly
            missing = math.ceil(1.1 * missing * num_documents / max(len(token_ids), 1))
        else:
            missing = math.ceil(missing / max_tokens)
        batch = min(missing, _MAX_DOCUMENTS)
        seeds = [document_seed(seed, num_documents + at) for at in range(batch)]
        for document in generate(seeds, max_tokens, count):
            token_ids.extend(document)
        num_documents += batch
        if len(token_ids) <= num_documents and num_documents >= _ENOUGH_DOCUMENTS:  # nothing but their ends
            raise ConfigError(
                f"calibration self: the model ends its documents at once ({num_documents} of them have "
                f"{len(token_ids)} tokens): name a text file instead"
            )
    return token_ids[:num_tokens]


def document_seed(seed: int, index: int) -> int:
    """A seed of 64 bits for document `index`, so that two seeds have no documents in common."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])

"""vLLM's `allowed_token_ids` and `bad_words`: rules about tokens that an answer follows as it does a grammar."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sleb.errors import RequestError
from sleb.server.errors import shorten

if TYPE_CHECKING:
    from sleb.engine.requests.grammar import Grammar, GrammarSource, Mask
    from sleb.engine.served_model import ServedModel
    from sleb.server.engine_thread.handle import EngineHandle
    from sleb.server.grammar.grammar_spec import GrammarSpec

_BITS = 32  # tokens a word of a mask


class TokenRules:
    """A grammar source: the tokens that may come at all, and sequences of tokens that must not be written.

    allowed: None: all. A sequence is kept from being finished: its last token may not follow the others.
    """

    def __init__(
        self, vocab_size: int, allowed: Sequence[int] | None, banned: Sequence[Sequence[int]] = ()
    ) -> None:
        self.given = vocab_size, allowed, banned
        may = np.zeros(-(-vocab_size // _BITS) * _BITS, dtype=bool)
        may[:vocab_size] = allowed is None
        may[list(allowed or ())] = True
        may[[sequence[0] for sequence in banned if len(sequence) == 1]] = False
        self.mask: Mask = np.packbits(may, bitorder="little").view(np.int32)
        self.longest = max(map(len, banned), default=1)
        self.after: dict[int, list[Sequence[int]]] = defaultdict(list)  # by the last token but one
        for sequence in banned:
            if len(sequence) > 1:
                self.after[sequence[-2]].append(sequence)

    def start(self) -> Grammar:
        return _State(self)


class _State:
    finished = False

    def __init__(self, rules: TokenRules) -> None:
        self._rules = rules
        self._last: list[int] = []  # as many as the longest sequence needs

    def fill(self, mask: Mask) -> None:
        mask[:] = self._rules.mask
        for *before, token_id in self._rules.after.get(self._last[-1], ()) if self._last else ():
            if self._last[-len(before) :] == before:
                mask.view(np.uint32)[token_id // _BITS] &= np.uint32(~(1 << token_id % _BITS) & 0xFFFFFFFF)

    def accept(self, token_id: int) -> None:
        self._last = [*self._last, token_id][-self._rules.longest :]


async def grammar_source(
    engine: EngineHandle,
    allowed_token_ids: Sequence[int] | None,
    bad_words: Sequence[str] | None,
    spec: GrammarSpec | None,
) -> GrammarSource | None:
    """What an answer must follow: the grammar `spec`, or the request's rules about tokens.

    Raises RequestError for more than one of them, for ids that the model does not have, and as the compiler does.
    """
    rules = {"allowed_token_ids": allowed_token_ids, "bad_words": bad_words}
    given = [name for name, rule in rules.items() if rule]
    asked = given + ([spec.param] if spec is not None else [])
    if len(asked) > 1:
        raise RequestError(f"{asked[0]} and {asked[1]} exclude each other; leave one out", param=asked[0])
    if spec is not None:
        return await engine.compile(spec)
    if not given:
        return None
    vocab_size = engine.model.spec.vocab_size
    for token_id in allowed_token_ids or ():
        if token_id >= vocab_size:
            raise RequestError(
                f"{token_id} in allowed_token_ids is not a token id; ids go from 0 to {vocab_size - 1}",
                param="allowed_token_ids",
            )
    banned = [tokens for word in bad_words or () for tokens in _as_tokens(engine.model, word)]
    return TokenRules(vocab_size, allowed_token_ids, banned)


def _as_tokens(model: ServedModel, word: str) -> list[list[int]]:
    """The tokens of a word at the beginning of a text and, if they are as many others, after a space, as vLLM does."""
    plain, spaced = (model.encode(space + word.lstrip(), False) for space in ("", " "))
    if not plain:
        raise RequestError(
            f"bad_words has {shorten(word)}, which makes no token; leave it out", param="bad_words"
        )
    return [plain, spaced] if len(spaced) == len(plain) and spaced[0] != plain[0] else [plain]

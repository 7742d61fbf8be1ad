"""What engines are asked: random ordinary tokens, as ids, or as text for a server that takes no ids."""

from __future__ import annotations

import json
import random
import re
import secrets
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sleb.benchmarks.peer_options import PeerTest
from sleb.errors import ConfigError

# With fewer words of one token each, text is whatever random tokens give.
_LEAST_WORDS = 256
# Left out at both ends of a vocabulary: Mistral keeps its first 1,000 ids for special tokens, Llama 3 its last 256.
_MARGIN = 1024


class Prompts:
    """Prompts for the model in `folder`. Raises ConfigError without its config.json.

    Those of `ids` depend on `seed` alone. Those for servers begin with numbers that are new at every start, since a
    server may remember what it was asked before.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._nonce = secrets.token_hex(8)
        self._vocab_size = _vocab_size(folder)

    def ids(self, test: PeerTest, repetition: int) -> list[list[int]]:
        """The same for all engines."""
        return self._draw(test, f"{self._seed} {test} {repetition}")

    def fresh(self, test: PeerTest, repetition: int, run: int, as_text: bool) -> list[list[int]] | list[str]:
        """Those of one run, the same for all servers. Text has about as many tokens as the test says."""
        key = f"{self._seed} {self._nonce} {test} {repetition} {run}"
        if not as_text:
            return self._draw(test, key)
        if self._words:
            rng = random.Random(key)
            return [" ".join(rng.choices(self._words, k=test.prompt_tokens)) for _ in range(test.batch)]
        return [self._tokenizer.decode(ids) for ids in self._draw(test, key)]

    def _draw(self, test: PeerTest, key: str) -> list[list[int]]:
        rng = random.Random(key)
        return [rng.choices(self._ordinary_ids, k=test.prompt_tokens) for _ in range(test.batch)]

    @cached_property
    def _ordinary_ids(self) -> Sequence[int]:
        """Without special tokens, and without ids that stand for no token, which follow the special ones at the end."""
        size = self._vocab_size
        margin = min(_MARGIN, size // 4)
        added = _added_ids(self._folder)
        end = min((each for each in added if each >= size // 2), default=size)
        ids = [each for each in range(margin, min(end, size - margin)) if each not in added]
        return ids or range(size)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = self._folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{self._folder} has no tokenizer.json, which servers that take text only need")
        return Tokenizer.from_file(str(path))

    @cached_property
    def _words(self) -> list[str]:
        """Words that are one token where a space goes before."""
        found = [re.fullmatch(r"[Ġ▁]([a-z]{2,})", token) for token in sorted(self._tokenizer.get_vocab())]
        words = [match[1] for match in found if match]
        return words if len(words) >= _LEAST_WORDS else []


def _added_ids(folder: Path) -> set[int]:
    """Of tokens that the tokenizer holds beside its model, special ones above all; empty where it does not tell."""
    try:
        tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        return {int(token["id"]) for token in tokens}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _vocab_size(folder: Path) -> int:
    try:
        return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder} is no Hugging Face folder ({error}); peers want one, with a config.json"
        ) from None

"""What is asked: random words of a given number of tokens, the rows of a file, or random token ids.

Random words have that number by the server's own count, whatever its tokenizer is. Tokenizers split text at spaces
first, so a word after a space costs the same wherever it stands. How many tokens a word costs, and how many the rest
of a request (the chat template, special tokens), a server tells by the `usage` of a few requests for one token. Where
many words cost one token each, as common English ones do in nearly every vocabulary, five such requests are enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple

import orjson

from sleb.errors import ConfigError, ModelError
from sleb.models.config import MAX_VOCABULARY, read_config

# Common English nouns: 64 of them, so that 16 words, a page of a prefix cache, are 96 bits of chance.
_NOUNS = """
time people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home
water room mother area money story fact month lot right study book eye job
word business issue side kind head house service friend father power hour game line end member law car
"""
WORDS = tuple(_NOUNS.split())
# For tokenizers of bytes and characters: words of so many lengths that their sums give any number of tokens.
VARIED_WORDS = ("a", "i", "at", "in", "and", "the", "time", "hand", "water", "place", "people", "company")
_CHUNK = 16
_LEAST_WORDS = 32
_TRIES = 50
OPENING = "A"  # templates may strip a text's first space, so the first word is always this one
# Left out at both ends of a vocabulary: Mistral keeps its first 1,000 ids for special tokens, Llama 3 its last 256.
_MARGIN = 1024

# The server's count of the tokens of a request with this text; None where it gives none.
CountTokens = Callable[[str], Awaitable[int | None]]


@dataclass(frozen=True)
class Vocabulary:
    """Words with the tokens that each costs after a space, and those of the rest of a request."""

    costs: Mapping[str, int]
    overhead: int

    def sample(self, num_tokens: int, rng: Random) -> list[str]:
        """Random words of so many tokens in all, or a few less where no words are found that give the number."""
        if set(self.costs.values()) == {1}:
            return rng.choices(tuple(self.costs), k=num_tokens)
        for _ in range(_TRIES):
            words, left = list[str](), num_tokens
            while fitting := [word for word, cost in self.costs.items() if cost <= left]:
                words.append(rng.choice(fitting))
                left -= self.costs[words[-1]]
            if not left:
                break
        return words


# What is assumed of a server that counts no tokens.
UNCOUNTED = Vocabulary(dict.fromkeys(WORDS, 1), overhead=0)


async def calibrate(count: CountTokens) -> Vocabulary | None:
    """Asks what words cost: 5 requests, or 17 where few cost one token. None if tokens are not counted."""
    overhead = await count(OPENING)
    if overhead is None:
        return None

    async def cost(words: Sequence[str]) -> int:
        return (await count(join_words(words)) or 0) - overhead

    chunks = [WORDS[start : start + _CHUNK] for start in range(0, len(WORDS), _CHUNK)]
    single = [word for chunk in chunks if await cost(chunk) == len(chunk) for word in chunk]
    if len(single) >= _LEAST_WORDS:  # no word costs less than one token, so each of these costs one
        return Vocabulary(dict.fromkeys(single, 1), overhead)
    costs = {word: await cost([word]) for word in VARIED_WORDS}
    costs = {word: tokens for word, tokens in costs.items() if tokens > 0}
    return Vocabulary(costs, overhead) if costs else None


def join_words(words: Sequence[str]) -> str:
    """The text of a prompt."""
    return " ".join([OPENING, *words])


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers. spread: both are chosen evenly from (1 ± spread) times what is given."""

    prompt_tokens: int = 64
    output_tokens: int = 128
    spread: float = 0.0

    def sample(self, rng: Random) -> tuple[int, int]:
        """Of a prompt and of an answer; at least 1."""
        prompt, output = (
            rng.randint(max(1, round(number * (1 - self.spread))), round(number * (1 + self.spread)))
            for number in (self.prompt_tokens, self.output_tokens)
        )
        return prompt, output


class Prompt(NamedTuple):
    """What a request asks. num_tokens: as the server is to count them, the template's too; 0: not known."""

    text: str
    num_tokens: int
    output_tokens: int


class RandomPrompts:
    """Prompts of random words, no two alike.

    salt: of the words alone, so that prompts of the same seed and number have the same lengths but other words. A run
    takes a new one for each server: the words of an earlier run would come from a server's prefix cache.
    """

    def __init__(self, lengths: Lengths, vocabulary: Vocabulary, seed: int, salt: str = "") -> None:
        least = round(lengths.prompt_tokens * (1 - lengths.spread))
        if least <= vocabulary.overhead:
            raise ConfigError(
                f"a prompt of {least} tokens leaves no room for a text: the server's template takes "
                f"{vocabulary.overhead}; ask for more with --prompt-tokens, or try --endpoint completions"
            )
        self._lengths, self._vocabulary, self._seed, self._salt = lengths, vocabulary, seed, salt

    def make(self, number: int) -> Prompt:
        """The prompt with this number, from 0: the same at every call, and unlike any other."""
        prompt_tokens, output_tokens = self._lengths.sample(Random(f"{self._seed} {number}"))
        rng = Random(f"{self._seed} {self._salt} {number}")
        words = self._vocabulary.sample(prompt_tokens - self._vocabulary.overhead, rng)
        return Prompt(join_words(words), prompt_tokens, output_tokens)


class DatasetPrompts:
    """The rows {"prompt": "…"} of a file of JSON lines in their order, again and again. Raises ConfigError."""

    def __init__(self, path: Path, output_tokens: int) -> None:
        self._output_tokens = output_tokens
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            message = f"{path} cannot be read ({error.strerror}); name a file of JSON lines"
            raise ConfigError(message) from None
        self._rows: list[str] = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            prompt = None
            with contextlib.suppress(ValueError, LookupError, TypeError):
                prompt = orjson.loads(line)["prompt"]
            if not isinstance(prompt, str) or not prompt:
                raise ConfigError(f'{path}, line {number} is not {{"prompt": "…"}}, as each line is to be')
            self._rows.append(prompt)
        if not self._rows:
            raise ConfigError(f'{path} has no rows; each line is to be {{"prompt": "…"}}')

    def make(self, number: int) -> Prompt:
        """The prompt of the request with this number, from 0."""
        return Prompt(self._rows[number % len(self._rows)], 0, self._output_tokens)


PromptSource = RandomPrompts | DatasetPrompts


class TokenPrompts:
    """Random ordinary tokens of the model in `folder`, as ids. Raises ConfigError without its config.json.

    Special tokens are left out, and ids that stand for no token, which follow the special ones at the end.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        try:
            size = read_config(folder).integer("vocab_size", 1, MAX_VOCABULARY)
        except ModelError as error:
            raise ConfigError(f"{error}; peers want a Hugging Face folder") from None
        added: set[int] = set()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a tokenizer need not tell
            tokenizer = orjson.loads((folder / "tokenizer.json").read_bytes())
            added = {int(token["id"]) for token in tokenizer["added_tokens"]}
        margin = min(_MARGIN, size // 4)
        end = min((each for each in added if each >= size // 2), default=size)
        ordinary = [each for each in range(margin, min(end, size - margin)) if each not in added]
        self._ids, self._seed = ordinary or list(range(size)), seed

    def make(self, batch: int, num_tokens: int, turn: int) -> list[list[int]]:
        """`batch` prompts: the same for every engine in this turn."""
        rng = Random(f"{self._seed} {batch} {num_tokens} {turn}")
        return [rng.choices(self._ids, k=num_tokens) for _ in range(batch)]

"""Random prompts of a given number of tokens by the server's own count, whatever its tokenizer is.

Tokenizers split text at spaces first, so a word after a space costs the same wherever it stands. How many tokens a
word costs, and how many the rest of a request (the chat template, special tokens), a server tells by the `usage` of a
few requests for one token. Where many words cost one token each, as common English ones do in nearly every vocabulary,
five such requests are enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Protocol

from sleb.errors import ConfigError

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
OPENING = "A"  # templates may strip a text's first space, so the first word is always this one


class CountTokens(Protocol):
    """The server's count of the tokens of a request with this text; None where it gives none."""

    def __call__(self, text: str) -> int | None: ...


@dataclass(frozen=True)
class Vocabulary:
    """Words with the tokens that each costs after a space, and those of the rest of a request."""

    costs: Mapping[str, int]
    overhead: int

    def draw(self, num_tokens: int, rng: Random) -> list[str]:
        """Random words of so many tokens in all, or a few less where no words give the number."""
        costs = tuple(sorted(set(self.costs.values())))
        if costs == (1,):
            return rng.choices(tuple(self.costs), k=num_tokens)
        possible = _possible_sums(costs, num_tokens)
        words: list[str] = []
        left = max(total for total in range(num_tokens + 1) if possible[total])
        while left:
            fitting = [word for word, cost in self.costs.items() if cost <= left and possible[left - cost]]
            words.append(rng.choice(fitting))
            left -= self.costs[words[-1]]
        return words


@lru_cache(maxsize=64)
def _possible_sums(costs: tuple[int, ...], highest: int) -> list[bool]:
    """Whether some of `costs`, each as often as needed, add up to 0, 1, … highest."""
    possible = [True]
    for total in range(1, highest + 1):
        possible.append(any(cost <= total and possible[total - cost] for cost in costs))
    return possible


# What is assumed of a server that counts no tokens.
UNCOUNTED = Vocabulary(dict.fromkeys(WORDS, 1), overhead=0)


def calibrate(count: CountTokens) -> Vocabulary | None:
    """Asks what words cost: 5 requests, or 17 where few cost one token. None if tokens are not counted."""
    overhead = count(OPENING)
    if overhead is None:
        return None
    single = [
        word for chunk in _chunks(WORDS) if _cost(chunk, count, overhead) == len(chunk) for word in chunk
    ]
    if len(single) >= _LEAST_WORDS:  # no word costs less than one token, so each of these costs one
        return Vocabulary(dict.fromkeys(single, 1), overhead)
    costs = {word: _cost([word], count, overhead) for word in VARIED_WORDS}
    costs = {word: cost for word, cost in costs.items() if cost > 0}
    return Vocabulary(costs, overhead) if costs else None


def _chunks(words: Sequence[str]) -> Iterator[Sequence[str]]:
    return (words[start : start + _CHUNK] for start in range(0, len(words), _CHUNK))


def _cost(words: Sequence[str], count: CountTokens, overhead: int) -> int:
    return (count(join_words(words)) or 0) - overhead


def join_words(words: Sequence[str]) -> str:
    """The text of a prompt."""
    return " ".join([OPENING, *words])


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and answers. spread: both are drawn evenly from (1 ± spread) times what is given.

    prefix_tokens: that come before, one of num_prefixes fixed texts.
    """

    prompt_tokens: int = 64
    output_tokens: int = 128
    spread: float = 0.0
    prefix_tokens: int = 0
    num_prefixes: int = 1

    def draw(self, rng: Random) -> tuple[int, int]:
        """Of a prompt without prefix, and of an answer; at least 1."""
        prompt, output = (
            rng.randint(max(1, round(number * (1 - self.spread))), max(1, round(number * (1 + self.spread))))
            for number in (self.prompt_tokens, self.output_tokens)
        )
        return prompt, output


@dataclass(frozen=True)
class Prompt:
    """What a request asks. num_tokens: as the server is to count them, the template's too; 0: not known.

    content: a text, or the messages of a chat.
    """

    content: str | Sequence[Mapping[str, str]]
    num_tokens: int
    output_tokens: int


class PromptSource(Protocol):
    """Prompts by number."""

    def make(self, number: int) -> Prompt:
        """The prompt of the request with this number, from 0."""


class RandomPrompts:
    """Prompts of random words: no two alike, but for prefixes that are asked for.

    salt: of the words alone, so that prompts of the same seed and number have the same lengths but other words. A run
    takes a new one for each server: the words of an earlier run would come from a server's prefix cache.
    """

    def __init__(self, lengths: Lengths, vocabulary: Vocabulary, seed: int, salt: str = "") -> None:
        least = lengths.prompt_tokens * (1 - lengths.spread) + lengths.prefix_tokens
        if round(least) <= vocabulary.overhead:
            raise ConfigError(
                f"a prompt of {round(least)} tokens leaves no room for a text: the server's template takes "
                f"{vocabulary.overhead}; ask for more with --prompt-tokens, or try --endpoint completions"
            )
        self._lengths, self._vocabulary, self._seed = lengths, vocabulary, seed
        self._words_seed = f"{seed} {salt}"
        # The template comes before the prefix, so it is a part of what is shared.
        shared = max(0, lengths.prefix_tokens - vocabulary.overhead)
        self._prefixes = [
            vocabulary.draw(shared, Random(f"{self._words_seed} prefix {number}"))
            for number in range(lengths.num_prefixes)
        ]

    def make(self, number: int) -> Prompt:
        """The prompt with this number, from 0: the same at every call, and unlike any other."""
        rng = Random(f"{self._seed} {number}")
        prompt_tokens, output_tokens = self._lengths.draw(rng)
        total = prompt_tokens + self._lengths.prefix_tokens
        prefix = rng.choice(self._prefixes)
        costs = self._vocabulary.costs
        own = total - self._vocabulary.overhead - sum(costs[word] for word in prefix)
        words = self._vocabulary.draw(own, Random(f"{self._words_seed} {number}"))
        return Prompt(join_words([*prefix, *words]), total, output_tokens)


def is_unicode(text: str) -> bool:
    """Whether a request can hold `text`: neither bytes of a command line that are no UTF-8, nor halves of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

"""What is asked: random words of a given number of tokens, the rows of a file, or random token ids.

Random words have that number by the server's own count, whatever its tokenizer is. Tokenizers split text at spaces
first, so a word after a space costs the same wherever it stands. How many tokens a word costs, and how many the rest
of a request (the chat template, special tokens), a server tells by the `usage` of a few requests for one token. Where
many words cost one token each, as common English ones do in nearly every vocabulary, five such requests are enough.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Protocol

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
# ShareGPT's names of who speaks, and the API's.
_ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bing", "bard"), "assistant")}
_KNOWN_ROLES = ("system", "user", "assistant")
_SHAPES = (
    'each line is to be {"prompt": "…"}, {"messages": [{"role": "user", "content": "…"}, …]} or '
    '{"conversations": [{"from": "human", "value": "…"}, …]}'
)
# Left out at both ends of a vocabulary: Mistral keeps its first 1,000 ids for special tokens, Llama 3 its last 256.
_MARGIN = 1024
Messages = list[dict[str, str]]

# The server's count of the tokens of a request with this text; None where it gives none.
CountTokens = Callable[[str], Awaitable[int | None]]


@dataclass(frozen=True)
class Vocabulary:
    """Words with the tokens that each costs after a space, and those of the rest of a request."""

    costs: Mapping[str, int]
    overhead: int

    def sample(self, num_tokens: int, rng: Random) -> list[str]:
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
    """Tokens of prompts and answers. spread: both are chosen evenly from (1 ± spread) times what is given.

    prefix_tokens: that come before, one of num_prefixes fixed texts.
    """

    prompt_tokens: int = 64
    output_tokens: int = 128
    spread: float = 0.0
    prefix_tokens: int = 0
    num_prefixes: int = 1

    def sample(self, rng: Random) -> tuple[int, int]:
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
            vocabulary.sample(shared, Random(f"{self._words_seed} prefix {number}"))
            for number in range(lengths.num_prefixes)
        ]

    def make(self, number: int) -> Prompt:
        """The prompt with this number, from 0: the same at every call, and unlike any other."""
        rng = Random(f"{self._seed} {number}")
        prompt_tokens, output_tokens = self._lengths.sample(rng)
        total = prompt_tokens + self._lengths.prefix_tokens
        prefix = rng.choice(self._prefixes)
        costs = self._vocabulary.costs
        own = total - self._vocabulary.overhead - sum(costs[word] for word in prefix)
        words = self._vocabulary.sample(own, Random(f"{self._words_seed} {number}"))
        return Prompt(join_words([*prefix, *words]), total, output_tokens)


class DatasetPrompts:
    """The rows of a file in their order, again and again, each asked for the same number of tokens.

    A conversation is sent up to the last message that is not the assistant's.
    """

    def __init__(self, path: Path, endpoint: str, output_tokens: int) -> None:
        self._output_tokens = output_tokens
        self._rows: list[str | Messages] = []
        for number, content in _read_rows(path):
            if endpoint == "completions" and not isinstance(content, str):
                raise ConfigError(
                    f"{path}, line {number}: a conversation cannot be sent to completions; use --endpoint chat"
                )
            self._rows.append(content)
        if not self._rows:
            raise ConfigError(f"{path} has no rows; {_SHAPES}")

    def __len__(self) -> int:
        return len(self._rows)

    def make(self, number: int) -> Prompt:
        """The prompt of the request with this number, from 0."""
        return Prompt(self._rows[number % len(self._rows)], 0, self._output_tokens)


def _read_rows(path: Path) -> Iterator[tuple[int, str | Messages]]:
    """Line numbers and contents. Raises ConfigError with the number of a line that is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _read_row(line, f"{path}, line {number}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a file of JSON lines") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8; name a file of JSON lines") from None


def _read_row(line: str, where: str) -> str | Messages:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        if line.lstrip().startswith("["):
            raise ConfigError(
                f"{where}: begins a list; write its rows a line each, as `jq -c '.[]'` does"
            ) from None
        raise ConfigError(f"{where}: is not JSON; {_SHAPES}") from None
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: is no JSON object; {_SHAPES}")
    if "prompt" in row:
        return _text(row["prompt"], "prompt", where)
    if "messages" in row:
        return _read_messages(row["messages"], "role", "content", where)
    if "conversations" in row:
        return _read_messages(row["conversations"], "from", "value", where)
    raise ConfigError(f"{where}: has neither prompt, messages nor conversations; {_SHAPES}")


def _read_messages(entries: Any, role_key: str, text_key: str, where: str) -> Messages:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigError(f"{where}: its messages are no list; {_SHAPES}")
    messages = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where}: a message is no JSON object; {_SHAPES}")
        role = _ROLES.get(str(entry.get(role_key)), entry.get(role_key))
        if role not in _KNOWN_ROLES:
            raise ConfigError(
                f"{where}: {role_key} is {json.dumps(role)[:40]}; known are {', '.join((*_KNOWN_ROLES, *_ROLES))}"
            )
        messages.append({"role": str(role), "content": _text(entry.get(text_key), text_key, where)})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise ConfigError(f"{where}: nobody asks anything in it; a conversation needs a message of the user")
    return messages


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where}: {name} must be a text, and not empty")
    if not is_unicode(value):  # JSON can write it, but no request can hold it
        raise ConfigError(
            f"{where}: {name} holds half of a pair like \\ud83d\\ude00; mend it or leave the line out"
        )
    return value


class TokenPrompts:
    """Random ordinary tokens of the model in `folder`, as ids. Raises ConfigError without its config.json.

    Special tokens are left out, and ids that stand for no token, which follow the special ones at the end.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            size = int(config["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{folder} is no Hugging Face folder ({error}); peers want one, with a config.json"
            ) from None
        added = _added_ids(folder)
        margin = min(_MARGIN, size // 4)
        end = min((each for each in added if each >= size // 2), default=size)
        ordinary = [each for each in range(margin, min(end, size - margin)) if each not in added]
        self._ids, self._seed = ordinary or list(range(size)), seed

    def make(self, batch: int, num_tokens: int, turn: int) -> list[list[int]]:
        """`batch` prompts: the same for every engine in this turn."""
        rng = Random(f"{self._seed} {batch} {num_tokens} {turn}")
        return [rng.choices(self._ids, k=num_tokens) for _ in range(batch)]


def _added_ids(folder: Path) -> set[int]:
    """Of tokens that the tokenizer holds beside its model, special ones above all; empty where it does not tell."""
    try:
        tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        return {int(token["id"]) for token in tokens}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def is_unicode(text: str) -> bool:
    """Whether a request can hold `text`: neither bytes of a command line that are no UTF-8, nor halves of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

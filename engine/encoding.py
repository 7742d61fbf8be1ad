"""From text to token ids, in bounded time and memory, without the interpreter's lock.

`Tokenizer.encode` holds the lock for as long as it takes (a second for a megabyte of digits), `encode_batch` lets it
go; both keep a few hundred bytes a token until they are done.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from sleb.errors import RequestError

SHORT_TEXT = 4096  # characters, which take about a millisecond: not worth a thread
MAX_TOKENS = 2**16  # of one text; or twice the context, if that is more
_PIECE = 2**14  # characters
# A run of spaces is one word, which takes a hundred bytes a character, and few tokens.
_LONG_TEXT = 2**18  # characters
_MOST_PER_TOKEN = 16  # characters, on average


def encode_text(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_tokens: int = MAX_TOKENS
) -> list[int]:
    """The token ids of `text`.

    Raises RequestError context_length_exceeded for a text of more than about `max_tokens`: its pieces are counted
    first. Cut anywhere, a text has a few tokens more at each cut, so what is refused is far above the bound or near it.
    """
    if len(text) <= SHORT_TEXT:
        return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    if len(text) > max_tokens:
        _check_pieces(tokenizer, text, max_tokens)
    [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


def _check_pieces(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    num_tokens = 0
    for start in range(0, len(text), _PIECE):
        [piece] = tokenizer.encode_batch_fast([text[start : start + _PIECE]], add_special_tokens=False)
        num_tokens += len(piece)
        if num_tokens > max_tokens:
            raise too_long(f"the text has more than {max_tokens} tokens, the most that is taken at once")
        if start > max(_LONG_TEXT, _MOST_PER_TOKEN * num_tokens):
            raise too_long(f"the text repeats itself: {start} characters make only {num_tokens} tokens")


def too_long(message: str) -> RequestError:
    """The error of a text that is not computed because of its length."""
    return RequestError(f"{message}; shorten it", param="prompt", code="context_length_exceeded")


def longest_token(tokenizer: Tokenizer | None) -> int:
    """Characters of text that one token can stand for, at most; of a model without a tokenizer, none."""
    return 0 if tokenizer is None else max(map(len, tokenizer.get_vocab()), default=0)

"""Marks in an answer that may be special tokens, which a decoder leaves out and a grammar must name."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sleb.server.message.reasoning import END_THINK

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def literal(text: str, tokenizer: Tokenizer | None) -> str:
    """`text` as an expression of Lark: a special token by its number, anything else letter by letter."""
    token_id = special_token_id(text, tokenizer)
    return json.dumps(text, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"


def special_token_id(text: str, tokenizer: Tokenizer | None) -> int | None:
    """The id of `text` if it is a special token, which a decoder may leave out."""
    token_id = None if tokenizer is None else tokenizer.token_to_id(text)
    if tokenizer is None or token_id is None:
        return None
    added = tokenizer.get_added_tokens_decoder().get(token_id)
    return token_id if added is not None and added.special else None


def text_up_to(
    rule: str, mark: str, tokenizer: Tokenizer | None, pattern: str = r"/(.|\n)*/"
) -> tuple[str, list[str]]:
    """An expression of Lark for any text and `mark` behind it, and the rules that it takes."""
    end = literal(mark, tokenizer)
    if special_token_id(mark, tokenizer) is None:  # a lexer would take plain text to have no end
        return rule, [f"{rule}[suffix={end}]: {pattern}"]
    return f"{rule} {end}", [f"{rule}: {pattern}"]


def thought_rules(tokenizer: Tokenizer | None, end: str = END_THINK) -> str:
    """Rules of Lark for thoughts up to their end, as `before`; then up to two line ends."""
    thoughts, rules = text_up_to("thoughts", end, tokenizer)
    return "\n".join([f"before: {thoughts} gap", *rules, r"gap: /\n{0,2}/"])

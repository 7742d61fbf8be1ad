"""Log-probabilities of tokens in the two shapes that OpenAI gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sleb.engine.outputs import TokenLogprobs
from sleb.server.answer.token_text import TokenTexts

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)


def chat_logprobs(
    tokens: Sequence[TokenLogprobs], num_top: int, texts: TokenTexts
) -> dict[str, list[Any] | None]:
    """`choice.logprobs` of a chat answer: an entry a token, each with its `num_top` most probable alternatives."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = texts.utf8(token_id)
        return {"token": texts.string(token_id), "logprob": _number(logprob), "bytes": list(data)}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*top) for top in token.top[:num_top]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    tokens: Sequence[TokenLogprobs | None], num_top: int, texts: TokenTexts
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id the `num_top` most probable and the prompt's own; null for the first token.

    `rank` counts from 1; null for a token of the prompt that is none of the most probable.
    """

    def by_id(token: TokenLogprobs) -> dict[str, Any]:
        ranked = [*enumerate(token.top[:num_top], 1), (None, (token.token_id, token.logprob))]
        entries: dict[str, Any] = {}
        for rank, (token_id, logprob) in ranked:
            entry = {"logprob": _number(logprob), "rank": rank, "decoded_token": texts.string(token_id)}
            entries.setdefault(str(token_id), entry)
        return entries

    return [None if token is None else by_id(token) for token in tokens]


def completion_logprobs(
    token_ids: Sequence[int],
    tokens: Sequence[TokenLogprobs | None],
    num_top: int,
    texts: TokenTexts,
    offsets: list[int],
) -> dict[str, list[Any] | None]:
    """`choice.logprobs` of a completion: parallel lists over `token_ids`, null for a token without a probability.

    top_logprobs holds the `num_top` most probable tokens and the token itself, with the same float.
    """
    top: list[dict[str, float] | None] = []
    for token in tokens:
        if token is None:
            top.append(None)
            continue
        found = {texts.string(token_id): _number(logprob) for token_id, logprob in token.top[:num_top]}
        top.append(found | {texts.string(token.token_id): _number(token.logprob)})
    return {
        "tokens": [texts.string(token_id) for token_id in token_ids],
        "token_logprobs": [None if token is None else _number(token.logprob) for token in tokens],
        "top_logprobs": top,
        "text_offset": offsets,
    }

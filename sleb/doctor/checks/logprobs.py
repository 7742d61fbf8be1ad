"""Log-probabilities of answers and of prompts."""

from __future__ import annotations

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect, skip
from sleb.doctor.target import GREEDY, PROMPT, Json, Target, shown

GROUP = Group("logprobs")

_SAME = 1e-6  # the same number in two places of one answer
_CLOSE = 0.15  # the same number computed twice, in bfloat16


@GROUP.required
def chat_tells_every_token(target: Target) -> None:
    """logprobs true gives an entry a token: token, logprob of at most 0, bytes. Source: OpenAI API."""
    answer = target.chat(logprobs=True, **GREEDY)
    content, tokens = _content(answer), answer["usage"]["completion_tokens"]
    # Servers differ in whether the token that ends an answer has an entry.
    expect(tokens - 1 <= len(content) <= tokens, f"{len(content)} entries for {tokens} tokens")
    for entry in content:
        expect(isinstance(entry["token"], str), f"token is {shown(entry['token'])}")
        expect(-1e5 < entry["logprob"] <= 1e-4, f"logprob is {shown(entry['logprob'])}")
        expect(entry["bytes"] is None or all(0 <= b < 256 for b in entry["bytes"]), "bytes are no bytes")


@GROUP.required
def chat_bytes_are_the_text(target: Target) -> None:
    """The joined bytes of the entries are the answer's text. Source: OpenAI API."""
    answer = target.chat(logprobs=True, **GREEDY)
    joined = b"".join(bytes(entry["bytes"] or ()) for entry in _content(answer)).decode("utf-8", "replace")
    text = (answer["choices"][0]["message"].get("content") or "").rstrip("\ufffd").strip()
    expect(text in joined, f"the bytes say {shown(joined)}, the text is {shown(text)}")


@GROUP.required
def chat_tells_alternatives(target: Target) -> None:
    """top_logprobs 3 gives three, falling; a greedy token is the first, with the same number. Source: OpenAI API."""
    for entry in _content(target.chat(logprobs=True, top_logprobs=3, **GREEDY)):
        top = entry["top_logprobs"]
        expect(len(top) == 3, f"there are {len(top)} alternatives")
        values = [each["logprob"] for each in top]
        expect(values == sorted(values, reverse=True), f"the numbers are {values}")
        same = abs(values[0] - entry["logprob"]) < _SAME
        expect(same, f"the greedy token has {entry['logprob']}, the first alternative {values[0]}")


def _content(answer: Json) -> list[Json]:
    content = list(answer["choices"][0]["logprobs"]["content"])
    if not content:
        skip("the answer has no token")
    return content


@GROUP.required
def completions_tell_parallel_lists(target: Target) -> None:
    """logprobs N gives tokens, token_logprobs, top_logprobs and text_offset, an entry a token. Source: OpenAI API."""
    answer = target.complete(logprobs=2, **GREEDY)
    logprobs, tokens = answer["choices"][0]["logprobs"], answer["usage"]["completion_tokens"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        number = len(logprobs[name])
        expect(tokens - 1 <= number <= tokens, f"{name} has {number} entries for {tokens} tokens")
    offsets = logprobs["text_offset"]
    expect(offsets == sorted(offsets), f"text_offset is {shown(offsets)}")


@GROUP.required
def alternatives_hold_the_token(target: Target) -> None:
    """top_logprobs[i] has N or N + 1 tokens, the chosen one with the same number among them. Source: OpenAI API."""
    answer = target.complete(logprobs=2, temperature=1, seed=3, max_tokens=16)
    logprobs = answer["choices"][0]["logprobs"]
    lists = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
    for token, logprob, top in zip(*lists, strict=True):
        expect(1 <= len(top) <= 3, f"there are {len(top)} alternatives for 2")
        expect(token in top, f"{shown(token)} is not among {shown(list(top))}")
        expect(
            abs(top[token] - logprob) < _SAME, f"{shown(token)} has {logprob}, and {top[token]} in the list"
        )


@GROUP.required
def echo_covers_the_prompt(target: Target) -> None:
    """With echo the lists cover prompt and answer, and the first token has no number. Source: OpenAI API, lm-eval."""
    answer = target.complete(echo=True, logprobs=1, temperature=0, max_tokens=4)
    values, usage = answer["choices"][0]["logprobs"]["token_logprobs"], answer["usage"]
    expect(values[0] is None, f"the first number is {values[0]}")
    expect(None not in values[1:], "a later number is null")
    expect(
        usage["total_tokens"] - 1 <= len(values) <= usage["total_tokens"],
        f"there are {len(values)} numbers for {usage['total_tokens']} tokens",
    )


@GROUP.required
def a_prompt_can_be_scored_alone(target: Target) -> None:
    """echo with logprobs and max_tokens 0 scores the prompt and generates nothing. Source: vLLM, lm-eval."""
    answer = target.complete(echo=True, logprobs=1, temperature=0, max_tokens=0)
    [choice], usage = answer["choices"], answer["usage"]
    expect(choice["text"] == PROMPT, f"the text is {shown(choice['text'])}")
    number = len(choice["logprobs"]["tokens"])
    expect(number == usage["prompt_tokens"], f"{number} tokens of {usage['prompt_tokens']}")


@GROUP.required
def offsets_point_into_the_text(target: Target) -> None:
    """text_offset is where each token begins in the echoed text. Source: OpenAI API (legacy), lm-eval."""
    choice = target.complete(echo=True, logprobs=1, temperature=0, max_tokens=4)["choices"][0]
    logprobs, text = choice["logprobs"], choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if token.isascii() and token.strip().isalpha() and offset < len(PROMPT):
            found = text[offset : offset + len(token)]
            expect(found.strip() == token.strip(), f"token {shown(token)} is said to be at {shown(found)}")


@GROUP.sleb_only
def scoring_agrees_with_generating(target: Target) -> None:
    """Scoring prompt and answer gives the numbers that the tokens had when generated. Source: sleb, lm-eval."""
    first = target.complete(logprobs=0, return_token_ids=True, temperature=0, max_tokens=6)["choices"][0]
    token_ids = first["token_ids"]
    scored = target.complete(first["prompt_token_ids"] + token_ids, echo=True, logprobs=0, max_tokens=0)
    again = scored["choices"][0]["logprobs"]["token_logprobs"][-len(token_ids) :]
    for generated, value in zip(first["logprobs"]["token_logprobs"], again, strict=False):
        expect(abs(generated - value) < _CLOSE, f"{generated} when generated is {value} when scored")

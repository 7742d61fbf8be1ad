"""The tokenizer's endpoints, by which lm-eval needs no tokenizer of its own."""

from __future__ import annotations

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect
from sleb.doctor.target import PROMPT, Json, Target, ok, shown

GROUP = Group("tokenizer")

_TEXT = "Grüße, 世界 🌍! 1 + 1"


def _tokenize(target: Target, **fields: object) -> Json:
    return ok(target.post(f"{target.root}/tokenize", **fields))


@GROUP.sleb_only
def a_text_is_tokenized(target: Target) -> None:
    """POST /tokenize gives tokens, their count and max_model_len. Source: vLLM, sleb."""
    answer = _tokenize(target, prompt=_TEXT)
    tokens = answer["tokens"]
    expect(tokens and all(type(token) is int for token in tokens), f"tokens are {shown(tokens)}")
    expect(answer["count"] == len(tokens), f"count is {answer['count']} of {len(tokens)} tokens")
    expect(answer["max_model_len"] > 0, f"max_model_len is {answer['max_model_len']}")


@GROUP.sleb_only
def tokens_become_the_text_again(target: Target) -> None:
    """POST /detokenize gives back the text of POST /tokenize. Source: vLLM, sleb."""
    tokens = _tokenize(target, prompt=_TEXT, add_special_tokens=False)["tokens"]
    text = ok(target.post(f"{target.root}/detokenize", tokens=tokens))["prompt"]
    expect(text == _TEXT, f"{shown(_TEXT)} became {shown(text)}")


@GROUP.sleb_only
def messages_are_tokenized(target: Target) -> None:
    """POST /tokenize with messages counts the prompt of a chat. Source: vLLM, sleb."""
    messages = [{"role": "user", "content": PROMPT}]
    count = _tokenize(target, messages=messages)["count"]
    number = target.chat(messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
    expect(count == number, f"count is {count}, a chat's prompt has {number}")


@GROUP.sleb_only
def counts_agree_with_usage(target: Target) -> None:
    """The count of a text is the number of prompt_tokens of a completion. Source: vLLM, sleb."""
    count = _tokenize(target, prompt=PROMPT)["count"]
    number = target.complete(max_tokens=1)["usage"]["prompt_tokens"]
    expect(count == number, f"count is {count}, a completion's prompt has {number}")


@GROUP.sleb_only
def the_tokenizer_is_told(target: Target) -> None:
    """GET /tokenizer_info is a JSON object. Source: vLLM, sleb."""
    expect(ok(target.get_root("/tokenizer_info")), "it is empty")

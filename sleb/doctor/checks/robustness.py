"""Inputs that servers have been seen to break on."""

from __future__ import annotations

from typing import Any

import httpx

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect
from sleb.doctor.target import CHAT, COMPLETIONS, PROMPT, Target, ok, shown

GROUP = Group("robustness")

_UNICODE = "Grüße, 世界 🌍 👩‍👩‍👧 e\u0301 \u202eabc\u202c \u200b ﷽ 𝔘𝔫𝔦"


def _no_crash(response: httpx.Response, statuses: tuple[int, ...] = (200, 400)) -> None:
    status = response.status_code
    expect(status in statuses, f"HTTP {status}: {shown(response.text)}")


def _raw(target: Target, content: bytes) -> httpx.Response:
    return target.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})


@GROUP.required
def unicode_comes_back_whole(target: Target) -> None:
    """A prompt of many scripts, emoji and combining marks is echoed as it was. Source: OpenAI API."""
    text = target.complete(_UNICODE, echo=True, max_tokens=1)["choices"][0]["text"]
    expect(text.startswith(_UNICODE), f"it came back as {shown(text)}")


@GROUP.required
def an_empty_content_is_no_crash(target: Target) -> None:
    """content "" is served or refused with 400. Source: OpenAI API."""
    for messages in ([{"role": "user", "content": ""}], [{"role": "user", "content": []}]):
        _no_crash(target.post(CHAT, messages=messages, max_tokens=1))


@GROUP.required
def an_empty_prompt_is_no_crash(target: Target) -> None:
    """prompt "" and [] are served or refused with 400. Source: OpenAI API."""
    prompts: list[Any] = ["", [], [""], [[]]]
    for prompt in prompts:
        _no_crash(target.post(COMPLETIONS, prompt=prompt, max_tokens=1))


@GROUP.sleb_only
def huge_max_tokens_are_clamped(target: Target) -> None:
    """max_tokens of a thousand million is cut to the context, not refused. Source: sleb, llama.cpp."""
    with target.open_stream(max_tokens=10**9, temperature=0) as chunks:
        first = next(chunks, None)
    expect(first is not None and "error" not in first, f"the first chunk is {shown(first)}")


@GROUP.sleb_only
def unknown_fields_are_ignored(target: Target) -> None:
    """Fields that no server knows are ignored: clients send what others understand. Source: vLLM, llama.cpp, sleb."""
    target.chat(max_tokens=1, no_such_field={"a": [1]}, safe_prompt=True)


@GROUP.required
def user_and_metadata_are_accepted(target: Target) -> None:
    """user, metadata and store are no reason to refuse. Source: OpenAI API."""
    target.chat(max_tokens=1, user="someone", metadata={"purpose": "check"}, store=False)


@GROUP.required
def special_tokens_in_text_are_no_crash(target: Target) -> None:
    """A user's text may hold the names of special tokens. Source: OpenAI API."""
    text = "<|im_end|><|im_start|>system\n</s><s>[INST]<|eot_id|><|endoftext|>"
    ok(target.post(CHAT, messages=[{"role": "user", "content": text}], max_tokens=1))


@GROUP.required
def control_characters_are_no_crash(target: Target) -> None:
    """NUL and other control characters are served or refused with 400. Source: OpenAI API."""
    _no_crash(target.post(COMPLETIONS, prompt="a\x00b\x1b[31m\x7f", max_tokens=1))


@GROUP.required
def half_a_surrogate_is_no_crash(target: Target) -> None:
    """The JSON escape of half a surrogate pair is served or refused with 400. Source: RFC 8259, section 8.2."""
    _no_crash(_raw(target, rb'{"messages": [{"role": "user", "content": "\ud800"}], "max_tokens": 1}'))


@GROUP.required
def invalid_utf_8_is_400(target: Target) -> None:
    """A body that is not UTF-8 is refused with 400. Source: RFC 8259, section 8.1."""
    body = b'{"messages": [{"role": "user", "content": "\xff\xfe"}], "max_tokens": 1}'
    target.refused(_raw(target, body), 400)


@GROUP.required
def deep_nesting_is_no_crash(target: Target) -> None:
    """A thousand brackets are refused with 400. Source: RFC 8259, section 9."""
    _no_crash(_raw(target, b'{"messages": ' + b"[" * 1000 + b"]" * 1000 + b"}"), (400,))


@GROUP.required
def not_a_number_is_400(target: Target) -> None:
    """temperature NaN, which is no JSON, is refused with 400. Source: RFC 8259, section 6."""
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": NaN}'
    target.refused(_raw(target, body), 400)


@GROUP.required
def huge_integers_are_no_crash(target: Target) -> None:
    """A seed of 2**70 and token ids beyond the vocabulary are served or refused with 400. Source: OpenAI API."""
    messages = [{"role": "user", "content": "Hi"}]
    _no_crash(target.post(CHAT, messages=messages, max_tokens=1, seed=2**70))
    target.refused(target.post(COMPLETIONS, prompt=[10**9], max_tokens=1), 400)
    target.refused(target.post(COMPLETIONS, prompt=[-1], max_tokens=1), 400)


@GROUP.required
def the_server_still_answers(target: Target) -> None:
    """After all this a completion is served. Source: OpenAI API."""
    expect(target.complete(PROMPT, max_tokens=1)["usage"]["completion_tokens"] <= 1, "the answer is too long")

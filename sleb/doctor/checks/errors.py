"""Requests that must be refused, and how."""

from __future__ import annotations

from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect, skip
from sleb.doctor.target import CHAT, COMPLETIONS, Json, Target, ok, shown

GROUP = Group("errors")

_MESSAGES = [{"role": "user", "content": "Hello!"}]
_MOST_WORDS = 4_000_000  # of a prompt that is sent only to be refused


def _refuse_chat(target: Target, **fields: Any) -> Json:
    body = {"messages": _MESSAGES, "max_tokens": 4} | fields
    return target.refused(target.post(CHAT, **body), 400)


def _refuse_raw(target: Target, content: bytes) -> Json:
    headers = {"Content-Type": "application/json"}
    return target.refused(target.http.post(CHAT, content=content, headers=headers), 400)


@GROUP.required
def broken_json_is_400(target: Target) -> None:
    """A body that is no JSON is 400 with an error body. Source: OpenAI API."""
    _refuse_raw(target, b'{"messages": [')


@GROUP.required
def a_list_is_400(target: Target) -> None:
    """A body that is JSON but no object is 400. Source: OpenAI API."""
    _refuse_raw(target, b"[1, 2]")


@GROUP.required
def missing_messages_are_400(target: Target) -> None:
    """A chat without messages is 400. Source: OpenAI API (required field)."""
    target.refused(target.post(CHAT, max_tokens=4), 400)


@GROUP.required
def empty_messages_are_400(target: Target) -> None:
    """A chat with an empty list of messages is 400. Source: OpenAI API (at least one)."""
    _refuse_chat(target, messages=[])


@GROUP.required
def messages_of_a_wrong_type_are_400(target: Target) -> None:
    """messages as a string, or with a string in it, is 400. Source: OpenAI API."""
    _refuse_chat(target, messages="Hello!")
    _refuse_chat(target, messages=["Hello!"])


@GROUP.required
def a_role_of_a_wrong_type_is_400(target: Target) -> None:
    """A message without a role, or with a number for one, is 400. Source: OpenAI API."""
    _refuse_chat(target, messages=[{"content": "Hello!"}])
    _refuse_chat(target, messages=[{"role": 1, "content": "Hello!"}])


@GROUP.required
def fields_of_a_wrong_type_are_400(target: Target) -> None:
    """temperature "hot", max_tokens "many", stop 5 and stream "maybe" are 400. Source: OpenAI API."""
    wrong: Json = {"temperature": "hot", "max_tokens": "many", "stop": 5, "stream": "maybe"}
    for name, value in wrong.items():
        _refuse_chat(target, **{name: value})


@GROUP.required
def a_prompt_of_a_wrong_type_is_400(target: Target) -> None:
    """A prompt that is an object, or a list of mixed types, is 400. Source: OpenAI API."""
    for prompt in ({"text": "Hello!"}, ["Hello!", 5]):
        target.refused(target.post(COMPLETIONS, prompt=prompt, max_tokens=4), 400)


@GROUP.required
def numbers_out_of_range_are_400(target: Target) -> None:
    """temperature -1, top_p 1.5, n 0, penalties of 5, max_tokens -2 are 400. Source: OpenAI API."""
    wrong: Json = {"temperature": -1, "top_p": 1.5, "n": 0, "presence_penalty": 5, "max_tokens": -2}
    for name, value in wrong.items():
        _refuse_chat(target, **{name: value})


@GROUP.required
def too_many_alternatives_are_400(target: Target) -> None:
    """top_logprobs 21 is 400; at most 20 are allowed. Source: OpenAI API."""
    _refuse_chat(target, logprobs=True, top_logprobs=21)


@GROUP.required
def a_bias_out_of_range_is_400(target: Target) -> None:
    """A logit_bias of 101, or for a token that is no number, is 400. Source: OpenAI API."""
    _refuse_chat(target, logit_bias={"42": 101})
    _refuse_chat(target, logit_bias={"word": 1})


@GROUP.required
def an_unknown_model_is_404(target: Target) -> None:
    """A model that does not exist is 404 with code model_not_found. Source: OpenAI API."""
    response = target.post(CHAT, messages=_MESSAGES, max_tokens=4, model="no-such-model")
    error = target.refused(response, 404)
    expect(error.get("code") in ("model_not_found", 404), f"code is {shown(error.get('code'))}")


def _long_prompt(target: Target) -> tuple[str, int]:
    length = target.max_model_len
    if length > _MOST_WORDS:
        skip(f"a prompt beyond {length} tokens would be too large")
    return "word " * (length + 100), length


@GROUP.required
def a_prompt_beyond_the_context_is_400(target: Target) -> None:
    """A prompt longer than the context is 400 with code context_length_exceeded. Source: OpenAI API."""
    prompt, _ = _long_prompt(target)
    error = target.refused(target.post(COMPLETIONS, prompt=prompt, max_tokens=1), 400)
    expect(error.get("code") in ("context_length_exceeded", 400), f"code is {shown(error.get('code'))}")


@GROUP.required
def a_stream_is_refused_before_it_starts(target: Target) -> None:
    """A prompt beyond the context is 400, no stream with an error in it. Source: OpenAI API."""
    prompt, _ = _long_prompt(target)
    messages = [{"role": "user", "content": prompt}]
    target.refused(target.post(CHAT, messages=messages, max_tokens=1, stream=True), 400)


@GROUP.sleb_only
def the_message_tells_both_lengths(target: Target) -> None:
    """The refusal of a long prompt names the context's length. Source: vLLM, sleb."""
    prompt, length = _long_prompt(target)
    message = target.refused(target.post(COMPLETIONS, prompt=prompt, max_tokens=1), 400)["message"]
    expect(str(length) in message.replace(",", ""), f"the message is {shown(message)}")


@GROUP.required
def a_wrong_key_is_401(target: Target) -> None:
    """Where keys are asked for, a wrong one and none are 401. Source: OpenAI API."""
    wrong = {"Authorization": "Bearer surely-not-the-key"}
    response = target.http.get("models", headers=wrong)
    if response.status_code == 200:
        skip("the server asks for no key")
    error = target.refused(response, 401)
    expect(error.get("code") in ("invalid_api_key", 401, None), f"code is {shown(error.get('code'))}")
    body = target.fields(messages=_MESSAGES, max_tokens=1)
    target.refused(target.http.post(CHAT, json=body, headers=wrong), 401)
    target.refused(target.http.post(CHAT, json=body, headers={"Authorization": ""}), 401)


@GROUP.sleb_only
def any_key_opens_an_open_server(target: Target) -> None:
    """Where no key is asked for, an empty one is fine. Source: sleb, vLLM."""
    if target.http.get("models", headers={"Authorization": ""}).status_code != 200:
        skip("the server asks for a key")
    for value in ("Bearer", "Bearer none"):
        ok(target.http.get("models", headers={"Authorization": value}))


@GROUP.sleb_only
def an_error_has_all_its_fields(target: Target) -> None:
    """error has message, type, param and code, code a string or null, param the field. Source: OpenAI API, sleb."""
    error = _refuse_chat(target, temperature=-1)
    for name in ("message", "type", "param", "code"):
        expect(name in error, f"{name} is missing")
        expect(isinstance(error[name], str | None), f"{name} is {shown(error[name])}")
    expect(error["param"] == "temperature", f"param is {shown(error['param'])}")


@GROUP.sleb_only
def an_unknown_path_has_an_error_body(target: Target) -> None:
    """A path that does not exist is 404 with the same body as other errors. Source: sleb."""
    target.refused(target.http.get("no/such/path"), 404)


@GROUP.sleb_only
def a_wrong_method_is_405(target: Target) -> None:
    """GET of the chat's path is 405 with the same body as other errors. Source: sleb."""
    target.refused(target.http.get(CHAT), 405)


@GROUP.sleb_only
def a_refused_input_is_not_repeated(target: Target) -> None:
    """A bad value of 100 kB comes back in an answer of at most 8 kB. Source: sleb."""
    response = target.post(CHAT, messages=_MESSAGES, temperature="x" * 100_000)
    target.refused(response, 400)
    expect(len(response.content) <= 8192, f"the answer has {len(response.content)} bytes")


@GROUP.sleb_only
def embeddings_are_refused_clearly(target: Target) -> None:
    """POST /embeddings of a server without them is 501. Source: sleb."""
    response = target.post("embeddings", input="Hello!")
    if response.status_code != 200:
        target.refused(response, 501)

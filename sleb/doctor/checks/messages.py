"""Anthropic's Messages, /messages: whole answers, their events, tools and errors."""

from __future__ import annotations

import json
from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.checks.tools import PARAMETERS, expect_call
from sleb.doctor.outcome import expect, skip
from sleb.doctor.target import GREEDY, QUESTION, Json, Target, ok, read_events, shown

GROUP = Group("messages", further=True)

MESSAGES = "messages"
STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal")
_TOOL: Json = {"name": "get_weather", "description": "The weather in a city.", "input_schema": PARAMETERS}
_CALL: Json = {"tools": [_TOOL], "tool_choice": {"type": "any"}, "temperature": 0, "max_tokens": 200}
_WEATHER = "What is the weather in Paris?"


def _create(target: Target, content: Any = QUESTION, **fields: Any) -> Json:
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    return ok(target.post(MESSAGES, messages=messages, **fields))


def _text(message: Json) -> str:
    return "".join(block["text"] for block in message["content"] if block["type"] == "text")


def _input_tokens(usage: Json) -> int:
    """All of the prompt's: Anthropic counts those that were cached apart."""
    names = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return sum(usage.get(name) or 0 for name in names)


def _stream(target: Target, content: Any = QUESTION, **fields: Any) -> list[Json]:
    """The events but for pings; each has the type that its line `event:` names."""
    messages = [{"role": "user", "content": content}]
    events = read_events(target.post(MESSAGES, messages=messages, stream=True, **fields))
    for name, event in events:
        expect(name == event["type"], f"the event {shown(name)} has type {shown(event['type'])}")
    return [event for _, event in events if event["type"] != "ping"]


@GROUP.required
def a_message_has_its_shape(target: Target) -> None:
    """id, type "message", role, model, content blocks, stop_reason and usage. Source: Anthropic API."""
    message = _create(target, **GREEDY)
    expect(isinstance(message["id"], str) and message["id"], f"id is {shown(message['id'])}")
    expect(message["type"] == "message", f"type is {shown(message['type'])}")
    expect(message["role"] == "assistant", f"role is {shown(message['role'])}")
    expect(isinstance(message["model"], str), f"model is {shown(message['model'])}")
    expect(message["stop_reason"] in STOP_REASONS, f"stop_reason is {shown(message['stop_reason'])}")
    expect(message["stop_sequence"] is None, f"stop_sequence is {shown(message['stop_sequence'])}")
    for block in message["content"]:
        expect(block["type"] in ("text", "thinking"), f"a block is {shown(block)}")


@GROUP.required
def the_text_is_that_of_a_chat(target: Target) -> None:
    """A greedy message has the text and the usage of the same chat. Source: Anthropic API."""
    chat, message = target.chat(**GREEDY), _create(target, **GREEDY)
    content = chat["choices"][0]["message"].get("content") or ""
    expect(_text(message) == content, f"{shown(_text(message))}, and the chat {shown(content)}")
    own = (_input_tokens(message["usage"]), message["usage"]["output_tokens"])
    others = (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"])
    expect(own == others, f"{own} tokens of prompt and answer, and {others} of the chat")


@GROUP.required
def max_tokens_ends_a_message(target: Target) -> None:
    """max_tokens cuts, and stop_reason says so. Source: Anthropic API."""
    message = _create(target, temperature=0, max_tokens=3)
    expect(message["usage"]["output_tokens"] <= 3, f"there are {message['usage']['output_tokens']} tokens")
    if target.chat(temperature=0, max_tokens=4)["usage"]["completion_tokens"] > 3:
        expect(message["stop_reason"] == "max_tokens", f"stop_reason is {shown(message['stop_reason'])}")


@GROUP.required
def a_stop_sequence_is_told(target: Target) -> None:
    """stop_sequences end a message, and stop_sequence tells which one did. Source: Anthropic API."""
    text = _text(_create(target, **GREEDY))
    stop = target.stop_string(text)
    message = _create(target, stop_sequences=[stop], **GREEDY)
    expect(message["stop_reason"] == "stop_sequence", f"stop_reason is {shown(message['stop_reason'])}")
    expect(message["stop_sequence"] == stop, f"stop_sequence is {shown(message['stop_sequence'])}")
    expect(_text(message) == text[: text.index(stop)], f"the text is {shown(_text(message))}")


@GROUP.required
def system_is_read(target: Target) -> None:
    """system, a string or text blocks, is a system message. Source: Anthropic API."""
    words = "You are a pirate who answers in one short sentence."
    as_chat = [{"role": "system", "content": words}, {"role": "user", "content": QUESTION}]
    wanted = target.chat(messages=as_chat, max_tokens=1)["usage"]["prompt_tokens"]
    block = {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}
    for system in (words, [block]):
        found = _input_tokens(_create(target, system=system, max_tokens=1)["usage"])
        expect(found == wanted, f"the prompt has {found} tokens, that of the chat {wanted}")


@GROUP.required
def events_come_in_their_order(target: Target) -> None:
    """message_start, a block's start, deltas and stop, message_delta, message_stop. Source: Anthropic API."""
    kinds = [event["type"] for event in _stream(target, **GREEDY) if event["type"] != "content_block_delta"]
    num_blocks = kinds.count("content_block_start")  # thoughts are one of their own
    blocks = ["content_block_start", "content_block_stop"] * num_blocks
    wanted = ["message_start", *blocks, "message_delta", "message_stop"]
    expect(num_blocks and kinds == wanted, f"the events are {shown(kinds)}")


@GROUP.required
def deltas_are_the_text(target: Target) -> None:
    """Joined text_deltas are the whole message's text, and message_delta has its end. Source: Anthropic API."""
    events, whole = _stream(target, **GREEDY), _create(target, **GREEDY)
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    joined = "".join(delta["text"] for delta in deltas if delta["type"] == "text_delta")
    expect(joined == _text(whole), f"the deltas are {shown(joined)}, the text {shown(_text(whole))}")
    [end] = [event for event in events if event["type"] == "message_delta"]
    reason, number = end["delta"]["stop_reason"], end["usage"]["output_tokens"]
    expect(reason == whole["stop_reason"], f"stop_reason is {shown(reason)}")
    expect(
        number == whole["usage"]["output_tokens"], f"{number} tokens, and {whole['usage']['output_tokens']}"
    )


@GROUP.required
def a_tool_is_used(target: Target) -> None:
    """tool_choice any gives a tool_use block whose input is an object. Source: Anthropic API."""
    message = _create(target, _WEATHER, **_CALL)
    blocks = [block for block in message["content"] if block["type"] == "tool_use"]
    expect(blocks, f"there is no tool_use in {shown(message['content'])}")
    expect(message["stop_reason"] == "tool_use", f"stop_reason is {shown(message['stop_reason'])}")
    for block in blocks:
        expect(isinstance(block["id"], str) and block["id"], f"id is {shown(block['id'])}")
        expect_call(block["name"], json.dumps(block["input"]))


@GROUP.required
def a_tools_input_streams(target: Target) -> None:
    """A tool_use block starts with an empty input, and input_json_deltas tell it. Source: Anthropic API."""
    events = _stream(target, _WEATHER, **_CALL)
    starts = [each for each in events if each["type"] == "content_block_start"]
    uses = [each for each in starts if each["content_block"]["type"] == "tool_use"]
    expect(uses, f"no tool_use among {shown(starts)}")
    [first, *_] = uses
    expect(first["content_block"]["input"] == {}, f"it starts with {shown(first['content_block'])}")
    own = [
        each for each in events if each["type"] == "content_block_delta" and each["index"] == first["index"]
    ]
    joined = "".join(each["delta"]["partial_json"] for each in own)
    expect_call(first["content_block"]["name"], joined)


@GROUP.required
def a_tools_result_is_read(target: Target) -> None:
    """tool_use and tool_result blocks add to the prompt. Source: Anthropic API."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "Sunny, 21 degrees."}
    turns = [
        {"role": "user", "content": _WEATHER},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    short, long = (
        _input_tokens(_create(target, messages=messages, tools=[_TOOL], max_tokens=1)["usage"])
        for messages in (turns[:1], turns)
    )
    expect(long > short, f"the prompt has {short} tokens without the result and {long} with it")


@GROUP.required
def tokens_are_counted(target: Target) -> None:
    """/messages/count_tokens tells what usage will. Source: Anthropic API."""
    messages = [{"role": "user", "content": QUESTION}]
    counted = ok(target.post(f"{MESSAGES}/count_tokens", messages=messages))["input_tokens"]
    used = _input_tokens(_create(target, **GREEDY)["usage"])
    expect(counted == used, f"counted {shown(counted)}, used {used}")


@GROUP.required
def errors_have_their_shape(target: Target) -> None:
    """{"type": "error", "error": {"type", "message"}}, of an unknown model and a bad field. Source: Anthropic API."""
    messages = [{"role": "user", "content": QUESTION}]
    _create(target, max_tokens=1)  # not everything is refused
    unknown = target.http.post(
        MESSAGES, json={"model": "no-such-model", "messages": messages, "max_tokens": 1}
    )
    bad = target.post(MESSAGES, messages=messages, max_tokens="many")
    for response, status, kind in ((unknown, 404, "not_found_error"), (bad, 400, "invalid_request_error")):
        error = target.refused(response, status)
        expect(response.json().get("type") == "error", f"the body is {shown(response.text)}")
        expect(error.get("type") == kind, f"error.type is {shown(error.get('type'))}")


@GROUP.required
def a_key_may_come_as_x_api_key(target: Target) -> None:
    """The header x-api-key opens what a bearer opens. Source: Anthropic API."""
    if target.api_key is None:
        skip("the server is open (--api-key gives a key)")
    messages = [{"role": "user", "content": QUESTION}]
    body = target.fields(messages=messages, max_tokens=1)
    headers = {"x-api-key": target.api_key, "authorization": "", "anthropic-version": "2023-06-01"}
    ok(target.http.post(MESSAGES, json=body, headers=headers))

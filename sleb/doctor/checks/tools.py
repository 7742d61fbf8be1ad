"""Calls of tools."""

from __future__ import annotations

import json
from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.outcome import expect, fail
from sleb.doctor.target import CHAT, Json, Target, shown

GROUP = Group("tools")

QUESTION = "What is the weather in Paris?"
# Arguments of which there are few, so that any model finishes a forced call, a random one too.
PARAMETERS: Json = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "London", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def _tool(name: str, description: str) -> Json:
    function = {"name": name, "description": description, "parameters": PARAMETERS}
    return {"type": "function", "function": function}


TOOLS = [_tool("get_weather", "The weather in a city."), _tool("get_time", "The time in a city.")]
_OPTIONS: Json = {"tools": TOOLS, "temperature": 0, "max_tokens": 200}


def expect_call(name: str, arguments: str, names: tuple[str, ...] = ("get_weather", "get_time")) -> None:
    """Ends the check as failed unless it is a call of one of the functions, with arguments by PARAMETERS."""
    expect(name in names, f"the function is {shown(name)}")
    try:
        value = json.loads(arguments)
    except ValueError:
        fail(f"the arguments are no JSON: {shown(arguments)}")
    cities = PARAMETERS["properties"]["city"]["enum"]
    expect(isinstance(value, dict) and value.get("city") in cities, f"the arguments are {shown(arguments)}")


def _calls(answer: Json) -> list[Json]:
    message = answer["choices"][0]["message"]
    calls = message.get("tool_calls") or []
    expect(calls, f"there is no call in {shown(message)}")
    return list(calls)


@GROUP.required
def a_required_call_is_made(target: Target) -> None:
    """tool_choice required gives tool_calls with id, type, name and JSON arguments. Source: OpenAI API."""
    answer = target.chat(QUESTION, tool_choice="required", **_OPTIONS)
    for call in _calls(answer):
        expect(call["type"] == "function", f"type is {shown(call['type'])}")
        expect(isinstance(call["id"], str) and call["id"], f"id is {shown(call['id'])}")
        expect_call(call["function"]["name"], call["function"]["arguments"])
    reason = answer["choices"][0]["finish_reason"]
    expect(reason in ("tool_calls", "stop"), f"finish_reason is {shown(reason)}")


@GROUP.required
def a_named_call_is_made(target: Target) -> None:
    """tool_choice with a name gives a call of that function. Source: OpenAI API."""
    for name in ("get_time", "get_weather"):
        choice = {"type": "function", "function": {"name": name}}
        [call, *_] = _calls(target.chat(QUESTION, tool_choice=choice, **_OPTIONS))
        expect_call(call["function"]["name"], call["function"]["arguments"], (name,))


@GROUP.required
def auto_answers_or_calls(target: Target) -> None:
    """tool_choice auto gives a text, or calls with arguments. Source: OpenAI API."""
    [choice] = target.chat(QUESTION, tool_choice="auto", **_OPTIONS)["choices"]
    message = choice["message"]
    has_text = any(message.get(name) for name in ("content", "reasoning_content", "reasoning"))
    expect(has_text or message.get("tool_calls"), f"the message is {shown(message)}")
    for call in message.get("tool_calls") or ():
        expect(isinstance(call["function"]["arguments"], str), "the arguments are no string")
        expect(choice["finish_reason"] == "tool_calls", f"finish_reason is {shown(choice['finish_reason'])}")


@GROUP.required
def none_calls_nothing(target: Target) -> None:
    """tool_choice none gives a text and no call. Source: OpenAI API."""
    message = target.chat(QUESTION, tool_choice="none", **_OPTIONS)["choices"][0]["message"]
    expect(not message.get("tool_calls"), f"the message is {shown(message)}")
    expect(isinstance(message["content"], str), f"content is {shown(message['content'])}")


@GROUP.sleb_only
def no_tools_are_no_tools(target: Target) -> None:
    """tools [] means the same as no tools. Source: sleb, llama.cpp."""
    options: Json = {"temperature": 0, "max_tokens": 16}
    plain = target.chat(QUESTION, **options)["choices"][0]["message"]["content"]
    empty = target.chat(QUESTION, tools=[], **options)["choices"][0]["message"]["content"]
    expect(plain == empty, f"without tools the answer is {shown(plain)}, with [] {shown(empty)}")


@GROUP.required
def a_call_streams(target: Target) -> None:
    """A stream tells index, id and name of a call first and its arguments in pieces. Source: OpenAI API."""
    stream = target.stream_chat(QUESTION, tool_choice="required", **_OPTIONS)
    deltas: list[Any] = [d for c in stream.choices for d in c["delta"].get("tool_calls") or ()]
    own = [delta for delta in deltas if delta["index"] == 0]
    expect(own, "no delta has a call")
    expect(own[0].get("id") and own[0]["function"].get("name"), f"the first delta is {shown(own[0])}")
    names = [delta["function"]["name"] for delta in own if (delta.get("function") or {}).get("name")]
    expect(len(names) == 1, f"the name comes {len(names)} times")
    expect_call(names[0], "".join((d.get("function") or {}).get("arguments") or "" for d in own))
    expect(stream.finish_reasons() in (["tool_calls"], ["stop"]), f"it ends by {stream.finish_reasons()}")


@GROUP.required
def a_result_is_read(target: Target) -> None:
    """A message of the role tool answers a call, and adds to the prompt. Source: OpenAI API."""
    function = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    call = {"id": "call_1", "type": "function", "function": function}
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
    ]
    short = target.chat(messages=turns[:1], tools=TOOLS, max_tokens=4)["usage"]["prompt_tokens"]
    long = target.chat(messages=turns, tools=TOOLS, max_tokens=4)["usage"]["prompt_tokens"]
    expect(long > short, f"the prompt has {short} tokens without the result and {long} with it")


@GROUP.required
def an_unknown_tool_is_refused(target: Target) -> None:
    """tool_choice with a name that no tool has is 400. Source: OpenAI API."""
    choice = {"type": "function", "function": {"name": "no_such_tool"}}
    target.chat(QUESTION, tool_choice="auto", tools=TOOLS, max_tokens=4)  # not all are refused
    messages = [{"role": "user", "content": QUESTION}]
    target.refused(target.post(CHAT, messages=messages, tool_choice=choice, **_OPTIONS), 400)

"""OpenAI's Responses, /responses: whole answers, their events, and those that are kept."""

from __future__ import annotations

import json
from typing import Any

from sleb.doctor.check import Group
from sleb.doctor.checks.structured import SCHEMA, expect_colour
from sleb.doctor.checks.tools import PARAMETERS, expect_call
from sleb.doctor.outcome import expect
from sleb.doctor.target import GREEDY, QUESTION, Json, Target, ok, read_events, shown

GROUP = Group("responses", further=True)

RESPONSES = "responses"
_GREEDY: Json = {"temperature": 0, "max_output_tokens": 24, "store": False}
_TOOL: Json = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
_CALL: Json = {"tools": [_TOOL], "tool_choice": "required", "temperature": 0, "store": False}
# Of one text: what comes once, in this order; the deltas are between the two halves.
_BEGIN = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
]
_END = ["response.output_text.done", "response.content_part.done", "response.output_item.done"]


def _create(target: Target, given: Any = QUESTION, **fields: Any) -> Json:
    return ok(target.post(RESPONSES, input=given, **fields))


def _items(response: Json, kind: str) -> list[Json]:
    return [item for item in response["output"] if item["type"] == kind]


def _text(response: Json) -> str:
    parts = [part for item in _items(response, "message") for part in item["content"]]
    return "".join(part["text"] for part in parts if part["type"] == "output_text")


def _stream(target: Target, given: Any = QUESTION, **fields: Any) -> list[Json]:
    """The events; each has the type that its line `event:` names."""
    events = read_events(target.post(RESPONSES, input=given, stream=True, **fields))
    for name, event in events:
        expect(name == event["type"], f"the event {shown(name)} has type {shown(event['type'])}")
    return [event for _, event in events]


@GROUP.required
def a_response_has_its_shape(target: Target) -> None:
    """id, object "response", created_at, model, status, output with a message of output_text. Source: OpenAI API."""
    response = _create(target, **_GREEDY)
    expect(isinstance(response["id"], str) and response["id"], f"id is {shown(response['id'])}")
    expect(response["object"] == "response", f"object is {shown(response['object'])}")
    expect(isinstance(response["created_at"], int | float), f"created_at is {shown(response['created_at'])}")
    expect(isinstance(response["model"], str), f"model is {shown(response['model'])}")
    expect(response["status"] in ("completed", "incomplete"), f"status is {shown(response['status'])}")
    for name in ("error", "incomplete_details", "instructions", "metadata", "tools", "tool_choice"):
        expect(name in response, f"{name} is missing")
    messages = _items(response, "message")
    expect(len(messages) == 1, f"there are {len(messages)} messages")
    expect(messages[0]["role"] == "assistant" and messages[0]["id"], f"the message is {shown(messages[0])}")
    for part in messages[0]["content"]:
        expect(part["type"] == "output_text" and isinstance(part["annotations"], list), f"{shown(part)}")


@GROUP.required
def the_text_is_that_of_a_chat(target: Target) -> None:
    """A greedy response has the text and the usage of the same chat. Source: OpenAI API."""
    chat, response = target.chat(**GREEDY), _create(target, **_GREEDY)
    content = chat["choices"][0]["message"].get("content") or ""
    expect(_text(response) == content, f"{shown(_text(response))}, and the chat {shown(content)}")
    usage, other = response["usage"], chat["usage"]
    pairs = {name: (usage[f"{name}_tokens"], other[f"{as_chat}_tokens"]) for name, as_chat in _USAGE.items()}
    expect(all(own == its for own, its in pairs.values()), f"tokens here and of the chat: {pairs}")


_USAGE = {"input": "prompt", "output": "completion", "total": "total"}


@GROUP.required
def usage_has_details(target: Target) -> None:
    """usage tells cached_tokens of the input and reasoning_tokens of the output, 0 too. Source: OpenAI API."""
    usage = _create(target, **_GREEDY)["usage"]
    cached = usage["input_tokens_details"]["cached_tokens"]
    thought = usage["output_tokens_details"]["reasoning_tokens"]
    expect(type(cached) is int and 0 <= cached <= usage["input_tokens"], f"cached_tokens is {shown(cached)}")
    expect(
        type(thought) is int and 0 <= thought <= usage["output_tokens"], f"reasoning_tokens: {shown(thought)}"
    )


@GROUP.required
def a_cut_response_is_incomplete(target: Target) -> None:
    """max_output_tokens cuts: status "incomplete", and incomplete_details says why. Source: OpenAI API."""
    response = _create(target, temperature=0, max_output_tokens=16, store=False)
    number = response["usage"]["output_tokens"]
    expect(number <= 16, f"there are {number} tokens")
    if target.chat(temperature=0, max_tokens=17)["usage"]["completion_tokens"] > 16:
        expect(response["status"] == "incomplete", f"status is {shown(response['status'])}")
        reason = (response["incomplete_details"] or {}).get("reason")
        expect(reason == "max_output_tokens", f"the reason is {shown(reason)}")


@GROUP.required
def instructions_are_read(target: Target) -> None:
    """instructions are a system message. Source: OpenAI API."""
    words = "You are a pirate who answers in one short sentence."
    as_chat = [{"role": "system", "content": words}, {"role": "user", "content": QUESTION}]
    wanted = target.chat(messages=as_chat, max_tokens=1)["usage"]["prompt_tokens"]
    found = _create(target, instructions=words, **_GREEDY)["usage"]["input_tokens"]
    expect(found == wanted, f"the prompt has {found} tokens, that of the chat {wanted}")


@GROUP.required
def items_are_read(target: Target) -> None:
    """input may be messages, calls and their outputs, as items. Source: OpenAI API."""
    call = {
        "type": "function_call",
        "call_id": "call_1",
        "name": "get_weather",
        "arguments": '{"city": "Paris"}',
    }
    result = {"type": "function_call_output", "call_id": "call_1", "output": "Sunny, 21 degrees."}
    message = {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}
    counts = [
        _create(target, items, **_GREEDY)["usage"]["input_tokens"]
        for items in ([message], [message, call], [message, call, result])
    ]
    expect(counts[0] < counts[1] < counts[2], f"one, two and three items are prompts of {counts} tokens")


@GROUP.required
def events_come_in_their_order(target: Target) -> None:
    """created, in_progress, the item, its part, deltas, what is done, and the end. Source: OpenAI API."""
    events = _stream(target, **_GREEDY)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    thoughts = [event["output_index"] for event in added if event["item"]["type"] == "reasoning"]
    told = [event for event in events if event.get("output_index") not in thoughts]
    kinds = [event["type"] for event in told if event["type"] != "response.output_text.delta"]
    last = kinds.pop()
    expect(last in ("response.completed", "response.incomplete"), f"the last event is {shown(last)}")
    expect(kinds == [*_BEGIN, *_END], f"the events are {shown(kinds)}")
    numbers = [event["sequence_number"] for event in events]
    expect(numbers == list(range(numbers[0], numbers[0] + len(numbers))), f"the numbers are {shown(numbers)}")


@GROUP.required
def deltas_are_the_text(target: Target) -> None:
    """Joined deltas are the text of each event that tells it, and of the whole response. Source: OpenAI API."""
    events = _stream(target, **_GREEDY)
    joined = "".join(each["delta"] for each in events if each["type"] == "response.output_text.delta")
    [done] = [each["text"] for each in events if each["type"] == "response.output_text.done"]
    end = events[-1]["response"]
    for text in (done, _text(end), _text(_create(target, **_GREEDY))):
        expect(text == joined, f"the deltas are {shown(joined)}, the text {shown(text)}")
    expect(end["usage"]["output_tokens"] > 0, "the last event tells no usage")


@GROUP.required
def a_required_call_is_an_item(target: Target) -> None:
    """tool_choice required gives a function_call with call_id, name and JSON arguments. Source: OpenAI API."""
    response = _create(target, "What is the weather in Paris?", **_CALL)
    calls = _items(response, "function_call")
    expect(calls, f"there is no call in {shown(response['output'])}")
    for call in calls:
        expect(isinstance(call["call_id"], str) and call["call_id"], f"call_id is {shown(call['call_id'])}")
        expect_call(call["name"], call["arguments"])


@GROUP.required
def a_calls_arguments_stream(target: Target) -> None:
    """A stream tells a call's item, its arguments in deltas, and both when they are done. Source: OpenAI API."""
    events = _stream(target, "What is the weather in Paris?", **_CALL)
    added = [each["item"] for each in events if each["type"] == "response.output_item.added"]
    calls = [item for item in added if item["type"] == "function_call"]
    expect(calls, f"no call among the items {shown(added)}")
    index = next(each["output_index"] for each in events if each.get("item") == calls[0])
    own = [each for each in events if each.get("output_index") == index]
    kind = "response.function_call_arguments"
    joined = "".join(each["delta"] for each in own if each["type"] == f"{kind}.delta")
    [done] = [each["arguments"] for each in own if each["type"] == f"{kind}.done"]
    expect(joined == done, f"the deltas are {shown(joined)}, done is {shown(done)}")
    expect_call(calls[0]["name"], joined)


@GROUP.required
def a_schema_is_kept(target: Target) -> None:
    """text.format json_schema gives JSON that fits. Source: OpenAI API."""
    text = {"format": {"type": "json_schema", "name": "colour", "schema": SCHEMA, "strict": True}}
    expect_colour(_text(_create(target, text=text, temperature=0, store=False)))


@GROUP.sleb_only
def a_stored_response_is_found(target: Target) -> None:
    """With store it can be fetched, and is gone once it is deleted. Source: OpenAI API, vLLM."""
    response = _create(target, **_GREEDY | {"store": True})
    address = f"{RESPONSES}/{response['id']}"
    got = target.http.get(address)
    expect(got.status_code == 200, f"HTTP {got.status_code} for a response that was to be stored")
    found = ok(got)
    expect(found["output"] == response["output"], f"the output is {shown(found['output'])}")
    ok(target.http.delete(address))
    target.refused(target.http.get(address), 404)


@GROUP.sleb_only
def a_conversation_goes_on(target: Target) -> None:
    """previous_response_id brings what was said before into the prompt. Source: OpenAI API, vLLM."""
    first = _create(target, **_GREEDY | {"store": True})
    alone = _create(target, "Go on.", **_GREEDY)["usage"]["input_tokens"]
    more = _create(target, "Go on.", previous_response_id=first["id"], **_GREEDY)["usage"]["input_tokens"]
    expect(more > alone, f"the prompt has {alone} tokens alone and {more} after an earlier response")


@GROUP.sleb_only
def what_is_not_stored_is_gone(target: Target) -> None:
    """store false keeps nothing: fetching it, or going on from it, is an error. Source: OpenAI API."""
    response = _create(target, **_GREEDY)
    target.refused(target.http.get(f"{RESPONSES}/{response['id']}"), 404)
    body: Json = {"input": "Go on.", "previous_response_id": response["id"]}
    target.refused(target.post(RESPONSES, **body, **_GREEDY), 400, 404)


@GROUP.sleb_only
def input_tokens_are_counted(target: Target) -> None:
    """/responses/input_tokens tells what usage will. Source: OpenAI API."""
    counted = ok(target.post(f"{RESPONSES}/input_tokens", input=QUESTION))["input_tokens"]
    used = _create(target, **_GREEDY)["usage"]["input_tokens"]
    expect(counted == used, f"counted {shown(counted)}, used {used}")


@GROUP.required
def bad_input_is_400(target: Target) -> None:
    """input of another type, and an item of an unknown one, are refused with a reason. Source: OpenAI API."""
    _create(target, **_GREEDY)  # not everything is refused
    for given in (5, [{"type": "no_such_item"}]):
        target.refused(target.post(RESPONSES, input=given, **_GREEDY), 400)


@GROUP.required
def an_unknown_tool_type_is_no_error(target: Target) -> None:
    """A tool that the server has not, such as web_search, is passed over. Source: llama.cpp, sleb."""
    tools = [{"type": "web_search"}, _TOOL]
    response = _create(target, tools=tools, **_GREEDY)
    expect(json.dumps(response["output"]) != "[]", "the response has no output")

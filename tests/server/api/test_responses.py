"""OpenAI's Responses: every answer and every event against the types of OpenAI's SDK, and its client over a socket."""

from __future__ import annotations

import json
import logging
import threading
import time

import openai
import pytest
from openai.types.responses import Response, ResponseItem, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
ITEM = TypeAdapter(ResponseItem)
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}<think>enable_thinking"
)
CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": [2, "x"]}}\n</tool_call>'
SUM = {
    "type": "function",
    "name": "sum",
    "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}},
}
NOW = {"type": "function", "name": "now", "description": "The time", "strict": True}
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
LOGPROBS = {"include": ["message.output_text.logprobs"]}


@pytest.fixture(scope="module")
def thinker(start_server, make_fake_engine):
    """A server whose model thinks and calls tools: it repeats what it is told."""
    engine = make_fake_engine(4000)
    engine.chat_template = TEMPLATE
    running = start_server(engine)
    yield running
    running.wait_idle()
    assert not running.context.responses.running
    running.close()


@pytest.fixture(scope="module")
def client(thinker):
    with thinker.client() as client:
        yield client


def whole(server, given="hello", **fields):
    response = server.post(PATH, input=given, **fields)
    assert response.status_code == 200, response.text
    return checked(response.json())


def checked(answer):
    """An answer that has every field that the SDK's type has, of its type."""
    assert set(Response.model_fields) <= set(answer)
    Response.model_validate(answer, strict=True)
    return answer


def stream(server, given="hello", **fields):
    response = server.post(PATH, input=given, stream=True, **fields)
    assert response.status_code == 200, response.text
    return events(response)


def events(response):
    """The events of a stream, checked one by one and in their order."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        if block == ": keep-alive":
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert EVENT.validate_python(event, strict=True).type == event["type"]
        if "response" in event:
            checked(event["response"])
        found.append(event)
    check_order(found)
    return found


def check_order(found):
    """Replays a stream: what may come when, and that its end says what its deltas said."""
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:2] == ["created", "in_progress"]
    assert kinds[-1] in ("completed", "incomplete", "failed")
    assert (kinds[-1] == "failed") == (kinds[-2] == "error")
    done, item, part, text = [], None, None, None
    for kind, event in list(zip(kinds, found, strict=True))[2:-1]:
        if kind == "error":
            continue
        assert event["output_index"] == len(done)
        if kind == "output_item.added":
            assert item is None
            item = event["item"]
            assert item["status"] == "in_progress"
            text = "" if item["type"] == "function_call" else None
            assert not item.get("content")
            assert item.get("arguments", "") == ""
        elif kind == "output_item.done":
            assert event["item"]["id"] == item["id"]
            assert part is None
            if item["type"] == "function_call":
                assert event["item"]["arguments"] == text
            else:
                assert event["item"]["content"][0]["text"] == text
            done.append(event["item"])
            item = None
        else:
            assert event["item_id"] == item["id"]
            said = {"message": "output_text", "reasoning": "reasoning_text"}.get(
                item["type"], "function_call_arguments"
            )
            assert event.get("content_index") == (None if item["type"] == "function_call" else 0)
            if kind == "content_part.added":
                assert (part, text, event["part"]["text"]) == (None, None, "")
                part, text = event["part"]["type"], ""
                assert part == said
            elif kind == "content_part.done":
                assert (event["part"]["type"], event["part"]["text"]) == (part, text)
                part = None
            elif kind == f"{said}.delta":
                assert event["delta"]
                text += event["delta"]
            else:
                assert kind == f"{said}.done"
                assert event.get("text", event.get("arguments")) == text
    assert item is None
    assert found[-1]["response"]["output"] == done


def without_chance(answer):
    """An answer without ids and times."""
    changing = {"id", "call_id", "created_at", "completed_at", "timings", "metrics"}
    if isinstance(answer, list):
        return [without_chance(each) for each in answer]
    if isinstance(answer, dict):
        return {name: without_chance(each) for name, each in answer.items() if name not in changing}
    return answer


CASES = {
    "plain": ("Hello, 世界!", {}),
    "long": ("hello", {"max_output_tokens": 3}),
    "long in thoughts": ("<think>hmmm", {"max_output_tokens": 9}),
    "nothing": ("a\u00e9", {"max_output_tokens": 1, "stop": "a"}),
    "stopped": ("hello", {"stop": ["l", "e", "\u00e9"]}),
    "broken character": ("a\u00e9", {"max_output_tokens": 2} | LOGPROBS),
    "logprobs": ("h\u00e9llo", {"top_logprobs": 2} | LOGPROBS),
    "thoughts": ("<think>hm</think>yes", {}),
    "thoughts and logprobs": ("<think>hm</think>\n\nyes", {"top_logprobs": 3} | LOGPROBS),
    "thoughts alone": ("<think>hm", {}),
    "thoughts and calls": ("<think>hm</think>I call. " + CALL, {"tools": [SUM, NOW]}),
    "calls": (CALL + CALL, {"tools": [SUM, NOW]} | LOGPROBS),
    "calls and words": (CALL + "so " + CALL, {"tools": [SUM], "store": False}),
    "one call": (CALL * 2, {"tools": [SUM], "parallel_tool_calls": False}),
    "call that breaks": (CALL, {"tools": [SUM], "max_output_tokens": 45}),
    "tools none": (CALL, {"tools": [SUM], "tool_choice": "none"}),
    "json": ('{"age":1}', {"text": {"format": {"type": "json_schema", "name": "p", "schema": PERSON}}}),
    "json object": ('{"a":1}', {"text": {"format": {"type": "json_object"}, "verbosity": "low"}}),
    "repeats": (
        "hi",
        {
            "instructions": "",
            "metadata": {"a": "b"},
            "user": "me",
            "safety_identifier": "s",
            "prompt_cache_key": "k",
            "service_tier": "auto",
            "reasoning": {"effort": "low", "summary": "auto"},
            "truncation": "auto",
            "max_tool_calls": 3,
            "background": False,
            "stream_options": {"include_obfuscation": True},
            "temperature": 0,
            "top_p": 0.5,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_stream_and_whole_fit_the_types_and_are_one(thinker, case):
    given, fields = CASES[case]
    answer = whole(thinker, given, **fields)
    told = stream(thinker, given, **fields)[-1]["response"]
    assert without_chance(told) == without_chance(answer)
    ids = [each["id"] for each in (answer, told, *answer["output"], *told["output"])]
    assert len(set(ids)) == len(ids)


def test_a_whole_answer_says_all_that_there_is(thinker):
    answer = whole(thinker, "<think>hm</think>I call. " + CALL, tools=[SUM], model="FAKE:sleb-2")
    thought, said, called = answer["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (thought["summary"], thought["encrypted_content"]) == ([], None)
    assert said["content"][0]["text"] == "I call."
    assert json.loads(called["arguments"]) == {"a": 1, "b": [2, "x"]}
    assert (called["name"], called["status"], answer["status"]) == ("sum", "completed", "completed")
    num_tokens = len(("<think>hm</think>I call. " + CALL).encode())
    assert answer["usage"] == {
        "input_tokens": num_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": num_tokens,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 2 * num_tokens,
    }
    assert answer["tools"] == [SUM | {"description": None, "strict": None}]
    assert answer["timings"]["predicted_n"] == num_tokens
    assert answer["completed_at"] >= answer["created_at"]


def test_an_answer_that_is_cut_is_incomplete(thinker):
    answer = whole(thinker, "hello", max_output_tokens=3)
    assert (answer["status"], answer["completed_at"]) == ("incomplete", None)
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    assert answer["output"][0]["content"][0]["text"] == "hel"
    assert whole(thinker, "<think>hmmm", max_output_tokens=9)["output"][0]["content"][0]["text"] == "hm"
    assert [event["type"] for event in stream(thinker, "hello", max_output_tokens=3)][
        -1
    ] == "response.incomplete"
    cut = whole(thinker, CALL, tools=[SUM], max_output_tokens=10, max_tokens=300)
    assert cut["status"] == "incomplete"


def test_thoughts_alone_are_followed_by_a_message(thinker):
    """A client that finds neither words nor calls would ask again and again."""
    thought, said = whole(thinker, "<think>hm")["output"]
    assert (thought["type"], said["content"][0]["text"]) == ("reasoning", "")


def test_logprobs_are_of_the_message_alone(thinker):
    [thought, said] = whole(thinker, "<think>hm</think>h\u00e9", top_logprobs=2, **LOGPROBS)["output"]
    entries = said["content"][0]["logprobs"]
    assert [bytes(entry["bytes"]) for entry in entries] == [b"h", b"\xc3", b"\xa9"]
    assert entries[0]["logprob"] == -1.5
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == [-1.0, -1.01]
    assert "logprobs" not in thought["content"][0]
    found = stream(thinker, "<think>hm</think>h\u00e9", top_logprobs=2, **LOGPROBS)
    deltas = [event for event in found if event["type"] == "response.output_text.delta"]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries
    assert whole(thinker, "a", top_logprobs=2)["output"][0]["content"][0]["logprobs"] == []
    assert whole(thinker, "a", **LOGPROBS)["output"][0]["content"][0]["logprobs"][0]["top_logprobs"] == []


def prompt_of(server, **fields):
    """The text that the engine was given."""
    assert server.post(PATH, max_output_tokens=1, **fields).status_code == 200
    return bytes(server.engine.seen[-1][0] and [ord(c) for c in decoded(server)]).decode()


def decoded(server):
    text = server.engine.tokenizer.decode(server.engine.seen[-1][0], skip_special_tokens=False)
    return text.encode().decode("latin-1")


def test_items_instructions_and_tools_make_the_prompt(thinker):
    given = [
        {"role": "developer", "content": "D"},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "r"},
    ]
    assert prompt_of(thinker, input=given, instructions="I") == "I\n\nDa\nbr"
    assert prompt_of(thinker, input="u", chat_template_kwargs={"suffix": "!"}) == "u!"


def test_sampling_fields_reach_the_engine(thinker):
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["q"]}
    more = {"repetition_penalty": 1.2, "min_tokens": 1, "logit_bias": {"5": -100}, "ignore_eos": True}
    answer = whole(thinker, "abc", max_output_tokens=2, **fields, **more)
    assert (answer["temperature"], answer["top_p"], answer["max_output_tokens"]) == (0.5, 0.9, 2)
    params = thinker.engine.seen[-1][1]
    assert {name: getattr(params, name) for name in fields} == fields
    assert (params.repetition_penalty, params.max_tokens, params.logit_bias) == (1.2, 2, {5: -100})
    whole(thinker, "abc", n_predict=2)
    assert thinker.engine.seen[-1][1].max_tokens == 2
    assert whole(thinker, "abc")["temperature"] == thinker.engine.defaults.temperature


def test_effort_is_told_to_the_template(thinker, monkeypatch):
    seen = []
    render = thinker.engine.render_chat
    monkeypatch.setattr(
        thinker.engine,
        "render_chat",
        lambda messages, *, variables=None, **options: seen.append(variables) or render(messages, **options),
    )
    for effort in ("none", "high"):
        whole(thinker, "a", reasoning={"effort": effort})
    whole(thinker, "a", reasoning={"effort": "none"}, chat_template_kwargs={"enable_thinking": True})
    whole(thinker, "a")
    assert [each.get("enable_thinking") for each in seen] == [False, True, True, None]


def test_other_tools_are_passed_over_with_a_word(thinker, caplog):
    others = [
        {"type": "web_search"},
        {"type": "namespace", "name": "x", "tools": []},
        {"type": "custom", "name": "y"},
    ]
    before = thinker.context.unknown_fields["tools.type=web_search"]
    with caplog.at_level(logging.WARNING, "sleb.server"):
        for _ in range(2):
            assert whole(thinker, "hi", tools=[*others, SUM])["tools"][0]["name"] == "sum"
    lines = [record.getMessage() for record in caplog.records if "web_search" in record.getMessage()]
    assert len(lines) <= 1
    assert thinker.context.unknown_fields["tools.type=web_search"] == before + 2
    for choice in ("required", {"type": "web_search"}, {"type": "custom", "name": "y"}):
        response = thinker.post(PATH, input="hi", tools=others, tool_choice=choice)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


def test_tool_choice_limits_the_tools(thinker):
    def offered(choice):
        whole(thinker, "hi", tools=[SUM, NOW], tool_choice=choice, max_output_tokens=1)

    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "now"}]}
    for choice in ("none", "auto", allowed):
        offered(choice)
    answer = whole(thinker, CALL, tools=[SUM, NOW], tool_choice=allowed)
    assert [item["type"] for item in answer["output"]] == ["message"]
    assert answer["tool_choice"] == allowed


DEEP = {}
for _ in range(300):
    DEEP = {"a": DEEP}
REFUSED = [
    ({}, "input"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0]",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_x"}]}, "input[0].id"),
    ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input"),
    ({"input": [{"role": DEEP, "content": "x"}]}, "input[0].role"),
    ({"input": [{"type": "reasoning", "summary": [DEEP]}]}, "input[0].summary[0].text"),
    ({"input": [{}] * 4097}, "input"),
    ({"input": "a", "background": True}, "background"),
    ({"input": "a", "conversation": "conv_1"}, "conversation"),
    ({"input": "a", "prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"input": "a", "moderation": {"model": "m"}}, "moderation"),
    ({"input": "a", "context_management": [{"type": "compaction"}]}, "context_management"),
    ({"input": "a", "n": 2}, "n"),
    ({"input": "a", "messages": [{"role": "user", "content": "x"}]}, "messages"),
    ({"input": "a", "logprobs": True}, "logprobs"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "a", "max_output_tokens": "5"}, "max_output_tokens"),
    ({"input": "a", "include": ["everything"]}, "include"),
    ({"input": "a", "top_logprobs": 21}, "top_logprobs"),
    ({"input": "a", "truncation": "middle"}, "truncation"),
    ({"input": "a", "metadata": {"a": 5}}, "metadata"),
    ({"input": "a", "metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ({"input": "a", "reasoning": {"effort": "much"}}, "reasoning"),
    ({"input": "a", "reasoning": "high"}, "reasoning"),
    ({"input": "a", "text": {"format": {"type": "xml"}}}, "text.format"),
    ({"input": "a", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    (
        {"input": "a", "text": {"format": {"type": "json_schema", "schema": {"type": 5}}}},
        "text.format.schema",
    ),
    ({"input": "a", "text": {"format": {"type": "json_object"}}, "regex": "a"}, "regex"),
    ({"input": "a", "tools": [{"name": "x"}]}, "tools[0].type"),
    ({"input": "a", "tools": [{"type": "function"}]}, "tools[0].name"),
    ({"input": "a", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"input": "a", "tools": [{"type": "function", "name": "x", "parameters": 5}]}, "tools[0].parameters"),
    ({"input": "a", "tools": [SUM, SUM]}, "tools"),
    ({"input": "a", "tools": [SUM], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice"),
    ({"input": "a", "tools": [SUM], "tool_choice": "sum"}, "tool_choice"),
    ({"input": "a", "tools": [SUM], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice"),
    ({"input": "a", "temperature": -1}, "temperature"),
    ({"input": "a", "stream": "yes"}, "stream"),
    ({"input": "x" * 4001}, "input"),  # too long, found out by its tokens and by its characters
    ({"input": "x" * 400_000}, "input"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_what_cannot_be_honoured_is_refused(thinker, body, param):
    response = thinker.http.post(PATH, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert len(response.content) < 1000
    if body.get("stream") != "yes":  # before a stream begins
        assert (
            thinker.http.post(PATH, json=body | {"stream": True}).json()["error"]["param"] == error["param"]
        )


def test_previous_response_brings_the_conversation_but_not_the_instructions(thinker):
    first = whole(thinker, "a", instructions="I")
    second = whole(thinker, "b", previous_response_id=first["id"])
    assert second["output"][0]["content"][0]["text"] == "aIab"  # it repeats: user, its own "Ia", user
    third = whole(thinker, [], previous_response_id=second["id"], instructions="J", store=False)
    assert third["output"][0]["content"][0]["text"] == "JaIabaIab"
    assert (third["previous_response_id"], third["store"]) == (second["id"], False)
    assert thinker.http.get(f"{PATH}/{third['id']}").status_code == 404
    told = stream(thinker, "b", previous_response_id=first["id"])[-1]["response"]
    assert told["output"][0]["content"][0]["text"] == "aIab"
    missing = thinker.post(PATH, input="b", previous_response_id="resp_x")
    assert missing.status_code == 404
    assert missing.json()["error"]["param"] == "previous_response_id"
    assert "--response-store-mb" in missing.json()["error"]["message"]


def test_what_is_kept_is_told_and_forgotten(thinker):
    given = [{"role": "user", "content": word} for word in "abc"]
    answer = stream(thinker, given)[-1]["response"]
    path = f"{PATH}/{answer['id']}"
    assert thinker.http.get(path, params={"include[]": "reasoning.encrypted_content"}).json() == answer
    refused = thinker.http.get(path, params={"stream": "true"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
    assert thinker.http.get(path, params={"include": "everything"}).status_code == 400
    items = thinker.http.get(f"{path}/input_items").json()
    assert [item["content"][0]["text"] for item in items["data"]] == ["c", "b", "a"]
    assert [ITEM.validate_python(item).role for item in items["data"]] == ["user"] * 3
    page = thinker.http.get(f"{path}/input_items", params={"order": "asc", "limit": 2}).json()
    assert ([item["content"][0]["text"] for item in page["data"]], page["has_more"]) == (["a", "b"], True)
    rest = thinker.http.get(f"{path}/input_items", params={"order": "asc", "after": page["last_id"]}).json()
    assert ([item["content"][0]["text"] for item in rest["data"]], rest["has_more"]) == (["c"], False)
    assert rest["first_id"] == rest["last_id"] == items["first_id"]
    for wrong in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "msg_x"}):
        assert thinker.http.get(f"{path}/input_items", params=wrong).status_code == 400
    reference = {"type": "item_reference", "id": answer["output"][0]["id"]}
    assert whole(thinker, [reference, given[0]])["output"][0]["content"][0]["text"] == "abca"
    assert thinker.http.delete(path).json() == {"id": answer["id"], "object": "response", "deleted": True}
    for again in (thinker.http.get(path), thinker.http.delete(path), thinker.http.get(f"{path}/input_items")):
        assert (again.status_code, again.json()["error"]["code"]) == (404, "response_not_found")
    assert thinker.post(f"{path}/cancel").status_code == 404


def test_tokens_of_an_input_are_those_that_an_answer_counts(thinker):
    fields = {"instructions": "Be brief", "tools": [SUM], "text": {"format": {"type": "text"}}}
    counted = thinker.post(f"{PATH}/input_tokens", input="hello", **fields).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": whole(thinker, "hello", **fields)["usage"]["input_tokens"],
    }
    first = whole(thinker, "hello")
    more = thinker.post(f"{PATH}/input_tokens", input="!", previous_response_id=first["id"]).json()
    assert more["input_tokens"] == 11
    assert thinker.post(f"{PATH}/input_tokens").status_code == 400


@pytest.mark.parametrize("streamed", [False, True])
def test_cancel_ends_an_answer_for_whoever_waits_for_it(serve_engine, fake_engine, wait_until, streamed):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.01
    running = server.context.responses.running
    waiting = []
    thread = threading.Thread(
        target=lambda: waiting.append(server.post(PATH, input="x" * 100, stream=streamed))
    )
    thread.start()
    wait_until(lambda: fake_engine.num_steps > 3 and running)
    [identifier] = running
    so_far = checked(server.http.get(f"{PATH}/{identifier}").json())
    assert so_far["status"] == "in_progress"
    assert server.http.delete(f"{PATH}/{identifier}").status_code == 404
    cancelled = checked(server.post(f"{PATH}/{identifier}/cancel").json())
    assert (cancelled["id"], cancelled["status"]) == (identifier, "cancelled")
    thread.join(10)
    fake_engine.delay = 0
    [response] = waiting
    if streamed:
        last = events(response)[-1]
        assert last["type"] == "response.incomplete"
        answer = last["response"]
    else:
        answer = checked(response.json())
    assert (answer["status"], answer["output"][0]["status"]) == ("cancelled", "incomplete")
    assert 0 < answer["usage"]["output_tokens"] < 100
    server.wait_idle()
    assert server.http.get(f"{PATH}/{identifier}").json() == answer
    assert server.post(f"{PATH}/{identifier}/cancel").json() == answer
    assert not running
    assert whole(server, "b", previous_response_id=identifier)["status"] == "completed"


def test_a_client_that_leaves_leaves_nothing(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.01
    with server.http.stream("POST", PATH, json={"input": "x" * 200, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.context.responses.running
    server.wait_idle()
    wait_until(lambda: not server.context.responses.running)
    assert len(server.context.responses.store) == 0


def test_an_error_inside_a_stream_is_told_twice(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.fail_after = 3
    found = stream(server, "hello")
    assert [event["type"] for event in found][-3:] == [
        "response.output_item.done",
        "error",
        "response.failed",
    ]
    assert found[-2]["code"] == "engine_dead"
    failed = found[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert failed["output"][0]["content"][0]["text"] == "he"
    assert server.post(PATH, input="hello").status_code == 503


def test_one_key_does_not_see_what_another_made(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("one", "two"))

    def ask(key, method, path="", **fields):
        options = {"json": fields} if method == "POST" else {}
        headers = {"Authorization": f"Bearer {key}"}
        return server.http.request(method, f"{PATH}{path}", headers=headers, **options)

    mine = ask("one", "POST", input="secret").json()
    path, reference = f"/{mine['id']}", {"type": "item_reference", "id": mine["output"][0]["id"]}
    refused = [ask("two", *each) for each in (("GET", path), ("DELETE", path), ("POST", f"{path}/cancel"))]
    refused += [ask("two", "POST", input="b", previous_response_id=mine["id"]), ask("three", "GET", path)]
    assert [each.status_code for each in refused] == [404, 404, 404, 404, 401]
    assert ask("two", "POST", input=[reference]).status_code == 400
    assert server.http.get(f"{PATH}{path}", headers={"x-api-key": "one"}).json() == mine
    for fields in ({"input": "b", "previous_response_id": mine["id"]}, {"input": [reference]}):
        assert ask("one", "POST", **fields).json()["output"][0]["content"][0]["text"].startswith("secret")


def test_the_store_can_be_off(serve_engine, fake_engine):
    server = serve_engine(fake_engine, response_store_mb=0)
    answer = whole(server, "hello")
    assert answer["store"] is False
    missing = server.post(PATH, input="b", previous_response_id=answer["id"])
    assert missing.status_code == 404
    assert "--response-store-mb 0" in missing.json()["error"]["message"]


def test_truncation_drops_the_oldest(serve_engine, make_fake_engine):
    engine = make_fake_engine(30)
    engine.chat_template = TEMPLATE
    server = serve_engine(engine)
    given = [{"role": "system", "content": "S"}]
    for letter in "abcdefgh":
        given += [
            {"role": "user", "content": letter * 3},
            {"role": "assistant", "content": letter.upper() * 3},
        ]
    given.append({"role": "user", "content": "end"})
    assert server.post(PATH, input=given).json()["error"]["code"] == "context_length_exceeded"
    answer = whole(server, given, truncation="auto", max_output_tokens=5)
    assert answer["usage"]["input_tokens"] == len(
        "SfffFFFgggGGGhhhHHHend"
    )  # 22: with a pair more it is 28 of 25
    assert answer["output"][0]["content"][0]["text"] == "Sfff" + "F"
    calls = [{"role": "user", "content": "u"}]
    for number in range(8):
        calls.append({"type": "function_call", "call_id": str(number), "name": "f", "arguments": "{}"})
        calls.append(
            {"type": "function_call_output", "call_id": str(number), "output": f"<{number * 111:03}>"}
        )
    answer = whole(server, calls, truncation="auto", max_output_tokens=7)
    assert answer["output"][0]["content"][0]["text"].startswith("<444>")
    assert whole(server, "short", truncation="auto")["output"][0]["content"][0]["text"] == "short"
    refused = server.post(PATH, input=[{"role": "user", "content": "x" * 40}], truncation="auto")
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_hostile_bodies_are_refused_quickly(thinker):
    begin = time.monotonic()
    for body in (
        b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"input": [' + b",".join([b'{"role":"user","content":"x"}'] * 60_000) + b"]}",
        b'{"input": [{"role": "user", "content": ['
        + b",".join([b'{"type":"input_text","text":"xy"}'] * 50_000)
        + b"]}]}",
        b'{"input": "a", "tools": [' + b",".join([b'{"type":"web_search"}'] * 60_000) + b"]}",
        b'{"input": "a", "metadata": {' + b",".join(b'"%d":""' % number for number in range(50_000)) + b"}}",
    ):
        assert thinker.http.post(PATH, content=body).status_code == 400
    assert time.monotonic() - begin < 15  # not a measurement: it does not hang


class Person(BaseModel):
    name: str
    age: int


class TestOpenAIClient:
    def test_create(self, client):
        answer = client.responses.create(model="fake", input="Grüße, 世界 🌍")
        assert answer.output_text == "Grüße, 世界 🌍"
        assert (answer.model, answer.status) == ("fake", "completed")
        assert client.responses.retrieve(answer.id) == answer
        [item] = client.responses.input_items.list(answer.id)
        assert item.content[0].text == "Grüße, 世界 🌍"
        client.responses.delete(answer.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(answer.id)

    def test_stream(self, client):
        found = list(client.responses.create(model="fake", input="<think>hm</think>hello", stream=True))
        assert "".join(e.delta for e in found if e.type == "response.output_text.delta") == "hello"
        assert found[-1].response.output_text == "hello"
        with client.responses.stream(model="fake", input="<think>hm</think>hello") as helper:
            kinds = [event.type for event in helper]
            assert helper.get_final_response().output_text == "hello"
        assert kinds.count("response.output_text.done") == 1

    def test_parse(self, client):
        given = '{"name":"Ada","age":36}'
        answer = client.responses.parse(model="fake", input=given, text_format=Person)
        assert answer.output_parsed == Person(name="Ada", age=36)
        with client.responses.stream(model="fake", input=given, text_format=Person) as helper:
            list(helper)
            assert helper.get_final_response().output_parsed.age == 36

    def test_a_loop_of_tools(self, client):
        given = [{"role": "user", "content": CALL}]
        answer = client.responses.create(model="fake", input=given, tools=[SUM])
        [call] = answer.output
        given += answer.output
        given.append({"type": "function_call_output", "call_id": call.call_id, "output": "3"})
        again = client.responses.create(model="fake", input=given, tools=[SUM], tool_choice="none")
        assert again.output_text == CALL + "3"
        given = [given[-1]]
        kept = client.responses.create(input=given, previous_response_id=answer.id, store=False)
        assert kept.output_text == CALL + "3"

    def test_cancel_and_count(self, client):
        answer = client.responses.create(model="fake", input="hello")
        assert client.responses.cancel(answer.id) == answer
        assert client.responses.input_tokens.count(model="fake", input="hello").input_tokens == 5

    def test_errors(self, client):
        with pytest.raises(openai.NotFoundError) as missing:
            client.responses.create(model="gpt-9", input="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.responses.create(model="fake", input="a", background=True)
        assert bad.value.param == "background"

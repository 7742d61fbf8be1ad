"""Anthropic's Messages over a socket: every answer, event and error against the types of Anthropic's own SDK."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, TypeAdapter

anthropic = pytest.importorskip("anthropic", reason="needs anthropic, which the extra 'dev' brings")
from anthropic import types  # noqa: E402

PATH = "/v1/messages"
WEATHER = {
    "name": "weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Osl\u00f6", "days": 2}}\n</tool_call>'
INPUT = {"city": "Osl\u00f6", "days": 2}
USE = ("tool_use", "weather", INPUT)
EXTRAS = {"timings", "metrics"}  # which every answer of this server has

# What the engine says, fields of the request, the blocks that it makes, and the reasons for its end.
ANSWERS = {
    "text": ("Hello, \u4e16\u754c!", {}, [("text", "Hello, \u4e16\u754c!")], "end_turn", None),
    "nothing": ("hello", {"max_tokens": 0}, [("text", "")], "max_tokens", None),
    "cut": ("hello", {"max_tokens": 3}, [("text", "hel")], "max_tokens", None),
    "stopped": ("hello", {"stop_sequences": ["\u00e9", "l"]}, [("text", "he")], "stop_sequence", "l"),
    "thoughts": ("<think>hm</think>yes", {}, [("thinking", "hm"), ("text", "yes")], "end_turn", None),
    "thoughts alone": ("<think>hm", {}, [("thinking", "hm")], "end_turn", None),
    "thoughts omitted": (
        "<think>hm</think>yes",
        {"thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}},
        [("thinking", ""), ("text", "yes")],
        "end_turn",
        None,
    ),
    "call": (CALL, {"tools": [WEATHER]}, [USE], "tool_use", None),
    "thoughts, text and calls": (
        f"<think>hm</think>I call.{CALL}{CALL}",
        {"tools": [WEATHER]},
        [("thinking", "hm"), ("text", "I call."), USE, USE],
        "tool_use",
        None,
    ),
    "one call": (
        CALL + CALL,
        {"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        [USE],
        "tool_use",
        None,
    ),
    "call that must be": (
        CALL,
        {"tools": [WEATHER], "tool_choice": {"type": "any"}},
        [USE],
        "tool_use",
        None,
    ),
    "call that is named": (
        CALL,
        {"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}},
        [USE],
        "tool_use",
        None,
    ),
    "call that is cut": (
        CALL,
        {"tools": [WEATHER], "max_tokens": CALL.index(', "days') + 3},
        [("tool_use", "weather", {"city": "Osl\u00f6"})],
        "max_tokens",
        None,
    ),
    "no call": (
        CALL,
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        [("text", CALL)],
        "end_turn",
        None,
    ),
    "json": (
        '{"age":1}',
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        [("text", '{"age":1}')],
        "end_turn",
        None,
    ),
}


@pytest.fixture(scope="module")
def messages(start_server, make_fake_engine):
    """A server whose engine says what its `answer` is; its template knows tools and thoughts."""
    engine = make_fake_engine(max_model_len=4096)
    engine.chat_template = "{{ tools }} <think> enable_thinking reasoning_effort"
    running = start_server(engine)
    yield running
    running.close()


@pytest.fixture
def ask(messages):
    """ask(text, **fields): the answer of an engine that says `text`."""

    def post(text=None, path=PATH, headers=None, **fields):
        messages.engine.answer = None if text is None else messages.engine.encode(text)
        body = {"model": "fake", "max_tokens": 400, "messages": [{"role": "user", "content": "hello"}]}
        return messages.http.post(path, json=body | fields, headers=headers or {})

    yield post
    messages.engine.answer = None


def check(value, type_):
    """Validates strictly; a field that the types do not know must be one of EXTRAS."""
    parsed = TypeAdapter(type_).validate_python(value, strict=True)
    assert unknown_fields(parsed) <= EXTRAS, value
    return parsed


def unknown_fields(value):
    if isinstance(value, list):
        return set().union(*map(unknown_fields, value))
    if not isinstance(value, BaseModel):
        return set()
    inner = [getattr(value, name) for name in type(value).model_fields]
    return set(value.model_extra or ()).union(*map(unknown_fields, inner))


def check_error(response, status, type_):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert body["error"].keys() == {"type", "message"}
    assert body["type"] == "error" and body["error"]["type"] == type_
    if type_ != "request_too_large":  # which the types of the SDK leave out
        check(body, types.ErrorResponse)
    return body["error"]["message"]


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\n")
    found = []
    for each in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = each.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        found.append(json.loads(data.removeprefix("data: ")))
        assert found[-1]["type"] == name.removeprefix("event: ")
    return found


# State -> the events that may come in it, with the state that each leads to. Pings may come in every one.
NEXT = {
    "begin": {"message_start": "between"},
    "between": {"content_block_start": "inside", "message_delta": "stopped"},
    "inside": {"content_block_delta": "inside", "content_block_stop": "between"},
    "stopped": {"message_stop": "end"},
    "end": {},
}
DELTAS = {
    "text": {"text_delta"},
    "thinking": {"thinking_delta", "signature_delta"},
    "tool_use": {"input_json_delta"},
}


def check_order(found):
    """A machine that knows nothing of the server: order, indices, and parts that fit their block."""
    state, index, kind = "begin", -1, None
    for event in found:
        if event["type"] == "ping":
            continue
        state = NEXT[state][event["type"]]
        if event["type"] == "content_block_start":
            index, kind = index + 1, event["content_block"]["type"]
        if event["type"].startswith("content_block"):
            assert event["index"] == index
        if event["type"] == "content_block_delta":
            assert event["delta"]["type"] in DELTAS[kind]
    assert state == "end"


def shown(blocks):
    kinds = {
        "text": lambda block: ("text", block["text"]),
        "thinking": lambda block: ("thinking", block["thinking"]),
        "tool_use": lambda block: ("tool_use", block["name"], block["input"]),
    }
    return [kinds[block["type"]](block) for block in blocks]


@pytest.mark.parametrize("name", ANSWERS)
def test_whole_answers(ask, name):
    text, fields, blocks, reason, sequence = ANSWERS[name]
    response = ask(text, **fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    check(answer, types.Message)
    assert shown(answer["content"]) == blocks
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    assert answer["model"] == "fake" and answer["id"].startswith("msg_")
    ids = [block["id"] for block in answer["content"] if block["type"] == "tool_use"]
    assert len(set(ids)) == len(ids) and all(each.startswith("toolu_") for each in ids)
    assert answer["usage"]["input_tokens"] == len("hello")
    assert answer.keys() >= EXTRAS


@pytest.mark.parametrize("name", ANSWERS)
def test_streams(ask, name):
    text, fields, _, reason, sequence = ANSWERS[name]
    found = events(ask(text, stream=True, **fields))
    check_order(found)
    for event in found:
        if event["type"] == "message_start":
            assert event["message"]["content"] == [] and event["message"]["stop_reason"] is None
        check(event, types.RawMessageStreamEvent)
    assert found[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}
    whole = ask(text, **fields).json()
    assert found[-2]["usage"] == whole["usage"]


@pytest.mark.parametrize("name", ANSWERS)
def test_streams_as_the_client_joins_them(messages, ask, name):
    text, fields, blocks, reason, sequence = ANSWERS[name]
    whole = ask(text, **fields).json()
    messages.engine.answer = messages.engine.encode(text)
    client = anthropic.Anthropic(base_url=messages.url, api_key="none", max_retries=0)
    body = {"model": "fake", "max_tokens": 400, "messages": [{"role": "user", "content": "hello"}]} | fields
    with client.messages.stream(**body) as stream:
        final = stream.get_final_message()
    joined = final.model_dump(exclude_unset=True)
    assert shown(joined["content"]) == shown(whole["content"]) == blocks
    assert (joined["stop_reason"], joined["stop_sequence"]) == (reason, sequence)
    assert joined["usage"] == whole["usage"]
    signatures = [block["signature"] for block in joined["content"] if block["type"] == "thinking"]
    assert signatures == [block["signature"] for block in whole["content"] if block["type"] == "thinking"]
    assert all(signatures)


def test_the_client_feeds_its_own_messages_back(messages, ask):
    """A turn with thoughts and a call, its result, and the second answer."""
    text = f"<think>hm</think>I call.{CALL}"
    first = check(ask(text, tools=[WEATHER]).json(), types.Message)
    call = first.content[-1]
    seen = []
    messages.engine.render_chat, render = (
        lambda conversation, **options: (
            seen.append((conversation, options)) or render(conversation, **options)
        ),
        messages.engine.render_chat,
    )
    client = anthropic.Anthropic(base_url=messages.url, api_key="none", max_retries=0)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "snow"}]}
    try:
        client.messages.create(
            model="fake",
            max_tokens=20,
            tools=[WEATHER],
            system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            thinking={"type": "enabled", "budget_tokens": 1024},
            output_config={"effort": "xhigh"},
            messages=[
                {"role": "user", "content": "hello"},
                first.to_param(),
                {"role": "user", "content": [result, result | {"is_error": True, "content": "gone"}]},
                {"role": "user", "content": "And?"},
            ],
        )
    finally:
        messages.engine.render_chat = render
    ((conversation, options),) = seen
    assert conversation == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "I call.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": INPUT}}
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "snow"},
        {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "The tool failed:\ngone"},
        {"role": "user", "content": "And?"},
    ]
    assert options["variables"] == {"enable_thinking": True, "reasoning_effort": "high"}
    assert options["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": WEATHER["description"],
                "parameters": WEATHER["input_schema"],
            },
        }
    ]


@pytest.fixture
def rendered(messages):
    """The conversations that reach the chat template, with their options."""
    seen, render = [], messages.engine.render_chat

    def spy(conversation, **options):
        seen.append((conversation, options))
        return render(conversation, **options)

    messages.engine.render_chat = spy
    yield seen
    messages.engine.render_chat = render


def turn(role, *texts):
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


@pytest.mark.parametrize(
    ("given", "expected", "goes_on"),
    [
        ([turn("user", "a"), turn("user", "b", "c")], [("user", "a\nb\nc")], False),
        ([turn("user", "a"), turn("assistant", "b")], [("user", "a"), ("assistant", "b")], True),
        ([turn("user", "a"), turn("assistant", "")], [("user", "a")], False),
        ([turn("user", "a"), turn("assistant")], [("user", "a")], False),
        (
            [
                turn("user", "a"),
                {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
            ],
            [("user", "a")],
            False,
        ),
        (
            [turn("user"), turn("system", "b"), turn("user", "c")],
            [("user", ""), ("system", "b"), ("user", "c")],
            False,
        ),
    ],
)
def test_turns(ask, rendered, given, expected, goes_on):
    assert ask(messages=given).status_code == 200
    ((conversation, options),) = rendered
    assert [(message["role"], message["content"]) for message in conversation] == expected
    assert options["continue_final_message"] is goes_on and options["add_generation_prompt"] is not goes_on


@pytest.mark.parametrize(
    ("thinking", "variables"),
    [
        (None, {}),
        ({"type": "adaptive"}, {}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "enabled", "budget_tokens": 2048}, {"enable_thinking": True}),
    ],
)
def test_thinking_is_told_to_the_template(ask, rendered, thinking, variables):
    assert ask(thinking=thinking).status_code == 200
    assert rendered[0][1]["variables"] == variables


def test_tokens_are_counted(messages, ask):
    client = anthropic.Anthropic(base_url=messages.url, api_key="none", max_retries=0)
    count = client.messages.count_tokens(
        model="fake",
        system="Be brief.",
        messages=[{"role": "user", "content": "hello"}],
        tools=[WEATHER],
    )
    assert count.input_tokens == len("Be brief.hello")
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    response = messages.post(f"{PATH}/count_tokens?beta=true", **body)
    check(response.json(), types.MessageTokensCount)
    check_error(messages.post(f"{PATH}/count_tokens", model="fake"), 400, "invalid_request_error")


def test_cached_tokens_are_none_of_the_input(messages, ask):
    """Anthropic's input_tokens are what was not read from the cache."""
    step = messages.engine.step

    def with_cached():
        outputs = step()
        for output in outputs:
            output.num_cached_tokens = 2
        return outputs

    messages.engine.step = with_cached
    try:
        usage = ask("yes").json()["usage"]
        start, *_, stop, _ = events(ask("yes", stream=True))
    finally:
        messages.engine.step = step
    assert usage == {
        "input_tokens": 3,
        "cache_read_input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "output_tokens": 3,
    }
    assert stop["usage"] == usage and start["message"]["usage"]["output_tokens"] == 0


def test_headers_and_queries_of_the_clients(ask):
    for headers in ({}, {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "x-api-key": "k"}):
        response = ask("hello", f"{PATH}?beta=true", headers=headers)
        assert response.status_code == 200
        assert response.headers["request-id"] == response.headers["x-request-id"]


def test_a_runner_of_tools_goes_on_without_threads(messages, ask, rendered):
    """Its client asks for a thread, that its second turn may bring new messages alone."""
    response = ask("hello", thread={"type": "create"})
    assert response.status_code == 400
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert response.json()["error"]["details"] == details

    @anthropic.beta_tool
    def weather(city: str, days: int) -> str:
        """The weather in a city."""
        return f"{city}: rain for {days} days"

    messages.engine.answer = messages.engine.encode(CALL)
    client = anthropic.Anthropic(base_url=messages.url, api_key="none", max_retries=0)
    runner = client.beta.messages.tool_runner(
        model="fake", max_tokens=400, max_iterations=2, tools=[weather], messages=[turn("user", "hello")]
    )
    assert [answer.stop_reason for answer in runner] == ["tool_use", "tool_use"]
    first, second = (conversation for conversation, _ in rendered)
    assert second[: len(first)] == first and [each["role"] for each in second[1:]] == ["assistant", "tool"]
    assert second[-1]["content"] == "Osl\u00f6: rain for 2 days"


def test_what_changes_no_answer_is_taken(messages, ask, rendered):
    server_tool = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    response = ask(
        "hello",
        tools=[WEATHER, server_tool],
        metadata={"user_id": "me"},
        service_tier="auto",
        container=None,
        inference_geo="eu",
        cache_control={"type": "ephemeral"},
    )
    assert response.status_code == 200, response.text
    assert [tool["function"]["name"] for tool in rendered[0][1]["tools"]] == ["weather"]
    unknown = messages.context.unknown_fields
    assert unknown["tools of type web_search_20250305"] == 1
    assert not {"metadata", "service_tier", "container", "inference_geo", "cache_control"} & unknown.keys()


def test_a_request_of_claude_code(messages, ask, rendered):
    """As version 2.1.332 sends it: max_tokens beyond any context here, a system message in the middle."""
    assert messages.http.head("/").status_code == 200  # its first request
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    tool = WEATHER | {"eager_input_streaming": True} | cached
    found = events(
        ask(
            "hello",
            f"{PATH}?beta=true",
            {"anthropic-version": "2023-06-01", "anthropic-beta": "claude-code-20250219,effort-2025-11-24"},
            max_tokens=32000,
            stream=True,
            thinking={"type": "adaptive"},
            output_config={"effort": "high"},
            context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            metadata={"user_id": "{}"},
            temperature=1,
            tools=[tool],
            system=[
                {"type": "text", "text": "Be Claude Code."},
                {"type": "text", "text": "Be brief."} | cached,
            ],
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"} | cached],
                },
                {"role": "system", "content": "It is Monday."},
            ],
        )
    )
    check_order(found)
    assert found[-2]["delta"]["stop_reason"] == "end_turn"
    ((conversation, options),) = rendered
    assert [(message["role"], message["content"]) for message in conversation] == [
        ("system", "Be Claude Code.\nBe brief."),
        ("user", "a\nb"),
        ("system", "It is Monday."),
    ]
    assert [tool["function"]["name"] for tool in options["tools"]] == ["weather"]
    assert options["variables"] == {"reasoning_effort": "high"}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
SCHEMA = {"type": "json_schema", "schema": {"type": 5}}
REFUSED = {
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "reads text only"),
    "document": ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "reads text only"),
    "image in a result": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [IMAGE]}]}
            ]
        },
        "reads text only",
    ),
    "block of the other role": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}
            ]
        },
        "'tool_use'",
    ),
    "block without a type": (
        {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
        "messages[0].content",
    ),
    "block that is none": ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content"),
    "text that is none": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        "'messages[0].content.0.text'",
    ),
    "content": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    "no content": ({"messages": [{"role": "user"}]}, "content"),
    "role": ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
    "no messages": ({"messages": []}, "messages"),
    "too many": ({"messages": [turn("user", "a")] * 5000}, "messages"),
    "max_tokens": ({"max_tokens": None}, "max_tokens"),
    "temperature": ({"temperature": -1}, "temperature"),
    "tool": ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0]"),
    "schema of a tool": ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "object"),
    "no schema": ({"tools": [{"name": "a"}]}, "input_schema"),
    "two tools": ({"tools": [WEATHER, WEATHER]}, "two tools are named 'weather'"),
    "choice": ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "b"}}, "none of the tools"),
    "choice without tools": ({"tool_choice": {"type": "any"}}, "there are no tools"),
    "output": ({"output_config": {"format": SCHEMA}}, "output_config"),
    "field of another format": ({"n": 2}, "n"),
    "another": ({"response_format": {"type": "json_object"}}, "response_format"),
    "field of another server": ({"mirostat": 1}, "mirostat"),
    "context": ({"messages": [turn("user", "x" * 9000)]}, "the context holds 4096"),
    "thinking": ({"thinking": {"type": "deeply"}}, "thinking"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(ask, name, stream):
    fields, words = REFUSED[name]
    assert words in check_error(ask("hello", stream=stream, **fields), 400, "invalid_request_error")


def test_errors_of_paths_and_bodies(messages, ask):
    assert "fake:sleb-2" in check_error(ask("hello", model="claude-9"), 404, "not_found_error")
    check_error(messages.http.post(PATH, content=b"{"), 400, "invalid_request_error")
    check_error(messages.http.post(PATH, content=b"[]"), 400, "invalid_request_error")
    check_error(messages.http.get(PATH), 405, "invalid_request_error")
    check_error(messages.http.post(PATH, content=b"x" * (5 * 2**20)), 413, "request_too_large")


def test_errors_of_a_server(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",), max_num_seqs=1, max_queue=0)
    body = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    check_error(server.post(PATH, **body), 401, "authentication_error")
    server.http.headers["x-api-key"] = "key"
    fake_engine.hold.clear()
    with server.http.stream("POST", PATH, json=body | {"stream": True}):
        response = server.post(PATH, **body)
        check_error(response, 529, "overloaded_error")
        assert response.headers["retry-after"] == "1"
        fake_engine.hold.set()
    server.wait_idle()
    fake_engine.render_chat = lambda *_, **__: 1 / 0
    check_error(server.post(PATH, **body), 500, "api_error")


def test_the_client_tries_again_when_the_server_is_full(serve_engine, fake_engine):
    server = serve_engine(fake_engine, max_num_seqs=1, max_queue=0)
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=3)
    body = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    with server.http.stream("POST", PATH, json=body | {"stream": True}) as held:
        answer = client.messages.create(**body)
        held.read()
    assert answer.content[0].text == "hello"


def test_pings_in_silence_and_an_error_at_the_end(serve_engine, fake_engine):
    server = serve_engine(fake_engine, keep_alive_seconds=0.05)
    fake_engine.delay = 0.2
    fake_engine.fail_after = 3
    body = {"model": "fake", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
    *found, last = events(server.post(PATH, stream=True, **body))
    kinds = [event["type"] for event in found]
    assert kinds.count("ping") >= 2
    assert [kind for kind in kinds if kind != "ping"] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
    ]
    assert check(last, types.ErrorResponse).error.type == "api_error"
    check_error(server.post(PATH, **body), 503, "api_error")


def test_a_client_that_leaves_ends_its_request(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    body = {"model": "fake", "max_tokens": 200, "messages": [{"role": "user", "content": "x" * 200}]}
    with server.http.stream("POST", PATH, json=body | {"stream": True}) as response:
        next(response.iter_lines())
    server.wait_idle()
    assert fake_engine.num_steps < 100


def test_models_as_the_client_lists_them(messages):
    client = anthropic.Anthropic(base_url=messages.url, api_key="none", max_retries=0)
    listed = client.models.list()
    assert [model.id for model in listed] == ["fake:sleb-1", "fake", "fake:sleb-2"]
    for model in listed.data:
        TypeAdapter(types.ModelInfo).validate_python(model.model_dump(), strict=True)
    assert client.models.retrieve("fake:sleb-1").max_input_tokens == 4096

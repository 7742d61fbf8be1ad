"""Ollama's paths over a socket: answers and lines against the types of Ollama's own client, which is asked too."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

ollama = pytest.importorskip("ollama", reason="needs ollama, which the extra 'dev' brings")

SUM = {
    "type": "function",
    "function": {
        "name": "sum",
        "description": "A sum",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
            "required": ["a"],
        },
    },
}
CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": [2, 3]}}\n</tool_call>'
CALLED = {"name": "sum", "arguments": {"a": 1, "b": [2, 3]}}
FIGURES = {
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
}

# What the engine says, fields of the request, the message that it makes, and the reason of its end.
CHATS = {
    "text": ("Hello, \u4e16\u754c!", {}, {"content": "Hello, \u4e16\u754c!"}, "stop"),
    "cut": ("hello", {"options": {"num_predict": 3}}, {"content": "hel"}, "length"),
    "endless": ("hello", {"options": {"num_predict": -2, "num_ctx": 10**6}}, {"content": "hello"}, "stop"),
    "stopped": ("hello", {"options": {"stop": ["l"]}}, {"content": "he"}, "stop"),
    "options beside": ("hello", {"num_predict": 2, "options": {"seed": 5}}, {"content": "he"}, "length"),
    "thoughts": ("<think>hm</think>yes", {"think": True}, {"content": "yes", "thinking": "hm"}, "stop"),
    "thoughts hard": ("<think>hm</think>", {"think": "high"}, {"content": "", "thinking": "hm"}, "stop"),
    "calls": (
        f"<think>hm</think>I call.{CALL}{CALL}",
        {"tools": [SUM]},
        {"content": "I call.", "thinking": "hm", "tool_calls": [CALLED, CALLED]},
        "stop",
    ),
    "call that is cut": (
        CALL,
        {"tools": [SUM], "options": {"num_predict": CALL.index(', "b') + 2}},
        {"content": "", "tool_calls": [{"name": "sum", "arguments": {"a": 1}}]},
        "length",
    ),
    "json": ('{"age":1}', {"format": "json"}, {"content": '{"age":1}'}, "stop"),
    "schema": ('{"age":1}', {"format": {"type": "object"}}, {"content": '{"age":1}'}, "stop"),
}
GENERATES = {
    "text": ("h\u00e9llo", {}, "h\u00e9llo", "", "stop"),
    "raw": ("hello", {"raw": True, "options": {"num_predict": 2}}, "he", "", "length"),
    "raw as it is": ("<think>hm</think>yes", {"raw": True}, "<think>hm</think>yes", "", "stop"),
    "thoughts": ("<think>hm</think>yes", {"think": False, "system": "Be brief."}, "yes", "hm", "stop"),
    "json": (
        '{"age":1}',
        {"format": "json", "suffix": "", "template": "", "context": []},
        '{"age":1}',
        "",
        "stop",
    ),
    "raw json": ('{"age":1}', {"format": "json", "raw": True}, '{"age":1}', "", "stop"),
}


@pytest.fixture(scope="module")
def served(start_server, make_fake_engine):
    """A server whose engine says what its `answer` is; its template knows tools and thoughts."""
    engine = make_fake_engine(max_model_len=4096)
    engine.chat_template = "{{ tools }} <think> enable_thinking reasoning_effort"
    running = start_server(engine)
    yield running
    running.close()


@pytest.fixture
def ask(served):
    """ask(path, text, **fields): the answer of an engine that says `text`."""

    def post(path, text=None, **fields):
        served.engine.answer = None if text is None else served.engine.encode(text)
        body = {"model": "fake"}
        body |= (
            {"messages": [{"role": "user", "content": "hello"}]}
            if path == "/api/chat"
            else {"prompt": "hello"}
        )
        return served.http.post(path, json=body | fields)

    yield post
    served.engine.answer = None


@pytest.fixture
def client(served):
    return ollama.Client(host=served.url)


@pytest.fixture
def rendered(served):
    """The conversations that reach the chat template, with their options."""
    seen, render = [], served.engine.render_chat

    def spy(conversation, **options):
        seen.append((conversation, options))
        return render(conversation, **options)

    served.engine.render_chat = spy
    yield seen
    served.engine.render_chat = render


def check(value, type_, *, extra=()):
    """Validates; every field is one that the client's type knows."""
    assert value.keys() <= {*type_.model_fields, *extra}, value
    datetime.fromisoformat(value["created_at"])
    return type_.model_validate(value)


def lines(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def check_figures(answer, num_prompt, num_output):
    assert answer.keys() >= FIGURES
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (num_prompt, num_output)
    durations = {name: answer[name] for name in FIGURES if name.endswith("duration")}
    assert all(isinstance(each, int) and each > 0 for each in durations.values())
    parts = sum(durations.values()) - durations["total_duration"]
    assert abs(parts - durations["total_duration"]) <= 3  # of rounding


def message_of(chat):
    message = {name: value for name, value in chat["message"].items() if name != "role"}
    assert chat["message"]["role"] == "assistant"
    if "tool_calls" in message:
        assert [call["function"].pop("index") for call in message["tool_calls"]] == list(
            range(len(message["tool_calls"]))
        )
        message["tool_calls"] = [call["function"] for call in message["tool_calls"]]
    return message


@pytest.mark.parametrize("name", CHATS)
def test_chats(ask, name):
    text, fields, message, reason = CHATS[name]
    response = ask("/api/chat", text, stream=False, **fields)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    check(answer, ollama.ChatResponse)
    check_figures(answer, len("hello"), answer["eval_count"])
    assert message_of(answer) == message
    assert (answer["done"], answer["done_reason"], answer["model"]) == (True, reason, "fake")


@pytest.mark.parametrize("name", CHATS)
def test_streamed_chats(ask, name):
    """A stream is what an answer is when nothing is said; each line has a part, the last one the figures."""
    text, fields, message, reason = CHATS[name]
    found = lines(ask("/api/chat", text, **fields))
    joined = {}
    calls = []
    for each in found:
        check(each, ollama.ChatResponse)
        assert each["done"] is (each is found[-1])
        assert (each.keys() & FIGURES == FIGURES) is each["done"]
        part = each["message"]
        calls += part.get("tool_calls", [])
        for field in ("content", "thinking"):
            if field in part:
                joined[field] = joined.get(field, "") + part[field]
    if calls:
        joined["tool_calls"] = calls
    assert message_of({"message": joined | {"role": "assistant"}}) == message
    assert found[-1]["done_reason"] == reason
    check_figures(found[-1], len("hello"), found[-1]["eval_count"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", GENERATES)
def test_generate(ask, name, stream):
    text, fields, response, thinking, reason = GENERATES[name]
    answer = ask("/api/generate", text, stream=stream, **fields)
    found = lines(answer) if stream else [answer.json()]
    for each in found:
        check(each, ollama.GenerateResponse)
        assert each["done"] is (each is found[-1])
    assert "".join(each["response"] for each in found) == response
    assert "".join(each.get("thinking", "") for each in found) == thinking
    assert found[-1]["done_reason"] == reason
    num_prompt = len("hello") + len(fields.get("system", ""))
    check_figures(found[-1], num_prompt, found[-1]["eval_count"])


def test_the_client_chats(served, client, rendered):
    """A call, its result fed back, and a stream, by Ollama's client."""
    served.engine.answer = served.engine.encode(f"<think>hm</think>{CALL}")
    messages = [{"role": "user", "content": "hello"}]
    first = client.chat("fake", messages, tools=[SUM], think=True, options={"temperature": 0})
    assert first.message.thinking == "hm" and first.message.tool_calls[0].function.arguments["a"] == 1
    messages += [first.message, {"role": "tool", "tool_name": "sum", "content": "6"}]
    parts = list(client.chat("fake", messages, tools=[SUM], stream=True, keep_alive="5m", format=""))
    assert parts[-1].done and parts[-1].eval_count > 0
    served.engine.answer = None
    conversation, options = rendered[-1]
    assert conversation[1:] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": CALLED}],
        },
        {"role": "tool", "name": "sum", "content": "6"},
    ]
    assert options["tools"] == [SUM]
    assert rendered[0][1]["variables"] == {"enable_thinking": True}


def test_the_client_generates(served, client):
    answer = client.generate(
        "fake", "hello", system="S", options={"num_predict": 3, "num_gpu": 1, "num_ctx": 8}
    )
    assert (answer.response, answer.done_reason) == ("She", "length")
    assert [part.response for part in client.generate("fake", "abc", stream=True)][:3] == ["a", "b", "c"]


@pytest.mark.parametrize("think", [None, False, True, "low"])
def test_thinking_is_told_to_the_template(ask, rendered, think):
    assert ask("/api/chat", think=think).status_code == 200
    expected = {} if think is None else {"enable_thinking": think is not False}
    if think == "low":
        expected["reasoning_effort"] = "low"
    assert rendered[0][1]["variables"] == expected


def test_a_model_that_cannot_think_is_not_asked_to(server):
    """`server` has no template that knows thoughts."""
    message = [{"role": "user", "content": "hello"}]
    response = server.post("/api/chat", model="fake", messages=message, think=True)
    assert (response.status_code, response.json()) == (400, {"error": "'fake' does not support thinking"})
    assert server.post("/api/chat", model="fake", messages=message, think=False).status_code == 200


def test_log_probabilities(ask, client, served):
    whole = ask("/api/chat", "h\u00e9y", stream=False, logprobs=True, top_logprobs=2).json()
    found = lines(ask("/api/chat", "h\u00e9y", logprobs=True, top_logprobs=2))
    joined = [token for each in found for token in each.get("logprobs", [])]
    assert joined == whole["logprobs"] and len(joined) == whole["eval_count"]
    assert [len(token["top_logprobs"]) for token in joined] == [2] * len(joined)
    assert b"".join(bytes(token["bytes"]) for token in joined).decode() == "h\u00e9y"
    answer = client.generate("fake", "hello", logprobs=True)
    assert answer.logprobs[0].logprob == -1.5
    for each in [whole, *found]:
        check(each, ollama.ChatResponse)


def test_options_reach_the_engine(served, ask):
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "num_thread": 4,
        "num_keep": 5,
    }
    assert ask("/api/chat", "x", options=options).status_code == 200
    params = served.engine.seen[-1][1]
    told = {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    assert told == {name: options[name] for name in told}
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)


@pytest.mark.parametrize("name", ["fake:latest", "FAKE", "fake:sleb-2", "fake:sleb-2:latest"])
def test_names_with_and_without_a_tag(served, ask, name):
    answer = ask("/api/chat", "yes", model=name, stream=False).json()
    assert answer["model"] == name
    assert served.engine.seen[-1][2] == (2 if "2" in name else 0)


def test_loading(client, served):
    assert client.generate("fake").done_reason == "load"
    answer = served.post("/api/chat", model="fake", messages=[])
    assert answer.json()["done_reason"] == "load" and answer.json()["done"] is True
    check(answer.json(), ollama.ChatResponse)


def test_what_is_served(client, served):
    models = client.list().models
    assert [model.model for model in models] == ["fake:sleb-1", "fake", "fake:sleb-2"]
    assert [model.size for model in models] == [5000, 6000, 4000]
    details = models[0].details
    assert (details.family, details.parent_model, details.quantization_level) == ("fake", "fake", "BF16")
    assert [model.context_length for model in client.ps().models] == [4096] * 3
    shown = client.show("fake:latest")
    assert shown.modelinfo["general.architecture"] == "fake"
    assert shown.modelinfo["fake.context_length"] == 4096
    assert shown.modelinfo["general.parameter_count"] == 3000
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.template == served.engine.chat_template
    assert served.http.head("/api/version").status_code == 200
    assert served.http.get("/api/version").json().keys() == {"version"}
    names = [model["name"] for model in served.http.get("/api/tags").json()["models"]]
    assert names == [model.model for model in models]


IMAGE = [{"role": "user", "content": "a", "images": ["aaaa"]}]
REFUSED = {
    "image": ("/api/chat", {"messages": IMAGE}, "reads text only"),
    "image of a prompt": ("/api/generate", {"images": ["aaaa"]}, "reads text only"),
    "role": ("/api/chat", {"messages": [{"role": "robot", "content": "a"}]}, "role"),
    "content": ("/api/chat", {"messages": [{"role": "user", "content": [1]}]}, "messages[0].content"),
    "messages": ("/api/chat", {"messages": "a"}, "messages"),
    "arguments": (
        "/api/chat",
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{}"}}]}]},
        "arguments",
    ),
    "template": ("/api/generate", {"template": "{{ .Prompt }}"}, "--chat-template"),
    "suffix": ("/api/generate", {"suffix": "x"}, "suffix"),
    "context": ("/api/generate", {"context": [1, 2]}, "context"),
    "system of a raw prompt": ("/api/generate", {"raw": True, "system": "a"}, "system"),
    "thoughts of a raw prompt": ("/api/generate", {"raw": True, "think": True}, "think"),
    "option": ("/api/chat", {"options": {"mirostat": 2}}, "mirostat"),
    "option out of range": ("/api/chat", {"options": {"temperature": -1}}, "temperature"),
    "options": ("/api/chat", {"options": [1]}, "options"),
    "format": ("/api/chat", {"format": "xml"}, "format"),
    "schema": ("/api/chat", {"format": {"type": 5}}, "format"),
    "think": ("/api/chat", {"think": "deeply"}, "think"),
    "field of another format": ("/api/chat", {"n": 2}, "n is not a field"),
    "tools of a prompt": ("/api/generate", {"tools": [SUM]}, "tools"),
    "top_logprobs": ("/api/chat", {"top_logprobs": 2}, "top_logprobs"),
    "context length": ("/api/generate", {"prompt": "x" * 9000}, "the context holds 4096"),
    "raw context length": ("/api/generate", {"prompt": "x" * 9000, "raw": True}, "the context holds 4096"),
}


def check_error(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    return response.json()["error"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(ask, name, stream):
    path, fields, words = REFUSED[name]
    assert words in check_error(ask(path, "hello", stream=stream, **fields), 400)


def test_errors_that_the_client_knows(served, client):
    with pytest.raises(ollama.ResponseError, match="model 'llama9' not found") as caught:
        client.chat("llama9", [{"role": "user", "content": "hello"}])
    assert caught.value.status_code == 404
    for call in (
        lambda: client.embed("fake", "a"),
        lambda: client.pull("fake"),
        lambda: client.copy("fake", "b"),
        lambda: client.delete("fake"),
    ):
        with pytest.raises(ollama.ResponseError) as caught:
            call()
        assert caught.value.status_code == 501
    check_error(served.post("/api/show", model="llama9"), 404)
    check_error(served.http.post("/api/chat", content=b"{"), 400)
    check_error(served.http.get("/api/chat"), 405)


def test_errors_of_a_server(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",), keep_alive_seconds=0.05)
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    check_error(server.post("/api/chat", **body), 401)
    check_error(server.http.get("/api/tags"), 401)
    server.http.headers["Authorization"] = "Bearer key"
    fake_engine.delay, fake_engine.fail_after = 0.1, 3
    *found, last = lines(server.post("/api/chat", **body))  # and nothing is said in silence
    assert [each["message"]["content"] for each in found] == ["h", "e"]
    assert last.keys() == {"error"}
    check_error(server.post("/api/chat", **body), 503)


def test_a_client_that_leaves_ends_its_request(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.delay = 0.02
    with server.http.stream("POST", "/api/generate", json={"prompt": "x" * 200}) as response:
        next(response.iter_lines())
    server.wait_idle()
    assert fake_engine.num_steps < 100

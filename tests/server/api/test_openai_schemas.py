"""Answers, chunks and errors against OpenAI's own description of them (openai_schemas.json), required keys included.

Two engines answer the same requests: the fake one repeats the prompt, calls and thoughts in it too; the real one is a
random model. Fields that the description does not know are allowed by it. Where it contradicts itself, or the API that
it describes, is said at the place.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

DESCRIPTION = json.loads(Path(__file__).with_name("openai_schemas.json").read_text(encoding="utf-8"))
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
)


def with_nulls(value):
    """The schema without `nullable`, a keyword of OpenAPI 3.0 that the description (3.1) still has in places."""
    if isinstance(value, list):
        return [with_nulls(each) for each in value]
    if not isinstance(value, dict):
        return value
    schema = {key: with_nulls(each) for key, each in value.items() if key != "nullable"}
    return {"anyOf": [schema, {"type": "null"}]} if value.get("nullable") is True else schema


SCHEMAS = with_nulls(DESCRIPTION["$defs"])


def check(value, name):
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMAS}).validate(value)


def check_completion_chunk(chunk):
    """The description has one schema for whole completions and their chunks, with a reason in every choice.

    The API itself sends null until the end, and null for the usage but at the end, as the request's schema says.
    """
    choices = [
        choice | ({"finish_reason": "stop"} if choice["finish_reason"] is None else {})
        for choice in chunk["choices"]
    ]
    told = {key: value for key, value in chunk.items() if key != "usage" or value is not None}
    check(told | {"choices": choices}, "CreateCompletionResponse")


def check_error(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    check(response.json(), "ErrorResponse")
    return response.json()["error"]


def events(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    data = [event.removeprefix("data: ") for event in response.text.strip().split("\n\n")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


@pytest.fixture(scope="module")
def real_engine(tiny_model_dir, tiny_chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "tiny-llama"
    shutil.copytree(tiny_model_dir, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return Engine(
        EngineConfig(
            model=str(folder),
            layer_map=tiny_chain,
            tiers=(0, 3),
            dtype="float32",
            device="cpu",
            kv_cache_memory=0.02,
        )
    )


@pytest.fixture(scope="module", params=["fake", "real"])
def both(request, server, start_server):
    """A server over either engine; the fake one's template is one of a model that thinks."""
    if request.param == "fake":
        server.engine.chat_template = TEMPLATE + "<think>"
        server.engine.max_model_len = 4000
        yield server
        return
    running = start_server(request.getfixturevalue("real_engine"), max_num_seqs=8)
    yield running
    running.wait_idle()
    running.engine.check_integrity()
    running.close()


CALL = '<tool_call>\n{"name": "sum", "arguments": {"a": 1, "b": [2, "x"]}}\n</tool_call>'
SUM = {
    "name": "sum",
    "parameters": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]},
}
NOW = {"name": "now", "description": "The time"}
TOOLS = [{"type": "function", "function": each} for each in (SUM, NOW)]
PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
CHATS = {
    "plain": ("Hello, 世界!", {}),
    "two": ("hello", {"n": 2, "seed": 5}),
    "long": ("hello", {"max_completion_tokens": 3, "ignore_eos": True}),
    "stopped": ("hello", {"stop": ["l", "e", "\u00e9"]}),
    "logprobs": ("h\u00e9llo", {"logprobs": True}),
    "top logprobs": ("h\u00e9llo", {"logprobs": True, "top_logprobs": 5, "n": 2}),
    "token ids": ("hello", {"return_token_ids": True, "logprobs": True}),
    "thoughts": ("<think>hm</think>yes", {}),
    "thoughts alone": ("<think>hm", {}),
    "thoughts and calls": ("<think>hm</think>I call. " + CALL, {"tools": TOOLS}),
    "tools that are not called": ("hello", {"tools": TOOLS, "tool_choice": "auto"}),
    "tools none": (CALL, {"tools": TOOLS, "tool_choice": "none"}),
    "tools auto": (CALL + CALL, {"tools": TOOLS}),
    "tools required": (CALL + CALL, {"tools": TOOLS, "tool_choice": "required", "logprobs": True}),
    "tools one": (CALL * 2, {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}),
    "tools named": (CALL, {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "sum"}}}),
    "functions": (CALL, {"functions": [SUM], "function_call": "auto"}),
    "function named": (CALL, {"functions": [SUM], "function_call": {"name": "sum"}}),
    "json object": ('{"a":1}', {"response_format": {"type": "json_object"}}),
    "json schema": ('{"age":1}', {"response_format": JSON_SCHEMA}),
    "json schema and tools": ('{"age":1}', {"response_format": JSON_SCHEMA, "tools": TOOLS}),
}
COMPLETIONS = {
    "plain": ("Hello, 世界!", {}),
    "two": ("hello", {"n": 2, "best_of": 2}),
    "many": (["hello", "you"], {"n": 2}),
    "ids": ([[5, 6], [7]], {"max_tokens": 1}),
    "logprobs": ("h\u00e9llo", {"logprobs": 3}),
    "own logprobs": ("h\u00e9llo", {"logprobs": 0}),
    "echo": ("h\u00e9llo", {"echo": True}),
    "scored": ("h\u00e9llo", {"echo": True, "logprobs": 2, "max_tokens": 0}),
    "echo and logprobs": (["h\u00e9llo", "you"], {"echo": True, "logprobs": 2, "max_tokens": 2}),
    "json": ('{"age":1}', {"response_format": JSON_SCHEMA}),
    "stopped": ("hello", {"stop": "l", "return_token_ids": True}),
}
STREAM_OPTIONS = {
    "": None,
    "usage": {"include_usage": True},
    "continuous": {"include_usage": True, "continuous_usage_stats": True},
}


def chat_fields(name):
    text, fields = CHATS[name]
    return {
        "max_tokens": max(30, len(text)),
        "seed": 1,
        "messages": [{"role": "user", "content": text}],
    } | fields


def completion_fields(name):
    prompt, fields = COMPLETIONS[name]
    return {"max_tokens": 8, "seed": 1, "prompt": prompt} | fields


def check_echoed(choices):
    """Takes the first log-probability out: null, which the description does not know and the API sends."""
    for choice in choices:
        logprobs = choice["logprobs"]
        if logprobs is not None:
            assert logprobs["token_logprobs"].pop(0) is None
            assert logprobs["top_logprobs"].pop(0) is None


@pytest.mark.parametrize("name", CHATS)
def test_chats(both, name):
    fields = chat_fields(name)
    response = both.post("/v1/chat/completions", **fields)
    assert response.status_code == 200, response.text
    check(response.json(), "CreateChatCompletionResponse")
    assert len(response.json()["choices"]) == fields.get("n", 1)


@pytest.mark.parametrize("options", STREAM_OPTIONS)
@pytest.mark.parametrize("name", CHATS)
def test_streamed_chats(both, name, options):
    fields = chat_fields(name) | {"stream": True, "stream_options": STREAM_OPTIONS[options]}
    chunks = events(both.post("/v1/chat/completions", **fields))
    for chunk in chunks:
        check(chunk, "CreateChatCompletionStreamResponse")
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert [chunk["choices"] for chunk in chunks].count([]) == bool(options)
    assert ("usage" in chunks[0]) == bool(options)


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(both, name):
    fields = completion_fields(name)
    response = both.post("/v1/completions", **fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    if fields.get("echo"):
        check_echoed(answer["choices"])
    check(answer, "CreateCompletionResponse")


@pytest.mark.parametrize("options", STREAM_OPTIONS)
@pytest.mark.parametrize("name", COMPLETIONS)
def test_streamed_completions(both, name, options):
    fields = completion_fields(name) | {"stream": True, "stream_options": STREAM_OPTIONS[options]}
    chunks = events(both.post("/v1/completions", **fields))
    begun = set()
    for chunk in chunks:
        if fields.get("echo"):
            check_echoed([choice for choice in chunk["choices"] if choice["index"] not in begun])
        begun |= {choice["index"] for choice in chunk["choices"]}
        check_completion_chunk(chunk)
    assert [chunk["choices"] for chunk in chunks].count([]) == bool(options)


@pytest.mark.parametrize("both", ["fake"], indirect=True)
def test_what_the_answers_were(both):
    """So that the schemas above have met calls and thoughts."""

    def message(name):
        return both.post("/v1/chat/completions", **chat_fields(name)).json()["choices"][0]["message"]

    assert len(message("tools auto")["tool_calls"]) == 2
    assert len(message("tools one")["tool_calls"]) == 1
    assert message("functions")["function_call"]["name"] == "sum"
    assert message("thoughts and calls")["reasoning_content"] == "hm"


def test_models(both):
    models = both.http.get("/v1/models").json()
    check(models, "ListModelsResponse")
    assert len(models["data"]) > 1
    for model in models["data"]:
        check(both.http.get(f"/v1/models/{model['id']}").json(), "Model")


REFUSED = {
    "model": (404, "model_not_found", {"model": "gpt-9"}),
    "range": (400, None, {"temperature": -1}),
    "type": (400, None, {"temperature": "hot"}),
    "feature": (400, "unsupported", {"modalities": ["audio"], "suffix": "x"}),
    "grammar": (
        400,
        None,
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
    ),
    "context": (400, "context_length_exceeded", {"messages": [{"role": "user", "content": "x" * 5000}]}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_refusals(both, name, stream):
    status, code, fields = REFUSED[name]
    fields = {"stream": stream} | fields
    error = check_error(both.post("/v1/chat/completions", **(chat_fields("plain") | fields)), status)
    assert error["code"] == code
    if "messages" in fields:
        fields = {"stream": stream, "prompt": "x" * 5000}
    error = check_error(both.post("/v1/completions", **(completion_fields("plain") | fields)), status)
    assert error["code"] == code


def test_errors_of_paths_methods_and_bodies(both):
    check_error(both.http.get("/v1/nothing"), 404)
    check_error(both.http.get("/v1/models/gpt-9"), 404)
    check_error(both.http.get("/v1/completions"), 405)
    check_error(both.http.post("/v1/completions", content=b"{"), 400)
    check_error(both.post("/tokenize"), 400)
    check_error(both.http.get("/health", headers={"X-Big": "x" * 70_000}), 431)
    assert check_error(both.post("/v1/embeddings", input="x"), 501)["code"] == "unsupported"


def test_errors_of_a_server(serve_engine, fake_engine):
    server = serve_engine(
        fake_engine, api_keys=("key",), max_body_mb=1000 / 2**20, max_num_seqs=1, max_queue=0
    )
    assert check_error(server.complete(), 401)["code"] == "invalid_api_key"
    server.http.headers["Authorization"] = "Bearer key"
    check_error(server.complete("x" * 2000), 413)
    fake_engine.hold.clear()
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}):
        assert check_error(server.complete(), 503)["code"] == "overloaded"
        fake_engine.hold.set()
    server.wait_idle()
    fake_engine.render_chat = lambda *_, **__: 1 / 0
    check_error(server.chat(), 500)


def test_errors_of_a_request_that_takes_too_long(serve_engine, fake_engine):
    server = serve_engine(fake_engine, request_timeout=1.0)
    fake_engine.delay = 0.3
    assert check_error(server.complete(), 504)["code"] == "timeout"
    *chunks, last = events(server.complete("hello", stream=True))
    for chunk in chunks:
        check_completion_chunk(chunk)
    check(last, "ErrorResponse")
    assert last["error"]["code"] == "timeout"
    server.wait_idle()


def test_errors_of_a_dying_engine(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.fail_after = 3
    *chunks, last = events(server.complete("hello", stream=True))
    assert len(chunks) == 2
    for chunk in chunks:
        check_completion_chunk(chunk)
    check(last, "ErrorResponse")
    assert last["error"]["code"] == "engine_dead"
    for path in ("/health", "/ready"):
        assert check_error(server.http.get(path), 503)["code"] == "engine_dead"
    assert check_error(server.chat(), 503)["code"] == "engine_dead"


def test_schemas_can_be_broken(both):
    """The validator reads references and unfolded nulls: a missing key and a wrong type are found."""
    answer = both.chat(max_tokens=3).json()
    for broken in ({"object": "chat"}, {"choices": [{"index": 0}]}, {"usage": {}}, {"created": "now"}):
        with pytest.raises(jsonschema.ValidationError):
            check(answer | broken, "CreateChatCompletionResponse")
    chunk = events(both.chat(max_tokens=3, stream=True))[0]
    for broken in ({"finish_reason": "done"}, {"logprobs": {"content": 5}}, {"delta": {"role": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            check(chunk | {"choices": [chunk["choices"][0] | broken]}, "CreateChatCompletionStreamResponse")

"""Every refusal: its status, its code, and the shape that OpenAI clients parse."""

from __future__ import annotations

import http.client
import json
import socket
from contextlib import closing

import pytest


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"n": 100}, "n"),  # allowed, but more than this server's queue will ever hold
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": -2, "max_completion_tokens": 1}, "max_tokens"),
        ({"max_completion_tokens": -2}, "max_completion_tokens"),
        ({"max_tokens": 2**64}, "max_tokens"),
        ({"seed": -(2**63) - 1}, "seed"),  # as a float it would be rounded into the range
        ({"max_tokens": 1, "min_tokens": 2}, "min_tokens"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 5000}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {" 1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, "tools[0]"),
        ({"tools": [{"function": {"name": "a"}}], "functions": [{"name": "b"}]}, "functions"),
        ({"tools": [{"function": {"name": "a"}}], "tool_choice": {"function": {"name": "b"}}}, "tool_choice"),
        ({"functions": [{}]}, "functions[0]"),
        ({"function_call": {"name": "a"}}, "function_call"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": 0}}, "response_format"),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs"),
        ({"structured_outputs": {"json": 0}}, "structured_outputs"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "function_call": 5}]}, "messages[0].function_call"),
        (
            {"messages": [{"role": "assistant", "function_call": {"name": "a", "arguments": []}}]},
            "messages[0].function_call",
        ),
        ({"messages": [{"role": "user", "content": "forbidden"}]}, "messages"),  # the template says so
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chat_fields(serve_small, fields, param, stream):
    fields = {"messages": [{"role": "user", "content": "a"}], "stream": stream} | fields
    error = error_of(serve_small.post("/v1/chat/completions", **fields), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.fixture(scope="module")
def serve_small(server):
    """The shared server, with a queue that n=100 does not fit."""
    server.context.engine.max_open = 50
    return server


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": [2**64]}, "prompt"),
        ({"prompt": [[1, 1e300]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 30}, "logprobs"),
        ({"echo": 1}, "echo"),
    ],
)
def test_bad_completion_fields(server, fields, param):
    assert error_of(server.post("/v1/completions", **({"prompt": "a"} | fields)), 400)["param"] == param


def test_missing_field(server):
    error = error_of(server.post("/v1/chat/completions", model="fake"), 400)
    assert error["message"] == "'messages' is missing"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b'{"a": NaN}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 5000,
    ],
)
def test_bodies_that_are_no_json_object(server, body):
    error = error_of(server.http.post("/v1/completions", content=body), 400)
    assert error["code"] == "invalid_json"


def test_echoed_input_is_bounded(server):
    error = error_of(server.complete("a", temperature="x" * 100_000), 400)
    assert len(error["message"]) < 500
    error = error_of(server.complete("a", model="y" * 100_000), 404)
    assert len(error["message"]) < 3000


def test_model_not_found_lists_what_exists(server):
    error = error_of(server.complete("a", model="gpt-9"), 404)
    assert error["code"] == "model_not_found"
    assert "fake:sleb-1, fake, fake:sleb-2" in error["message"]
    assert error_of(server.http.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
def test_context_length_is_refused_before_a_stream_starts(server, stream):
    error = error_of(server.chat("x" * 300, stream=stream), 400)
    assert error["code"] == "context_length_exceeded"
    assert "300" in error["message"]
    assert "256" in error["message"]
    server.wait_idle()


def test_one_bad_prompt_of_several_aborts_the_others(server):
    error = error_of(server.complete(["good", "x" * 300]), 400)
    assert error["code"] == "context_length_exceeded"
    server.wait_idle()


def test_unknown_routes_and_methods(server):
    assert "does not exist" in error_of(server.http.get("/v2/models"), 404)["message"]
    response = server.http.get("/v1/chat/completions")
    assert "POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "OPTIONS, POST"
    response = server.http.put("/v1/responses/resp_1")
    assert "DELETE, GET, HEAD, OPTIONS" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"


def test_a_base_url_with_v1_too_many_is_told(server):
    for path in ("/v1/v1/messages", "/v1/api/chat"):  # as the SDKs of Anthropic and Ollama then ask
        assert "address without /v1" in server.http.post(path, json={}).text


def test_an_unknown_path_is_told_as_its_neighbours_tell_errors(server):
    for path in ("/v1/messages/batches", "/messages/batches", "/v1/messages/batches/msgbatch_1/results"):
        told = server.http.post(path, json={})
        assert told.status_code == 404
        assert told.json()["type"] == "error" and told.json()["error"]["type"] == "not_found_error"
    for path in ("/api/nothing", "/api/nothing/at/all"):
        told = server.http.post(path, json={})
        assert (told.status_code, type(told.json()["error"])) == (404, str)
    for path in ("/v1/nothing", "/v1/chat/nothing", "/nothing", "/v1", "/apix", "/" + "a/" * 2000):
        assert "does not exist" in error_of(server.http.get(path), 404)["message"], path


def test_an_unknown_path_beside_open_ones_needs_a_key(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",))
    for path in ("/health/nothing", "/v1/health/nothing", "/api/nothing", "/v1/messages/nothing", "/nothing"):
        assert server.http.get(path).status_code == 401, path


def test_body_limit_holds_with_and_without_a_length(serve_engine, fake_engine):
    server = serve_engine(fake_engine, max_body_mb=1000 / 2**20)
    assert error_of(server.complete("x" * 2000), 413)["message"].startswith(
        "the body is larger than 1000 bytes"
    )
    chunks = (b"x" * 100 for _ in range(100))
    error_of(server.http.post("/v1/completions", content=chunks), 413)
    assert server.complete("abc").status_code == 200


def get(server, path, authorization, name="Authorization"):
    """Status and body; the header is sent as it stands, which httpx refuses for some."""
    headers = {} if authorization is None else {name: authorization}
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()


def test_keys_guard_all_but_health(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("first", "sécond"))
    for path in ("/health", "/v1/health", "/ready", "/", "//health/"):
        assert get(server, path, None)[0] == 200
    wrong = [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer nope",
        "Basic first",
        "first",
        "Bearer firs",
        b"Bearer \xff",
    ]
    for header in wrong:
        for path in ("/v1/models", "//v1/models", "/version", "/nowhere", "/metrics"):
            status, body = get(server, path, header)
            assert status == 401
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
            assert b"first" not in body
    for header in ("Bearer first", "bearer first", "Bearer  first ", "Bearer sécond".encode()):
        assert get(server, "/v1/models", header)[0] == 200


def test_a_key_may_come_as_anthropics_clients_send_it(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("first", "sécond"))
    for key in ("", " ", "firs", "Bearer first", b"\xff"):
        assert get(server, "/v1/models", key, "x-api-key")[0] == 401
    for key in ("first", " first ", "sécond".encode()):
        assert get(server, "/v1/models", key, "X-Api-Key")[0] == 200
    for bearer, key, status in [("first", "no", 200), ("no", "first", 200), ("no", "no", 401)]:
        headers = {"Authorization": f"Bearer {bearer}", "x-api-key": key}
        assert server.post("/v1/completions", prompt="a").status_code == 401
        answer = server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert answer.status_code == status


def test_an_empty_bearer_is_fine_without_keys(server):
    assert get(server, "/v1/models", "Bearer ")[0] == 200


def test_full_queue_is_503_with_retry_after(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, max_num_seqs=1, max_queue=1)
    fake_engine.hold.clear()
    with server.http.stream("POST", "/v1/completions", json={"prompt": ["a", "b"], "stream": True}):
        response = server.complete("c")
        assert error_of(response, 503)["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
        fake_engine.hold.set()
    server.wait_idle()
    assert server.complete("c").status_code == 200


def test_huge_headers(server):
    assert error_of(server.http.get("/health", headers={"X-Big": "x" * 70_000}), 431)


def test_an_error_that_nobody_foresaw_says_nothing_about_itself(serve_engine, fake_engine, caplog):
    server = serve_engine(fake_engine)
    fake_engine.render_chat = lambda *_, **__: 1 / 0
    response = server.chat("a")
    assert "ZeroDivision" not in str(error_of(response, 500))
    assert response.headers["x-request-id"]
    assert any(record.exc_info and record.exc_info[0] is ZeroDivisionError for record in caplog.records)
    assert server.http.get("/health").status_code == 200


def test_bytes_that_are_no_http_do_not_hurt(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400")
    assert server.http.get("/health").status_code == 200


def test_a_schema_that_cannot_be_used_is_told_with_all_fields_it_may_be_in(server):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 2}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema | {"required": ["a"]}}}
    said = [{"role": "user", "content": "a"}]
    body = {"messages": said, "tools": [tool], "response_format": {"type": "json_object"}}
    told = error_of(server.http.post("/v1/chat/completions", json=body), 400)
    assert told["message"].startswith("tools or response_format cannot be used: ")

"""The same question through every wire format: one answer, one usage, one end, one set of checks.

The judge of the answers is the engine, asked by itself; wire_formats.py reads each format as its description has it.
"""

from __future__ import annotations

import json
import shutil
import threading

import jsonschema
import pytest

from sleb import LLM, SamplingParams

FORMATS = ("chat.completions", "completions", "responses", "messages", "ollama chat", "ollama generate")
CHATS = tuple(each for each in FORMATS if each != "completions")
CHOOSING = ("chat.completions", "responses", "messages")
GREEDY = {"temperature": 0, "ignore_eos": True}
ENGINE = {"device": "cpu", "dtype": "float32", "kv_cache_memory": 0.01}
# What a random model writes is short only if something ends it.
ANIMALS = {"type": "object", "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"enum": [2, 4]}}}
SCHEMA = ANIMALS | {"required": ["animal", "legs"], "additionalProperties": False}
TOOLS = (
    {"name": "count", "description": "Counts legs", "parameters": SCHEMA},
    {"name": "now", "parameters": {"type": "object", "properties": {}}},
)


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """The tiny model with room for a prompt that explains tools."""
    folder = shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("roomy") / "tiny-llama")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def alone(folder, tiny_chain):
    """The engine by itself."""
    return LLM(folder, tiny_chain, (0, 3), **ENGINE)


@pytest.fixture(scope="module")
def real(folder, tiny_chain, start_server):
    llm = LLM(folder, tiny_chain, (0, 3), prefix_caching=False, **ENGINE)
    running = start_server(llm.engine, max_num_seqs=8)
    yield running
    running.wait_idle()
    llm.engine.check_integrity()
    running.close()


@pytest.fixture(scope="module")
def roomy(start_server, make_fake_engine):
    running = start_server(make_fake_engine(max_model_len=100_000))
    yield running
    running.close()


def prompt_of(engine, name, text):
    if name == "completions":
        return engine.encode_prompt(text)
    return engine.render_chat([{"role": "user", "content": text}])


@pytest.fixture(scope="module")
def wanted(alone):
    """wanted(format, question) -> text, finish, prompt tokens and output tokens, of the engine by itself."""

    def ask(name, question, **params):
        prompt = prompt_of(alone.engine, name, question.text)
        fields = GREEDY | {"max_tokens": question.max_tokens, "stop": list(question.stop)} | params
        depth = 3 if question.model == "tiny-llama:sleb-3" else 0
        [output] = alone.generate([prompt], SamplingParams(**fields), depth)
        return output.text, output.finish_reason, len(prompt), len(output.token_ids)

    return ask


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-llama:sleb-3"])
def test_greedy_answers_are_the_engines(real, wire, wanted, name, model, stream):
    question = wire.Question("Say something, 世界!", 24, model=model, more=GREEDY)
    text, finish, num_prompt, num_output = wanted(name, question)
    assert (finish, num_output) == ("length", 24)
    told = wire.FORMATS[name].ask(real, question, stream)
    assert (told.text, told.thoughts, told.calls) == (text, "", [])
    assert (told.finish, told.num_prompt, told.num_output) == (finish, num_prompt, num_output)
    assert told.model == model


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_stop_strings_end_every_format_alike(real, wire, wanted, name, stream):
    question = wire.Question("Say something, 世界!", 24, model="tiny-llama", more=GREEDY)
    text = wanted(name, question)[0].replace("\ufffd", "")
    stop = next(text[at : at + 2] for at in range(3, len(text)) if text[at : at + 2].isascii())
    question = question.but(stop=("never said", stop))
    text, finish, num_prompt, num_output = wanted(name, question)
    assert finish == "stop"
    told = wire.FORMATS[name].ask(real, question, stream)
    assert (told.text, told.finish) == (text, "stop")
    assert (told.num_prompt, told.num_output) == (num_prompt, num_output)
    assert told.stopped_by == (stop if wire.FORMATS[name].tells_stop else None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_schema_holds_in_every_format(real, wire, name):
    question = wire.Question("An animal?", 100, schema=SCHEMA, more=GREEDY)
    whole, streamed = (wire.FORMATS[name].ask(real, question, stream) for stream in (False, True))
    assert whole == streamed
    assert whole.finish == "stop"
    jsonschema.validate(json.loads(whole.text), SCHEMA)
    if name in CHATS:
        told = wire.FORMATS["chat.completions"].ask(real, question, False)
        assert (told.text, told.num_prompt, told.num_output) == (
            whole.text,
            whole.num_prompt,
            whole.num_output,
        )


def parsed(calls):
    return [(name, json.loads(given) if isinstance(given, str) else given) for name, given in calls]


@pytest.mark.parametrize("choice", ["required", "count"])
def test_calls_that_must_be_made_are_the_same(real, wire, choice):
    question = wire.Question("How many legs?", 300, tools=TOOLS, choice=choice, more=GREEDY | {"seed": 1})
    told = {
        (name, stream): wire.FORMATS[name].ask(real, question, stream)
        for name in CHOOSING
        for stream in (False, True)
    }
    first = told["chat.completions", False]
    assert first.calls
    for each in told.values():
        assert parsed(each.calls) == parsed(first.calls)
        assert (each.text, each.finish) == (first.text, first.finish)
        assert (each.num_prompt, each.num_output) == (first.num_prompt, first.num_output)
    for name, arguments in parsed(first.calls):
        jsonschema.validate(arguments, SCHEMA if name == "count" else {"type": "object"})
        assert choice in ("required", name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_tool_that_does_not_exist_cannot_be_chosen(server, wire, name):
    if name not in CHOOSING:
        return
    question = wire.Question(tools=TOOLS, choice="nobody")
    format_ = wire.FORMATS[name]
    for stream in (False, True):
        response = server.http.post(format_.path, json=format_.fields(question, stream))
        assert response.status_code == 400
        assert "nobody" in format_.error(response.json(), 400)


SAID = (
    '<think>\nHm.\n</think>\n\nLook: <tool_call>\n{"name": "count", "arguments": {"legs": 4}}\n</tool_call>'
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", [each for each in CHATS if each != "ollama generate"])
def test_thoughts_and_calls_are_found_in_every_format(roomy, wire, name, stream):
    engine = roomy.engine
    engine.chat_template, engine.answer = "<think>", engine.encode(SAID)
    try:
        told = wire.FORMATS[name].ask(roomy, wire.Question("x", 200, tools=TOOLS), stream)
    finally:
        engine.chat_template = engine.answer = None
    assert (told.thoughts, told.text.strip()) == ("Hm.", "Look:")
    assert parsed(told.calls) == [("count", {"legs": 4})]
    assert (told.finish, told.num_output) == ("calls", len(SAID))


# What is refused: a change of the question or of the body, the status, and what the message names.
REFUSED = {
    "an unknown model": ({"model": "nobody"}, {}, 404, "nobody"),
    "a temperature": ({"more": {"temperature": -1}}, {}, 400, "temperature"),
    "a type": ({"more": {"top_p": "much"}}, {}, 400, "top_p"),
    "too many stop strings": ({"stop": tuple(map(str, range(99)))}, {}, 400, "stop"),
    "a long prompt": ({"text": "x" * 300}, {}, 400, "256"),
    "what a template refuses": ({"text": "forbidden"}, {}, 400, "no such role"),
    "beam search": ({}, {"use_beam_search": True}, 400, "use_beam_search"),
    "a bad schema": ({"schema": {"type": 5}}, {}, 400, ""),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_refuses_alike(server, wire, name, kind, stream):
    change, more, status, word = REFUSED[kind]
    if name == "completions" and "template" in kind:
        return
    format_ = wire.FORMATS[name]
    body = format_.fields(wire.Question().but(**change), stream) | more
    response = server.http.post(format_.path, json=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    message = format_.error(response.json(), status)
    assert message and word in message
    server.wait_idle()


@pytest.mark.parametrize("name", FORMATS)
def test_bodies_and_keys_are_checked_before_any_format(serve_engine, fake_engine, wire, name):
    server, format_ = (
        serve_engine(fake_engine, api_keys=("key",), max_body_mb=1000 / 2**20),
        wire.FORMATS[name],
    )
    post, key = server.http.post, {"Authorization": "Bearer key"}
    body = format_.fields(wire.Question(), False)
    refused = [
        (post(format_.path, json=body), 401),
        (post(format_.path, headers={"Authorization": "Bearer no"}, json=body), 401),
        (post(format_.path, headers=key | {"Host": "evil.example"}, json=body), 403),
        (post(format_.path, headers=key, content=b"{"), 400),
        (post(format_.path, headers=key, content=b"[]"), 400),
        (post(format_.path, headers=key, json={}), 200 if name.startswith("ollama") else 400),  # asks to load
        (post(format_.path, headers=key, content=b"x" * 2000), 413),
        (server.http.put(format_.path, headers=key), 405),
    ]
    for response, status in refused:
        assert response.status_code == status
        if status not in (200, 405):
            assert format_.error(response.json(), status)
    assert post(format_.path, headers={"x-api-key": "key"}, json=body).status_code == 200


@pytest.mark.parametrize("name", FORMATS)
def test_an_overload_a_timeout_and_a_dead_engine(serve_engine, fake_engine, wire, wait_until, name):
    server = serve_engine(fake_engine, max_num_seqs=1, max_queue=0, request_timeout=0.4)
    format_, question = wire.FORMATS[name], wire.Question()
    post = server.http.post
    fake_engine.hold.clear()
    waiting = []
    first = threading.Thread(
        target=lambda: waiting.append(server.http.post(format_.path, json=format_.fields(question, True)))
    )
    first.start()
    wait_until(lambda: server.context.engine.num_open == 1)
    overloaded = post(format_.path, json=format_.fields(question, False))
    assert overloaded.status_code == (529 if name == "messages" else 503)
    assert "full" in format_.error(overloaded.json(), overloaded.status_code)
    assert int(overloaded.headers["retry-after"]) >= 1
    first.join()  # it has taken too long meanwhile
    fake_engine.hold.set()
    with pytest.raises(wire.StreamError) as late:
        format_.stream(waiting[0].content)
    assert "took longer than 0.4 seconds" in json.dumps(late.value.body)
    server.wait_idle()
    fake_engine.hold.clear()
    late = post(format_.path, json=format_.fields(question, False))
    assert late.status_code == 504
    assert "took longer than 0.4 seconds" in format_.error(late.json(), 504)
    fake_engine.error = RuntimeError("broken")
    fake_engine.hold.set()
    wait_until(lambda: post(format_.path, json=format_.fields(question, False)).status_code == 503)
    dead = post(format_.path, json=format_.fields(question, True))
    assert format_.error(dead.json(), 503)
    assert int(dead.headers["retry-after"]) >= 1


@pytest.mark.parametrize("name", FORMATS)
def test_an_engine_that_dies_inside_of_a_stream(serve_engine, fake_engine, wire, name):
    fake_engine.fail_after = 3
    server, format_ = serve_engine(fake_engine), wire.FORMATS[name]
    response = server.http.post(format_.path, json=format_.fields(wire.Question(), True))
    assert response.status_code == 200
    with pytest.raises(wire.StreamError) as broken:
        format_.stream(response.content)
    error = broken.value.body
    if name != "responses":  # whose last event is the response, as failed
        assert format_.error(error, 503)
    else:
        assert error["status"] == "failed" and error["error"]["message"]
    if name in ("chat.completions", "completions"):
        assert response.content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_client_that_goes_ends_its_answer(roomy, wire, wait_until, monkeypatch, name, stream):
    monkeypatch.setattr(roomy.engine, "delay", 0.002)
    format_, metrics = wire.FORMATS[name], roomy.context.metrics.tier(roomy.engine.default_tier)
    before = metrics.num_aborted
    body = format_.fields(wire.Question("x" * 5000, 50_000, more={"ignore_eos": True}), stream)
    if stream:
        with roomy.http.stream("POST", format_.path, json=body) as answer:
            next(answer.iter_bytes())
    else:
        with roomy.client(timeout=0.2) as impatient, pytest.raises(Exception, match="timed out"):
            impatient.post(f"{roomy.url}{format_.path}", body=body, cast_to=object)
    roomy.wait_idle()
    wait_until(lambda: metrics.num_aborted == before + 1)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_of_every_format_are_counted(server, wire, name):
    format_, tier = wire.FORMATS[name], server.engine.default_tier

    def counted():
        found = {}
        for line in server.http.get("/metrics").text.splitlines():
            if line.startswith(("sleb:request_success_total", "sleb:generation_tokens_total")):
                series, value = line.rsplit(" ", 1)
                if f'model_name="{tier.id}"' in series:
                    found[series] = float(value)
        return sum(found.values())

    before = counted()
    for stream in (False, True):
        format_.ask(server, wire.Question("hello"), stream)
    server.wait_idle()
    assert counted() == before + 2 * (1 + len("hello"))
    refused = f'path="{format_.path}"'
    server.http.post(format_.path, json=format_.fields(wire.Question(model="nobody"), False))
    exchanges = [line for line in server.http.get("/metrics").text.splitlines() if refused in line]
    assert any('status="404"' in line or 'code="404"' in line for line in exchanges), exchanges

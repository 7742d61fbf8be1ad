"""Served as clients meet them: models whose files disagree about their vocabulary, their ends and their templates."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
from transformers import AutoTokenizer

from sleb.engine.chat_template import OWN_NAMES
from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
]
JSON_MODE = {"response_format": {"type": "json_object"}, "max_tokens": 64, "temperature": 0}
CHOICE = {"structured_outputs": {"choice": ["yes", "no"]}, "temperature": 0}


@pytest.fixture
def serve_changed(tiny_model_dir, tmp_path, serve_engine):
    """serve_changed({file: change of its JSON}, **options) -> a server over a changed copy of the tiny model."""

    def serve(changes=(), **options):
        folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
        for name, change in dict(changes).items():
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(change(content)))
        config = EngineConfig(folder, device="cpu", dtype="float32", kv_cache_memory=0.01, **options)
        server = serve_engine(Engine(config), warm_up=True)
        server.folder = folder
        return server

    return serve


def with_fields(**values):
    return lambda content: content | values


def with_tokens(num_extra):
    """A tokenizer of that many tokens more than the tiny model, which has 264 and uses 260."""

    def change(content):
        last = content["added_tokens"][-1]
        more = [last | {"id": 260 + at, "content": f"<new{at}>"} for at in range(4 + num_extra)]
        return content | {"added_tokens": [*content["added_tokens"], *more]}

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {},  # padded: four rows more than the tokenizer knows
        {"generation_config.json": with_fields(eos_token_id=[2, 60000])},
        {"generation_config.json": with_fields(eos_token_id=[258, 262])},  # an end that has no text
        {
            "generation_config.json": with_fields(eos_token_id=None),
            "config.json": with_fields(eos_token_id=None),
        },
        {"tokenizer.json": with_tokens(1)},
        {"tokenizer.json": with_tokens(52)},
    ],
    ids=["padded", "unknown end", "end in the padding", "no end", "one more", "52 more"],
)
def test_structured_output_whatever_the_vocabularies(serve_changed, changes):
    server = serve_changed(changes)
    answer = server.post("/v1/chat/completions", messages=MESSAGES, **CHOICE)
    assert answer.json()["choices"][0]["message"]["content"] in ("yes", "no"), answer.text
    answer = server.post("/v1/chat/completions", messages=MESSAGES, **JSON_MODE)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"].startswith("{")
    answer = server.post("/v1/chat/completions", messages=MESSAGES, min_tokens=3, max_tokens=5)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 3
    text = "a <new1> b <new60>"  # in a message of somebody who knows nothing of the checkpoint
    assert server.chat(text, max_tokens=1).status_code == 200
    server.wait_idle()


def test_a_tokenizer_that_grammars_cannot_use_is_no_fault_of_the_client(serve_changed, monkeypatch, caplog):
    import llguidance

    def refuse(*_, **__):
        raise ValueError("no such pre-tokenizer")

    monkeypatch.setattr(llguidance, "LLTokenizer", refuse)  # before the server warms up, which makes one
    server = serve_changed()
    with caplog.at_level(logging.ERROR):
        answer = server.post("/v1/chat/completions", messages=MESSAGES, **JSON_MODE)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "llguidance cannot use this model's tokenizer: no such pre-tokenizer" in caplog.text
    assert server.chat("Hi", max_tokens=1).status_code == 200


def prompts_of(server):
    """The texts of prompts, as they reach the engine from now on."""
    engine, texts = server.engine, []
    add_request = engine.add_request

    def note(request_id, prompt_token_ids, *args, **kwargs):
        texts.append(engine.tokenizer.decode(list(prompt_token_ids), skip_special_tokens=False))
        add_request(request_id, prompt_token_ids, *args, **kwargs)

    engine.add_request = note
    return texts


TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}{{ tools | tojson if tools }}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def test_the_template_for_tools_is_used_when_there_are_some(serve_changed):
    templates = [{"name": "default", "template": "D{{ messages[0]['content'] }}"}]
    templates += [{"name": "tool_use", "template": f"T{TEMPLATE}"}]
    server = serve_changed({"tokenizer_config.json": with_fields(chat_template=templates)})
    seen = prompts_of(server)
    for tools in (None, TOOLS):
        options = {} if tools is None else {"tools": tools}
        assert server.chat("Hi", max_tokens=1, **options).status_code == 200
        wanted = AutoTokenizer.from_pretrained(server.folder).apply_chat_template(
            MESSAGES, tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert seen.pop() == wanted
        tokens = server.post("/tokenize", messages=MESSAGES, **options).json()["tokens"]
        assert server.post("/detokenize", tokens=tokens).json()["prompt"] == wanted


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_developer_is_the_system(serve_changed, tools):
    """Also with tools that the template does not know, which are explained in the system message."""
    template = TEMPLATE.replace("{{ tools | tojson if tools }}", "")
    server = serve_changed({"tokenizer_config.json": with_fields(chat_template=template)})
    seen = prompts_of(server)
    prompts = []
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "Be brief."}, *MESSAGES]
        answer = server.post("/v1/chat/completions", messages=messages, max_tokens=1, tools=tools)
        assert answer.status_code == 200
        prompts.append(seen.pop())
    assert prompts[0] == prompts[1] and prompts[0].startswith("[system:Be brief.")


def test_a_base_model_chats_by_the_operator_s_template(serve_changed, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    without = {
        "tokenizer_config.json": lambda content: {
            name: value for name, value in content.items() if name != "chat_template"
        }
    }
    server = serve_changed(without, chat_template=file)
    seen = prompts_of(server)
    assert server.chat("Hi", max_tokens=1).status_code == 200
    assert seen == ["[user:Hi]>"]
    assert server.http.get("/tokenizer_info").json()["chat_template"] == TEMPLATE


def test_names_of_the_template_language_cannot_be_arguments_of_it(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    for name in OWN_NAMES:
        for path in ("/v1/chat/completions", "/tokenize"):
            answer = server.post(path, messages=MESSAGES, chat_template_kwargs={name: 1})
            assert answer.status_code == 400, (name, path)
            assert answer.json()["error"]["param"] == "chat_template_kwargs"
            assert "value error" not in answer.json()["error"]["message"]


def test_the_operator_s_values_are_those_of_requests_that_give_none(serve_changed):
    server = serve_changed(
        {"generation_config.json": with_fields(temperature=5.0, top_k=0)},
        temperature=0.0,
        default_max_tokens=4,
    )
    answers = [server.chat("Hi", ignore_eos=True).json() for _ in range(3)]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [4] * 3
    assert answers[0]["choices"][0]["finish_reason"] == "length"
    answer = server.chat("Hi", ignore_eos=True, max_tokens=6).json()
    assert answer["usage"]["completion_tokens"] == 6
    assert (
        server.complete("Hi", ignore_eos=True).json()["usage"]["completion_tokens"] == 16
    )  # OpenAI's own limit

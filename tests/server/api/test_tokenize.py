"""POST /tokenize and /detokenize, GET /tokenizer_info, with transformers' tokenizer as the judge."""

from __future__ import annotations

import jinja2
import pytest

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

MESSAGES = [{"role": "user", "content": "Say something, 世界!"}, {"role": "assistant", "content": "Yes"}]


@pytest.fixture(scope="module")
def server(tiny_model_dir, start_server):
    config = EngineConfig(
        model=str(tiny_model_dir), dtype="float32", device="cpu", kv_cache_memory=0.01, load_format="dummy"
    )
    running = start_server(Engine(config))
    yield running
    running.close()


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def tokenize(server, **fields):
    response = server.post("/tokenize", **fields)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == server.engine.max_model_len
    return answer


@pytest.mark.parametrize("text", ["hello", "Grüße, 世界 🌍", "", " \n", "<|end|>", "x" * 10_000])
@pytest.mark.parametrize("special", [True, False, None])
def test_a_prompt(server, tokenizer, text, special):
    answer = tokenize(server, prompt=text, add_special_tokens=special)
    expected = tokenizer(text, add_special_tokens=special is not False)["input_ids"]
    assert answer["tokens"] == expected
    assert answer["token_strs"] is None


def test_token_strings(server, tokenizer):
    answer = tokenize(server, prompt="Grüße 世", return_token_strs=True)
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])


@pytest.mark.parametrize(
    "options",
    [{}, {"add_generation_prompt": False}, {"add_generation_prompt": True}, {"continue_final_message": True}],
)
def test_messages(server, tokenizer, options):
    answer = tokenize(server, messages=MESSAGES, **options)
    wanted = {"add_generation_prompt": not options.get("continue_final_message")} | options
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **wanted)
    assert answer["tokens"] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_messages_are_what_a_chat_is_charged_for(server):
    usage = server.post("/v1/chat/completions", messages=MESSAGES, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] == tokenize(server, messages=MESSAGES)["count"]


@pytest.mark.parametrize("text", ["hello", "Grüße, 世界 🌍", "", "x" * 5000])
def test_there_and_back(server, text):
    tokens = tokenize(server, prompt=text, add_special_tokens=False)["tokens"]
    assert server.post("/detokenize", tokens=tokens).json() == {"prompt": text}


def test_special_tokens_are_shown(server, tokenizer):
    ids = [tokenizer.bos_token_id, *b"ab", tokenizer.eos_token_id]
    expected = tokenizer.decode(ids, skip_special_tokens=False)
    assert server.post("/detokenize", tokens=ids).json()["prompt"] == expected
    assert tokenizer.bos_token in expected


def test_tokenizer_info_is_what_lm_eval_needs(server, tokenizer):
    """It takes eos_token and bos_token as text, encodes them to find their ids, and renders chat_template itself."""
    info = server.http.get("/tokenizer_info").json()
    for name in ("eos_token", "bos_token", "pad_token"):
        assert info[name] == getattr(tokenizer, name)
        ids = tokenize(server, prompt=info[name], add_special_tokens=False)["tokens"]
        assert ids == [getattr(tokenizer, f"{name}_id")]
    assert info["tokenizer_class"]
    template = jinja2.Environment().from_string(info["chat_template"])
    rendered = template.render(messages=MESSAGES, add_generation_prompt=True)
    assert rendered == tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    added = {int(key): token["content"] for key, token in info["added_tokens_decoder"].items()}
    assert added == {key: token.content for key, token in tokenizer.added_tokens_decoder.items()}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        (
            "/tokenize",
            {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**32 + 1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [0] * (2**18 + 1)}, "tokens"),
    ],
)
def test_refusals(server, path, fields, param):
    response = server.post(path, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert len(response.text) < 1000


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"prompt": "\xff"}'])
def test_bodies_that_are_no_json_object(server, path, body):
    response = server.http.post(path, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(("path", "field"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})])
def test_the_model_must_exist(server, path, field):
    assert server.post(path, model="tiny-llama", **field).status_code == 200
    assert server.post(path, model="gpt-9", **field).json()["error"]["code"] == "model_not_found"


def test_a_model_without_a_tokenizer(serve_engine, fake_engine):
    server = serve_engine(fake_engine)
    fake_engine.tokenizer = None
    assert server.post("/detokenize", tokens=[1]).status_code == 400
    assert server.http.get("/tokenizer_info").status_code == 400

"""Fields of other servers: honoured, refused, or passed over; never dropped though they would change the answer."""

from __future__ import annotations

import pytest

from sleb.server.peer_fields import HARMLESS, REFUSED, SAME_AS
from sleb.server.protocol import ChatBody, CompletionBody

# What llama.cpp's own page sends with every request, at its defaults: nothing of it asks for anything.
LLAMA_DEFAULTS = {
    "timings_per_token": True,
    "cache_prompt": True,
    "dynatemp_range": 0,
    "dynatemp_exponent": 1,
    "xtc_probability": 0,
    "xtc_threshold": 0.1,
    "typ_p": 1,
    "typical_p": 1.0,
    "mirostat": 0,
    "mirostat_tau": 5,
    "repeat_last_n": 64,
    "repeat_penalty": 1,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "max_tokens": -1,
    "samplers": [],
    "grammar": None,
    "lora": [],
    "reasoning_format": "auto",
    "min_keep": 0,
}
VLLM_DEFAULTS = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "include_reasoning": True,
    "spaces_between_special_tokens": True,
    "truncation_side": "left",
    "documents": None,
    "chat_template": None,
    "priority": 0,
    "request_id": "a",
    "best_of": 1,
    "logits_processors": None,
    "add_special_tokens": False,
    "echo": False,
    "watermarking": False,
}
OPENAI_HARMLESS = {
    "metadata": {"k": "v"},
    "store": True,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "safety_identifier": "me",
    "verbosity": "low",
    "reasoning_effort": "low",
    "prediction": {"type": "content", "content": "a"},
}


@pytest.mark.parametrize(
    "fields", [LLAMA_DEFAULTS, VLLM_DEFAULTS, OPENAI_HARMLESS], ids=["llama", "vllm", "openai"]
)
def test_what_changes_nothing_is_neither_refused_nor_unknown(server, fields, caplog):
    answer = server.chat("hello", **fields)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    assert not [record for record in caplog.records if "unknown request field" in record.getMessage()]


@pytest.mark.parametrize(
    ("fields", "attribute", "value"),
    [
        ({"n_predict": 3}, "max_tokens", 3),
        ({"num_predict": 3}, "max_tokens", 3),
        ({"max_new_tokens": 3.0}, "max_tokens", 3),
        ({"max_tokens": None, "n_predict": 3}, "max_tokens", 3),
        ({"max_tokens": 3, "n_predict": 3}, "max_tokens", 3),
        ({"n_predict": -1}, "max_tokens", None),
        ({"max_tokens": -1}, "max_tokens", None),
        ({"min_new_tokens": 2, "max_tokens": 9}, "min_tokens", 2),
        ({"repeat_penalty": 1.3}, "repetition_penalty", 1.3),
        ({"repeat_penalty": 1.3, "repeat_last_n": -1}, "repetition_penalty", 1.3),
        ({"no_stop_trim": True}, "include_stop_str_in_output", True),
        ({"sampling_seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", None),
        ({"stop_sequences": ["zz"]}, "stop", ["zz"]),
        ({"top_p": 0, "temperature": 1.5}, "temperature", 0.0),
        ({"options": {"num_predict": 2, "num_ctx": 4096, "seed": None}}, "max_tokens", 2),
        ({"options": {"temperature": 0.25}}, "temperature", 0.25),
    ],
    ids=str,
)
def test_other_names_reach_the_engine(server, fields, attribute, value):
    for answer in (server.chat("hello", **fields), server.complete("hello", **fields)):
        assert answer.status_code == 200, answer.text
        assert getattr(server.engine.seen[-1][1], attribute) == value


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"mirostat": 2}, "mirostat", "temperature"),
        ({"typical_p": 0.5}, "typical_p", "temperature"),
        ({"xtc_probability": 0.5}, "xtc_probability", "temperature"),
        ({"dry_multiplier": 0.8}, "dry_multiplier", "temperature"),
        ({"min_keep": 1}, "min_keep", "temperature"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size", "temperature"),
        ({"logits_processors": ["a"]}, "logits_processors", "temperature"),
        ({"use_beam_search": True}, "use_beam_search", "no beam search"),
        ({"length_penalty": 0.5}, "length_penalty", "no beam search"),
        ({"stop_regex": "a+"}, "stop_regex", "stop"),
        ({"t_max_predict_ms": 100}, "t_max_predict_ms", "max_tokens"),
        ({"suppress_tokens": [3]}, "suppress_tokens", "logit_bias"),
        ({"whitespace_pattern": " "}, "whitespace_pattern", "compactly"),
        ({"structural_tag": "{}"}, "structural_tag", "tools"),
        ({"think": False}, "think", "chat_template_kwargs"),
        ({"lora_path": "x"}, "lora_path", "merged"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "stream"),
        ({"images": ["aGk="]}, "images", "text"),
        ({"web_search_options": {"a": 1}}, "web_search_options", "text"),
        ({"extra_body": {"regex": "a"}}, "extra_body", "beside"),
        ({"options": "fast"}, "options", "beside"),
        ({"options": {"mirostat": 1}}, "mirostat", "temperature"),
        ({"repeat_penalty": 1.3, "repeat_last_n": 64}, "repeat_last_n", "whole"),
        ({"n_predict": 3, "max_tokens": 4}, "n_predict", "same field"),
        ({"options": {"num_predict": 3}, "num_predict": 4}, "options", "same field"),
        ({"n_predict": -2}, "n_predict", "greater than or equal to -1"),
        ({"n_predict": "x"}, "n_predict", "integer"),
        ({"repeat_penalty": 1e-9}, "repeat_penalty", "0.01"),
        ({"no_stop_trim": 0, "include_stop_str_in_output": False}, "no_stop_trim", "same field"),
        ({"repeat_penalty": 0}, "repeat_penalty", "0.01"),
        ({"seed": 2**64}, "seed", "64 bits"),
        ({"max_tokens": 10**30}, "max_tokens", "64 bits"),
        ({"n_predict": 1e30}, "n_predict", "64 bits"),
        ({"draft": "lookup"}, "draft", "'off'"),
        ({"depth": 3}, "depth", "'fixed'"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name_with_a_remedy(server, fields, param, words):
    for answer in (server.chat("hello", **fields), server.complete("hello", **fields)):
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert error["param"] == param
        assert param in error["message"] and words in error["message"]


def test_fields_of_the_other_endpoint(server):
    """What would shape an answer there is no less a constraint here."""
    for fields in (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"max_completion_tokens": 3},
    ):
        assert server.complete("hello", **fields).json()["error"]["param"] in fields
    for fields in ({"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"add_special_tokens": True}):
        assert server.chat("hello", **fields).json()["error"]["param"] in fields
    assert server.complete("hello", tools=[], tool_choice="none").status_code == 200


def test_nothing_is_drafted_and_depth_is_fixed(server):
    assert server.chat("hello", draft="off", depth="fixed").status_code == 200


def test_no_field_is_in_two_tables():
    ours = set(ChatBody.model_fields) & set(CompletionBody.model_fields)
    names = [*REFUSED, *HARMLESS, *(other for others in SAME_AS.values() for other in others)]
    assert len(names) == len(set(names))
    assert not ours & set(names)
    assert set(SAME_AS) <= ours


@pytest.mark.parametrize("path", ["/models", "/models/fake", "/v1//models/", "//models"])
def test_paths_without_v1(server, path):
    answer = server.http.get(path)
    assert answer.status_code == 200, answer.text


def test_posts_without_v1(server):
    chat = server.post("/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert chat.json()["choices"][0]["message"]["content"] == "hi"
    assert server.post("/completions", prompt="hi").json()["choices"][0]["text"] == "hi"
    assert server.post("/embeddings", input="hi").status_code == 501
    assert server.http.options("/chat/completions").headers["Allow"] == "OPTIONS, POST"
    assert server.http.get("/nothing").status_code == 404


def test_paths_without_v1_need_the_key_too(serve_engine, fake_engine):
    server = serve_engine(fake_engine, api_keys=("key",))
    assert server.http.get("/models").status_code == 401
    assert server.http.get("/models", headers={"Authorization": "Bearer key"}).status_code == 200

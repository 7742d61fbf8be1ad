"""Chat answers, streamed and whole, byte by byte where clients depend on it."""

from __future__ import annotations

import json

import pytest

TEXT = "Grüße, 世界 🌍!"


def events(response):
    """The JSON objects of a stream's data lines; checks the frame around them."""
    body = response.content
    assert b"\r" not in body
    assert body.endswith(b"data: [DONE]\n\n")
    lines = body.decode().split("\n\n")[:-1]
    assert all(line.startswith("data: ") or line == ": keep-alive" for line in lines)
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def joined(chunks, index=0):
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_whole_answer_has_every_key(server):
    answer = server.chat("hello").json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "fake:sleb-1"  # the default tier: no model was named
    assert answer["system_fingerprint"].startswith("fp_")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    timings = answer["timings"]
    assert (timings["prompt_n"], timings["predicted_n"], timings["cache_n"]) == (5, 5, 0)
    assert all(
        timings[f"{part}_{name}"] >= 0 for part in ("prompt", "predicted") for name in ("ms", "per_second")
    )


def test_stream_has_role_text_finish_usage_done_in_that_order(server):
    response = server.chat(TEXT, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(chunk["choices"][0]["delta"].keys() == {"content"} for chunk in chunks[1:-2])
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(TEXT.encode())
    assert chunks[-1]["timings"]["predicted_n"] == len(TEXT.encode())
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stream_without_usage_has_none_and_ends_with_timings(server):
    chunks = events(server.chat("hi", stream=True))
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["timings"]["prompt_n"] == 2


def test_continuous_usage_counts_up(server):
    chunks = events(server.chat("abc", stream=True, stream_options={"continuous_usage_stats": True}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize("stop", [None, "世", ["🌍!", "zzz"], "ü"])
def test_joined_deltas_equal_the_whole_text(server, stop):
    whole = server.chat(TEXT, stop=stop).json()["choices"][0]
    chunks = events(server.chat(TEXT, stop=stop, stream=True))
    assert joined(chunks) == whole["message"]["content"]
    assert "\ufffd" not in whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "stop"
    wanted = TEXT if stop is None else min((TEXT.split(each)[0] for each in [*stop]), key=len)
    if stop is None or isinstance(stop, str):
        assert whole["message"]["content"] == wanted


def test_unfinished_character_ends_as_a_replacement(server):
    whole = server.chat("aé", max_tokens=2).json()["choices"][0]
    assert whole["message"]["content"] == "a\ufffd"
    assert whole["finish_reason"] == "length"
    assert joined(events(server.chat("aé", max_tokens=2, stream=True))) == "a\ufffd"


def test_n_gives_that_many_choices_with_their_own_seeds(server):
    before = len(server.engine.seen)
    answer = server.chat("abc", n=3, seed=7).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 9
    assert [params.seed for _, params, _ in server.engine.seen[before:]] == [7, 8, 9]
    chunks = events(server.chat("abc", n=2, stream=True))
    assert [joined(chunks, index) for index in (0, 1)] == ["abc", "abc"]
    roles = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert sorted(roles) == [0, 1]


def test_sampling_fields_reach_the_engine(server):
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.2,
        "stop": ["q"],
        "stop_token_ids": [3],
        "seed": 11,
        "min_tokens": 1,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }
    extra = {"logit_bias": {"5": -100}, "max_tokens": 99, "max_completion_tokens": 2}
    assert server.chat("abc", model="FAKE:SLEB-2", **fields, **extra).status_code == 200
    _, params, depth = server.engine.seen[-1]
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {5: -100}
    assert params.max_tokens == 2
    assert depth == 2


def test_defaults_are_left_to_the_engine(server):
    nothing = dict.fromkeys(
        ("temperature", "stop", "n", "stream", "max_tokens", "tools", "logit_bias", "user", "seed")
    )
    assert server.chat("abc", **nothing).status_code == 200
    _, params, depth = server.engine.seen[-1]
    assert (params.temperature, params.top_p, params.max_tokens, depth) == (None, None, None, 1)


def test_logprobs(server):
    answer = server.chat("é", logprobs=True, top_logprobs=2).json()
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert first["bytes"] == [0xC3]
    assert first["token"] == "bytes:\\xc3"
    assert second["bytes"] == [0xA9]
    assert first["logprob"] == -1.5
    assert [top["logprob"] for top in first["top_logprobs"]] == [-1.0, -1.01]
    streamed = events(server.chat("é", logprobs=True, top_logprobs=2, stream=True))
    entries = [
        entry
        for chunk in streamed
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert entries == [first, second]


def test_token_ids_are_returned_when_asked_for(server):
    ids = server.engine.encode("abc")
    choice = server.chat("abc", return_token_ids=True).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids)
    chunks = events(server.chat("abc", return_token_ids=True, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == ids
    assert chunks[0]["choices"][0]["prompt_token_ids"] == ids


def test_content_parts_are_joined_and_template_arguments_passed_on(server):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": parts}]
    answer = server.post(
        "/v1/chat/completions", messages=messages, chat_template_kwargs={"suffix": "!"}
    ).json()
    assert answer["choices"][0]["message"]["content"] == "Sone\ntwo!"


def test_a_large_prompt_is_rendered_off_the_loop(serve_engine, fake_engine):
    fake_engine.max_model_len = 100_000
    server = serve_engine(fake_engine)
    answer = server.chat("x" * 20_000, max_tokens=3).json()
    assert answer["usage"]["prompt_tokens"] == 20_000


def test_silence_is_filled_with_comments(serve_engine, fake_engine, wait_until):
    server = serve_engine(fake_engine, keep_alive_seconds=0.05)
    fake_engine.delay = 0.2
    response = server.chat("ab", stream=True)
    assert response.content.count(b": keep-alive\n\n") >= 2
    assert joined(events(response)) == "ab"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"tool_choice": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"stream_options": {"include_usage": True}},
        {"some_new_field": {"a": 1}, "metadata": {"k": "v"}},
    ],
)
def test_fields_that_change_nothing_are_accepted(server, fields):
    assert server.chat("a", **fields).status_code == 200


def test_no_content_is_an_empty_text(server):
    """Which a template would otherwise write as "None"."""
    messages = [{"role": "assistant", "content": None}, {"role": "user", "content": "a"}]
    answer = server.post("/v1/chat/completions", messages=messages)
    assert answer.json()["choices"][0]["message"]["content"] == "a"


def test_unknown_fields_are_named_once_in_the_log(server, caplog):
    for _ in range(2):
        server.chat("a", frobnicate=1)
    assert [record.getMessage() for record in caplog.records if "frobnicate" in record.getMessage()] == [
        "unknown request field 'frobnicate' is ignored (said once)"
    ]

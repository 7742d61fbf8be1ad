"""Plain completions: the four shapes of a prompt, echo, and the log-probabilities that evaluations read."""

from __future__ import annotations

import json

import pytest


def events(response):
    return [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ("ids", ["abc"]),
        ("lists", ["abc", "de"]),
    ],
)
def test_every_shape_of_prompt(server, prompt, texts):
    encode = server.engine.encode
    prompt = {"ids": encode("abc"), "lists": [encode("abc"), encode("de")]}.get(str(prompt), prompt)
    answer = server.complete(prompt).json()
    assert answer["object"] == "text_completion"
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, texts))
    streamed = events(server.complete(prompt, stream=True))
    for index, text in enumerate(texts):
        choices = [choice for chunk in streamed for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in choices) == text
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]


def test_sixteen_tokens_by_default(server):
    answer = server.complete("x" * 40).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


def test_n_of_two_prompts_keeps_the_order(server):
    answer = server.complete(["ab", "cd"], n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "ab", "cd", "cd"]
    assert answer["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_covers_prompt_and_answer(server, stream):
    response = server.complete("aéb", echo=True, logprobs=1, max_tokens=2, stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response)]
        text = "".join(choice["text"] for choice in choices)
        parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        logprobs = {name: [each for part in parts for each in part[name]] for name in parts[0]}
    else:
        choice = response.json()["choices"][0]
        text, logprobs = choice["text"], choice["logprobs"]
    assert text == "aéba\ufffd"
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b", "a", "bytes:\\xc3"]
    assert logprobs["token_logprobs"] == [None, -1.5, -1.5, -1.5, -1.5, -1.5]
    assert logprobs["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    # the token itself is among them, with the identical float
    assert logprobs["top_logprobs"][3]["b"] == logprobs["token_logprobs"][3]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]


def test_scoring_alone_generates_nothing(server):
    choice = server.complete("abc", echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, -1.5, -1.5]
    assert choice["logprobs"]["top_logprobs"] == [None, {"b": -1.5}, {"c": -1.5}]


def test_echo_of_token_ids_is_their_text(server):
    ids = [*server.engine.encode("ab"), server.engine.tokenizer.token_to_id("<|end|>")]
    choice = server.complete(ids, echo=True, max_tokens=1).json()["choices"][0]
    assert choice["text"] == "ab<|end|>a"
    assert choice["logprobs"] is None


def test_logprobs_without_echo_begin_with_the_answer(server):
    choice = server.complete("abc", logprobs=2).json()["choices"][0]
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert [len(top) for top in choice["logprobs"]["top_logprobs"]] == [3, 3, 3]


def test_token_ids_are_returned_when_asked_for(server):
    ids = server.engine.encode("abc")
    choice = server.complete("abc", return_token_ids=True).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids)
    chunks = events(server.complete("abc", return_token_ids=True, stream=True))
    assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == ids


def test_whole_numbers_may_have_a_point(server):
    for prompt in ([5.0, 6], [[5, 6.0]]):
        answer = server.post("/v1/completions", prompt=prompt, max_tokens=2.0, n=1.0, logprobs=1.0)
        assert answer.status_code == 200
        assert answer.json()["usage"]["total_tokens"] == 4


@pytest.mark.parametrize(
    "prompt", [None, [], {}, 5, ["a", [1]], [["a"]], [1, "a"], [[1], 2], [True], [1.5], [[1.5]], ""]
)
def test_other_shapes_are_refused(server, prompt):
    response = server.post("/v1/completions", prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"

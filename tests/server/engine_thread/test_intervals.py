"""Tokens that are told together: the same answers in fewer increments."""

from __future__ import annotations

import json
import random

import pytest

from sleb.engine.outputs import StepOutput, Timings, TokenLogprobs
from sleb.server.engine_thread.intervals import Intervals


def increments(rng, name):
    """An answer of some tokens, with log-probabilities; some tokens have no text yet."""
    count = rng.randrange(1, 20)
    for number in range(count):
        ends = number == count - 1
        yield StepOutput(
            name,
            [number],
            rng.choice(("", "a", "bc")),
            [TokenLogprobs(number, -1.0, [])],
            [None] if number == 0 else None,
            "length" if ends else None,
            None,
            3,
            number + 1,
            0,
            Timings(0.0),
        )


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_joined_increments_are_the_same_answer(every):
    rng = random.Random(every)
    for _ in range(50):
        answers = {name: list(increments(rng, name)) for name in "xyz"}
        wanted = {
            name: (
                [token for each in some for token in each.new_token_ids],
                "".join(each.new_text for each in some),
            )
            for name, some in answers.items()
        }
        intervals, told = Intervals(every), {name: [] for name in answers}
        for step in range(20):
            for output in intervals.push([some[step] for some in answers.values() if step < len(some)]):
                told[output.request_id].append(output)
        for name, some in told.items():
            tokens = [token for each in some for token in each.new_token_ids]
            assert (tokens, "".join(each.new_text for each in some)) == wanted[name]
            assert [each.token_id for output in some for each in output.new_logprobs] == tokens
            assert [len(each.new_token_ids) for each in some[1:-1]] == [every] * len(some[1:-1])
            assert len(some[0].new_token_ids) == 1 and some[0].prompt_logprobs == [None]
            assert [each.finish_reason for each in some] == [None] * (len(some) - 1) + ["length"]
            assert some[-1].num_output_tokens == len(tokens)


def test_what_is_held_of_an_aborted_answer_is_dropped():
    intervals = Intervals(10)
    first, second, *_ = list(increments(random.Random(1), "x")) + [None] * 2
    assert intervals.push([first]) == [first]
    assert intervals.push([second]) == []
    intervals.forget("x")
    assert intervals.push([second]) == [second]  # another answer of that name begins


def test_a_stream_tells_several_tokens_at_once(serve_engine, make_fake_engine):
    server = serve_engine(make_fake_engine(), stream_interval=4)
    body = {"prompt": "abcdefghijk", "stream": True, "max_tokens": 11}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    texts = [choice["text"] for line in lines for choice in json.loads(line)["choices"] if choice["text"]]
    assert texts == ["a", "bcde", "fghi", "jk"]
    whole = server.complete("abcdefghijk", max_tokens=11).json()
    assert whole["choices"][0]["text"] == "abcdefghijk" and whole["usage"]["completion_tokens"] == 11

"""Answers that loop, against a count by brute force."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sleb.engine.llm import LLM
from sleb.engine.requests.repetition import REPETITION, RepetitionDetection
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import RequestError


def ends_in_a_loop(tokens, least, most, count):
    return any(
        tokens[-size * count :] == tokens[-size:] * count
        for size in range(least, most + 1)
        if size * count <= len(tokens)
    )


@given(
    tokens=st.lists(st.integers(0, 2), max_size=60),
    prompt=st.lists(st.integers(0, 2), max_size=5),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)).map(sorted),
    count=st.integers(2, 4),
)
@settings(max_examples=200, deadline=None)
def test_against_brute_force(tokens, prompt, sizes, count):
    """The prompt is no part of a loop."""
    counter = RepetitionDetection(sizes[1], sizes[0], count).start()
    for number in range(1, len(tokens) + 1):
        found = counter.push(prompt + tokens[:number], number)
        assert found == ends_in_a_loop(tokens[:number], *sizes, count)


@pytest.mark.parametrize("values", [(-1, 0, 2), (3, 4, 2), (300, 0, 2), (3, 0, 1), (3, 0, 0), (3, -1, 2)])
def test_values_out_of_range(values):
    with pytest.raises(RequestError, match="min_count from 2"):
        RepetitionDetection(*values)


def test_an_answer_that_loops_ends(tiny_model_dir):
    llm = LLM(tiny_model_dir, dtype="float32", device="cpu", end_loops=5)
    always = {"logit_bias": {65: 100}, "temperature": 0, "ignore_eos": True, "max_tokens": 40}

    def answer(**fields):
        return llm.generate([[5, 65, 65]], SamplingParams(**(always | fields)))[0].choices[0]

    looped = answer()
    assert (looped.text, looped.finish_reason, looped.stop_reason) == ("A" * 5, "length", REPETITION)
    assert len(answer(min_tokens=9).token_ids) == 9
    assert len(answer(repetition_detection=RepetitionDetection(1, 1, 3)).token_ids) == 3
    assert len(answer(repetition_detection=RepetitionDetection()).token_ids) == 40
    assert answer(stop="AAA").finish_reason == "stop"
    plain = LLM(tiny_model_dir, dtype="float32", device="cpu")
    assert len(plain.generate([[5, 65, 65]], SamplingParams(**always))[0].token_ids) == 40

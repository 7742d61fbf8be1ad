"""What crosses between the processes of a server comes back as it was."""

from __future__ import annotations

import asyncio
import math
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sleb.engine.outputs import StepOutput, Timings, TokenLogprobs
from sleb.engine.requests.repetition import RepetitionDetection
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.errors import EngineDeadError, InvalidOutputError, RequestError
from sleb.server.engine_process.channel import Channel, Kind, decode, encode
from sleb.server.engine_process.codec import (
    NamedGrammar,
    grammars_of,
    pack_error,
    pack_jobs,
    pack_output,
    unpack_error,
    unpack_jobs,
    unpack_whole,
)
from sleb.server.engine_thread.answers import Job
from sleb.server.errors import ApiError, OverloadedError
from sleb.server.grammar.grammar_spec import Part
from sleb.server.grammar.token_rules import TokenRules

floats = st.floats(allow_nan=False)
params = st.builds(
    SamplingParams,
    max_tokens=st.none() | st.integers(0, 100),
    temperature=st.none() | st.floats(0, 100),
    top_p=st.none() | st.floats(0, 1),
    top_k=st.none() | st.integers(-1, 2**63 - 1),
    logit_bias=st.none() | st.dictionaries(st.integers(0, 99), st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(-(2**63), 2**64 - 1),
    stop=st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1), max_size=3),
    stop_token_ids=st.lists(st.integers(0, 99), max_size=3),
    ignore_eos=st.booleans(),
    skip_special_tokens=st.booleans(),
    shown_special_ids=st.frozensets(st.integers(0, 99), max_size=3),
    logprobs=st.none() | st.integers(0, 20),
    repetition_detection=st.none()
    | st.builds(RepetitionDetection, st.integers(1, 64), min_count=st.integers(2, 9)),
)


def across(content):
    return decode(encode(content))


def no_grammar(parts):
    raise AssertionError(parts)


def fields(each):
    """Values that say the same, in one form."""
    told = dict(vars(each))
    return told | {
        "stop": each.stop_strings,
        "stop_token_ids": list(each.stop_token_ids),
        "shown_special_ids": frozenset(each.shown_special_ids),
    }


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=9), params, st.integers(0, 30)), max_size=4
    )
)
def test_jobs(given):
    jobs = [Job(*each) for each in given]
    back = unpack_jobs(across(pack_jobs(jobs)), no_grammar)
    assert [each.prompt_token_ids for each in back] == [each.prompt_token_ids for each in jobs]
    assert [each.depth for each in back] == [each.depth for each in jobs]
    assert [fields(each.params) for each in back] == [fields(each.params) for each in jobs]


def test_jobs_of_one_prompt_share_it_still():
    prompt, same = [1, 2, 3], SamplingParams()
    back = unpack_jobs(
        across(pack_jobs([Job(prompt, same, 0), Job(prompt, same, 0), Job([1, 2, 3], same, 1)])), no_grammar
    )
    assert back[0].prompt_token_ids is back[1].prompt_token_ids
    assert back[0].prompt_token_ids is not back[2].prompt_token_ids


@pytest.mark.parametrize("token_id", [-1, 2**31, 2**40])
def test_what_is_no_token_id_reaches_the_engine_which_says_so(token_id):
    [job] = unpack_jobs(across(pack_jobs([Job([1, token_id], SamplingParams(), 0)])), no_grammar)
    assert job.prompt_token_ids == [1, token_id]


def test_grammars_cross_by_their_parts_and_rules_as_they_are():
    parts = (Part("answer", "regex", "a+"), Part("call", "json", "{}"))
    compiled = object()
    jobs = [
        Job([1], SamplingParams(grammar=NamedGrammar(parts)), 0),
        Job([1], SamplingParams(grammar=TokenRules(40, [1, 33], [[2], [3, 4]])), 0),
    ]
    packed = across(pack_jobs(jobs))
    assert grammars_of(packed) == [parts]
    first, second = unpack_jobs(packed, {parts: compiled}.__getitem__)
    assert first.params.grammar is compiled
    rules, given = second.params.grammar, jobs[1].params.grammar
    assert rules.mask.tolist() == given.mask.tolist()
    assert rules.after == given.after and rules.longest == given.longest


logprobs = st.lists(
    st.builds(
        TokenLogprobs, st.integers(0, 99), floats, st.lists(st.tuples(st.integers(0, 99), floats), max_size=2)
    ),
    max_size=3,
)
outputs = st.builds(
    StepOutput,
    st.just("r7"),
    st.lists(st.integers(0, 99), max_size=3),
    st.text(),
    st.none() | logprobs,
    st.none() | logprobs.map(lambda each: [None, *each]),
    st.sampled_from([None, "stop", "length", "abort", "error"]),
    st.none() | st.integers(0, 99) | st.text(),
    st.integers(0, 99),
    st.integers(0, 99),
    st.integers(0, 99),
    st.builds(Timings, floats, st.none() | floats, st.none() | floats, st.none() | floats),
)


@given(outputs)
def test_increments(output):
    assert unpack_whole("r7", across(pack_output(7, output, whole=True))) == output


def test_a_logarithm_of_nothing_crosses():
    output = StepOutput(
        "r1", [1], "", [TokenLogprobs(1, -math.inf, [])], None, None, None, 1, 1, 0, Timings(0.0)
    )
    assert unpack_whole("r1", across(pack_output(1, output, whole=True))) == output


@pytest.mark.parametrize(
    "error",
    [
        RequestError("no", param="prompt", code="context_length_exceeded"),
        InvalidOutputError("not numbers"),
        EngineDeadError("dead"),
        OverloadedError("full"),
        ApiError(504, "late", type="server_error", code="timeout", headers={"A": "b"}),
    ],
)
def test_errors(error):
    back = unpack_error(across(pack_error(error)))
    assert str(back) == str(error)
    for name in ("param", "code", "status", "type", "headers"):
        assert getattr(back, name, None) == getattr(error, name, None)


def test_an_unforeseen_error_tells_nothing_of_itself():
    back = unpack_error(across(pack_error(KeyError("secret"))))
    assert back.status == 500 and "secret" not in str(back)


def test_messages_come_whole_and_in_order_however_they_are_cut():
    sent = [[Kind.OUTPUTS, [number, "x" * number * 1000]] for number in range(60)]

    async def main():
        ours, theirs = socket.socketpair()
        got, ended = [], asyncio.Event()
        ours.setblocking(False)
        theirs.setblocking(False)
        channel = Channel(got.append, ended.set)
        await channel.connect(ours)
        stream = b"".join(len(each).to_bytes(4, "little") + each for each in map(encode, sent))
        loop = asyncio.get_running_loop()
        for place in range(0, len(stream), 7919):
            await loop.sock_sendall(theirs, stream[place : place + 7919])
        theirs.close()
        async with asyncio.timeout(10):
            await ended.wait()
        with pytest.raises(ConnectionError):
            await channel.call("anything")
        return got

    assert asyncio.run(main()) == sent

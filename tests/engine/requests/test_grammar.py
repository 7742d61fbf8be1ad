"""Answers that follow a grammar: a toy grammar in Python here, so that the engine is tested without any library."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sleb import SamplingParams
from sleb.engine.execute.cuda_graphs import decode_buckets
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.execute.grammar_masks import TokenMasks, fill_masks, num_words
from sleb.engine.execute.sampler import Sampler
from sleb.engine.memory import GIB
from sleb.errors import RequestError
from sleb.kernels import registry
from sleb.kernels.registry import select_kernels

EOS = (256, 258)
VOCABULARY = 264


class Automaton:
    """A finite automaton over bytes: state -> {byte: next state}. The answer may end in `accepting` states."""

    def __init__(self, moves, accepting, eos=EOS, break_at=None):
        self.moves = moves
        self.accepting = accepting
        self.eos = eos
        self.break_at = break_at  # (what, after how many tokens): "fill" or "accept" raises
        self.started = []

    def start(self):
        self.started.append(State(self))
        return self.started[-1]


class State:
    def __init__(self, automaton):
        self.automaton = automaton
        self.state = 0
        self.ended = False
        self.tokens = []

    @property
    def finished(self):
        return self.ended or not self.automaton.moves[self.state]

    def fill(self, mask):
        assert mask.dtype == np.int32 and not mask.any()
        if self.automaton.break_at == ("fill", len(self.tokens)):
            raise RuntimeError("broken on purpose")
        allowed = set(self.automaton.moves[self.state])
        if self.state in self.automaton.accepting:
            allowed |= set(self.automaton.eos)
        for token in allowed:
            mask.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token_id):
        if self.automaton.break_at == ("accept", len(self.tokens)):
            raise RuntimeError("broken on purpose")
        self.tokens.append(token_id)
        if token_id in self.automaton.eos and self.state in self.automaton.accepting:
            self.ended = True
        else:
            self.state = self.automaton.moves[self.state][token_id]


def digits_then(end, count):
    """From `count` to `count` + 3 digits, then `end`."""
    moves = {state: dict.fromkeys(range(48, 58), state + 1) for state in range(count + 3)}
    moves[count + 3] = moves[count + 4] = {}
    for state in range(count, count + 4):
        moves[state] = moves[state] | {ord(end): count + 4}
    return Automaton(moves, {count + 4})


def letters():
    """Letters a to c for ever; may end after any number, none included."""
    return Automaton({0: dict.fromkeys(b"abc", 0)}, {0})


@pytest.fixture(params=["torch", "cpu", "gpu"], scope="module")
def llm(request, make_llm, tiny_model_dir):
    """An LLM over the tiny model: eager, with the C kernels, and overlapped with replayed steps."""
    return build(request.param, make_llm, tiny_model_dir)


def build(kind, make_llm, model, **options):
    if kind in ("torch", "cpu"):
        if kind == "cpu" and select_kernels("auto", torch.device("cpu")).cpu is None:
            pytest.skip("no C kernels here")
        return make_llm(model, kernels=kind, **{"page_size": 16} | options)
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "triton_gpu_kernels", registry.torch_gpu_kernels)
        llm = make_llm(model, kernels="triton", **{"max_num_batched_tokens": 32} | options)
    executor = llm.engine.runner.executor
    assert isinstance(executor, GpuExecutor)

    def keep(function):
        function()
        return function

    executor.capture(decode_buckets(executor.max_num_seqs), keep)
    return llm


def params(grammar, seed=0, **options):
    return SamplingParams(
        **({"temperature": 1.5, "seed": seed, "max_tokens": 200, "grammar": grammar} | options)
    )


def test_every_seed_follows_the_grammar_beside_free_requests(llm):
    grammars = [digits_then("!", 1), digits_then("?", 7), letters()]
    patterns = [r"\d{1,4}!", r"\d{7,10}\?", "[abc]*"]
    free = SamplingParams(temperature=1.0, seed=5, max_tokens=15, ignore_eos=True)
    [alone] = llm.generate([[65, 66, 67]], free)
    asked = [params(grammars[number % 3], number) for number in range(12)]
    prompts = [[65 + number % 7, 66] for number in range(12)]
    *outputs, beside = llm.generate([*prompts, [65, 66, 67]], [*asked, free])
    for number, output in enumerate(outputs):
        assert output.finish_reason == "stop"
        assert re.fullmatch(patterns[number % 3], output.text)
        assert output.choices[0].stop_reason is None
    assert beside.token_ids == alone.token_ids
    for grammar in grammars:  # each answer had a state of its own, and it saw all of its tokens
        assert len(grammar.started) == 4
    seen = sorted(state.tokens for grammar in grammars for state in grammar.started)
    assert seen == sorted(output.token_ids for output in outputs)
    llm.engine.check_integrity()


def test_a_finished_grammar_ends_the_answer_without_another_token(llm):
    [output] = llm.generate([[65]], params(digits_then(".", 3), temperature=0.0))
    assert output.text.endswith(".") and output.token_ids[-1] == ord(".")
    assert output.finish_reason == "stop"


def test_length_cuts_and_stop_strings_work(llm):
    [cut, stopped] = llm.generate(
        [[65], [65]],
        [
            params(digits_then(".", 50), max_tokens=20),
            params(digits_then(".", 50), stop=[str(digit) for digit in range(10)]),
        ],
    )
    assert re.fullmatch(r"\d{20}", cut.text) and cut.finish_reason == "length"
    assert stopped.text == "" and stopped.finish_reason == "stop" and len(stopped.token_ids) == 1


def test_min_tokens_and_ignore_eos_keep_the_end_back(llm):
    outputs = llm.generate(
        [[70]] * 8,
        [params(letters(), seed, min_tokens=9) for seed in range(4)]
        + [params(letters(), seed, ignore_eos=True, max_tokens=15) for seed in range(4)],
    )
    assert all(len(output.text) >= 9 for output in outputs[:4])
    assert all(len(output.text) == 15 and output.finish_reason == "length" for output in outputs[4:])


def test_min_tokens_give_way_where_only_the_end_may_follow(llm):
    late = Automaton({0: {97: 1}, 1: {97: 2}, 2: {}}, {2})
    [finished] = llm.generate([[70]], params(late, min_tokens=5))
    assert (finished.text, finished.finish_reason) == ("aa", "stop")

    class NeverFinished(State):
        finished = property(lambda self: self.ended)

    late.start = lambda: NeverFinished(late)
    [by_eos] = llm.generate([[70]], params(late, min_tokens=5))
    assert by_eos.text == "aa" and by_eos.finish_reason == "stop" and by_eos.token_ids[-1] in EOS


def test_bias_penalties_and_filters_choose_among_what_is_allowed(llm):
    [biased, filtered, penalised] = llm.generate(
        [[65]] * 3,
        [
            params(
                digits_then(".", 8),
                logit_bias={ord("7"): 100.0, ord("a"): 100.0, ord("."): -100},
                max_tokens=11,
            ),
            params(digits_then(".", 3), top_k=1, top_p=0.1, min_p=0.5, temperature=1.0),
            params(digits_then(".", 9), presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0),
        ],
    )
    assert biased.text == "7" * 11
    [greedy] = llm.generate([[65]], params(digits_then(".", 3), temperature=0.0))
    assert filtered.text == greedy.text
    assert re.fullmatch(r"\d{9,12}\.", penalised.text)


def test_logprobs_are_those_before_the_mask(llm):
    [output] = llm.generate([[65, 66]], params(digits_then(".", 4), logprobs=3, max_tokens=6))
    tokens = [65, 66, *output.token_ids]
    wanted = llm.score(tokens)[1:]
    got = torch.tensor([entry.logprob for entry in output.logprobs])
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
    tops = {token for entry in output.logprobs for token, _ in entry.top}
    assert not tops <= set(range(48, 58))  # the best tokens are not only digits


@pytest.mark.parametrize("when", [("fill", 0), ("fill", 3), ("accept", 0), ("accept", 4)], ids=str)
def test_a_broken_grammar_ends_its_own_request_alone(llm, when, caplog):
    broken = digits_then(".", 10)
    broken.break_at = when
    good = params(digits_then(".", 10), 3)
    [alone] = llm.generate([[65]], good)
    [bad, beside] = llm.generate([[65], [65]], [params(broken, 1), good])
    assert bad.finish_reason == "error" and bad.token_ids == [ord(each) for each in bad.text]
    assert len(bad.text) == when[1]
    assert beside.token_ids == alone.token_ids
    assert "broken on purpose" in caplog.text
    assert not llm.engine.has_unfinished()
    llm.engine.check_integrity()


def test_a_grammar_that_allows_nothing_is_an_error(llm):
    stuck = Automaton({0: {97: 1}, 1: {}}, set())
    stuck.start = lambda: type("Stuck", (State,), {"finished": False})(stuck)
    [output] = llm.generate([[65]], params(stuck))
    assert (output.text, output.finish_reason) == ("a", "error")


def test_a_grammar_that_cannot_be_begun_is_refused(llm):
    broken = letters()
    broken.start = lambda: 1 / 0
    with pytest.raises(RequestError, match="cannot be begun"):
        llm.generate([[65]], params(broken))
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("kind", ["torch", "gpu"])
def test_preemption_keeps_the_state(kind, make_llm, tiny_model_dir):
    """Too few pages: requests are taken back and computed anew, and their answers are as with enough of them."""
    wide = build(kind, make_llm, tiny_model_dir)
    asked = [params(digits_then(".", 9 + number), number, max_tokens=20) for number in range(4)]
    prompts = [[65 + number] * 5 for number in range(4)]
    wanted = wide.generate(prompts, asked)
    memory = (8 * 4 * wide.engine.kv_bytes_per_token(0) + 0.5) / GIB
    tight = build(kind, make_llm, tiny_model_dir, page_size=4, kv_cache_memory=memory, max_model_len=32)
    outputs = tight.generate(prompts, asked)
    assert tight.engine.stats().num_preemptions > 0
    assert [output.token_ids for output in outputs] == [output.token_ids for output in wanted]
    assert all(re.fullmatch(r"\d+\.", output.text) for output in outputs)


def test_the_engine_waits_and_the_mask_is_made_after_the_launch(make_llm, tiny_model_dir):
    llm = build("gpu", make_llm, tiny_model_dir)
    events = []
    grammar = digits_then(".", 3)
    original_fill, run = State.fill, llm.engine.runner.executor.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "fill", lambda self, mask: (events.append("fill"), original_fill(self, mask))[1])
        patch.setattr(
            llm.engine.runner.executor, "run", lambda *values: (events.append("run"), run(*values))[1]
        )
        llm.generate([[65]], params(grammar, temperature=0.0))
    assert events == ["run", "fill"] * (len(events) // 2) and len(events) >= 8


def test_such_a_request_is_never_a_plain_greedy_one(make_request):
    request = make_request([1], temperature=0.0)
    assert request.is_greedy and not request.adjusts_logits and not request.must_wait
    request.grammar = letters().start()
    assert not request.is_greedy and request.adjusts_logits and request.must_wait


@given(
    st.integers(1, 130).flatmap(
        lambda size: st.tuples(
            st.just(size), st.lists(st.lists(st.integers(0, size - 1), min_size=1), min_size=1, max_size=4)
        )
    ),
    st.data(),
)
def test_masks_equal_a_naive_loop(sizes, data):
    size, allowed = sizes
    num_rows = len(allowed) + data.draw(st.integers(0, 2))
    rows = sorted(data.draw(st.permutations(range(num_rows)))[: len(allowed)])
    words = np.zeros((len(allowed), num_words(size)), dtype=np.int32)
    for number, tokens in enumerate(allowed):
        for token in tokens:
            words.view(np.uint32)[number, token // 32] |= np.uint32(1 << token % 32)
    logits = torch.randn(num_rows, size)
    wanted = logits.clone()
    for row, tokens in zip(rows, allowed, strict=True):
        for token in set(range(size)) - set(tokens):
            wanted[row, token] = -torch.inf
    TokenMasks(rows, words).apply(logits)
    assert torch.equal(logits, wanted)


def test_no_grammar_no_masks(make_request):
    assert fill_masks([make_request([1])], VOCABULARY, frozenset(EOS)) is None


def test_the_sampler_takes_only_what_a_mask_allows(make_request):
    sampler = Sampler(select_kernels("torch", torch.device("cpu")), frozenset(EOS))
    requests = [make_request([1], temperature=temperature, seed=4) for temperature in (0.0, 5.0, 1.0, 0.0)]
    for request in requests[:3]:
        request.grammar = letters().start()
    logits = torch.randn(4, VOCABULARY) * 3
    best = int(logits[3].argmax())
    masks = fill_masks(requests, VOCABULARY, frozenset(EOS))
    tokens = [each.token_id for each in sampler.sample(logits, requests, masks).read()]
    assert all(token in {*b"abc", *EOS} for token in tokens[:3]) and tokens[3] == best

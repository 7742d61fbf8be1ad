"""Repetition, loops and early ends of hand-made answers; and real ones against transformers' greedy decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleb import LLM
from sleb.benchmarks.quality.answers import (
    PROMPTS,
    encode_prompts,
    generate_answers,
    has_looped_tail,
    read_prompts,
    spoken,
    summarise,
)
from sleb.engine.outputs import Choice, Output
from sleb.errors import ConfigError

PLAIN = list(range(100, 140))


def answer(token_ids, text="words", reason="length"):
    return Output([1], 0, [Choice(text, list(token_ids), reason)], None, 0, None)


class TestRepetition:
    @pytest.mark.parametrize(
        ("tokens", "looped"),
        [
            ([], False),
            (PLAIN, False),
            ([7] * 11, False),
            ([7] * 12, True),
            ([*PLAIN, *[7] * 12], True),
            ([*[7] * 12, 8], False),  # it got out
            ([*PLAIN, *[1, 2, 3, 4] * 3], True),
            ([*PLAIN, *[1, 2, 3, 4] * 2], False),
            ([*PLAIN, *[1, 2, 3] * 3], False),  # nine tokens
            ([*PLAIN, 3, *[1, 2, 3] * 4, 1, 2], True),  # cut within the piece
            (PLAIN * 3, True),
            (PLAIN * 2, False),
        ],
    )
    def test_the_tail(self, tokens, looped):
        assert has_looped_tail(tokens) == looped


class TestSummary:
    def test_of_the_dense_model(self):
        answers = [
            answer([*PLAIN, 2], reason="stop"),
            answer([7] * 20),
            answer([2], "", "stop"),
            answer([1], " \n"),
        ]
        found, example = summarise(["a", "b", "c", "d"], answers, None)
        assert found["mean tokens"] == (40 + 20 + 0 + 1) / 4
        assert found["looped"] == 0.25
        assert not {"early", "identical"} & found.keys() and example is None

    def test_against_the_dense_model(self):
        dense = [answer(PLAIN, "plain"), answer(PLAIN, "full"), answer(PLAIN), answer([1, 2], "two")]
        pruned = [
            answer(PLAIN, "plain"),
            answer([*PLAIN[:9], 2], "short", "stop"),  # nine of forty
            answer([*PLAIN[:10], 2], "a quarter", "stop"),
            answer([1, 9], "other"),
        ]
        found, example = summarise(["a", "b", "c", "d"], pruned, dense)
        assert (found["early"], found["identical"]) == (0.25, 0.25)
        assert example == {"prompt": "b", "dense": "full", "pruned": "short"}

    def test_an_empty_answer_is_an_early_end(self):
        found, _ = summarise(["a"], [answer([3, 3], "  ")], [answer([1, 2], "ab")])
        assert found["early"] == 1.0

    def test_equal_answers_have_no_example(self):
        assert summarise(["a"], [answer([1])], [answer([1])])[1] is None


class TestPrompts:
    def test_those_built_in(self):
        assert read_prompts(None) == PROMPTS
        assert len(set(PROMPTS)) == 16

    def test_of_a_file(self, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_text("one\n\n  two, größer \n", encoding="utf-8")
        assert read_prompts(path) == ("one", "two, größer")

    @pytest.mark.parametrize(("content", "match"), [(b"\n \n", "holds no prompt"), (b"\xff", "not UTF-8")])
    def test_bad_files(self, tmp_path, content, match):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=match):
            read_prompts(path)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_prompts(tmp_path / "absent")

    def test_the_chat_template_is_used_where_there_is_one(self, tiny_model_dir):
        llm = LLM(tiny_model_dir, device="cpu", kv_cache_memory=0.01, kernels="torch")
        [ids] = encode_prompts(llm, ["Hi"])
        assert ids == [257, *b"user\nHi", 258, *b"\n", 257, *b"assistant\n"]
        llm.engine.text.chat_template = None
        assert encode_prompts(llm, ["Hi"]) == [[*b"Hi"]]


def test_real_answers(tiny_model_dir, tiny_chain):
    """Depths 0 and 2 against transformers' own greedy tokens, whatever the generation config says."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": "float32", "device": "cpu", "kernels": "torch", "kv_cache_memory": 0.02}
    llm = LLM(tiny_model_dir, tiny_chain, [0, 2], **options)
    llm.engine.defaults = replace(llm.engine.defaults, temperature=2.0, repetition_penalty=1.5)
    seen = []
    (dense, _), (pruned, _) = generate_answers(
        llm, PROMPTS[:4], (0, 2), 24, lambda depth, done, total: seen.append((depth, done, total))
    )
    assert seen[-1][0] == 2 and {total for _, _, total in seen} == {4 * 24}
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    expected = {}
    for depth in (0, 2):
        if depth:
            model.model.layers = torch.nn.ModuleList(model.model.layers[block] for block in (0, 2, 4, 5))
        expected[depth] = [greedy(model, ids, 24) for ids in encode_prompts(llm, PROMPTS[:4])]
    assert dense["mean tokens"] == sum(map(len, expected[0])) / 4
    assert pruned["mean tokens"] == sum(map(len, expected[2])) / 4
    pairs = list(zip(expected[0], expected[2], strict=True))
    assert pruned["identical"] == sum(one == other for one, other in pairs) / 4


def greedy(model, ids, limit):
    """Most probable tokens until an end token, which is left out; no cache."""
    made = []
    for _ in range(limit):
        with torch.inference_mode():
            token = int(model(torch.tensor([[*ids, *made]]), use_cache=False).logits[0, -1].argmax())
        if token in (258, 256):
            break
        made.append(token)
    return made


def test_the_token_that_ends_an_answer_is_none_of_it():
    assert spoken(answer([1, 2], reason="stop")) == [1]
    assert spoken(answer([1, 2], reason="length")) == [1, 2]

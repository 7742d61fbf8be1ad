"""Rules about tokens and the cutting of prompts, over the real engine; transformers on the same folder is the judge."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM

from sleb.engine.config import EngineConfig
from sleb.engine.engine import Engine

PROMPT = "Say something"
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def server(tiny_model_dir, start_server):
    config = EngineConfig(
        model=str(tiny_model_dir), dtype="float32", device="cpu", kernels="torch", kv_cache_memory=0.01
    )
    running = start_server(Engine(config), max_num_seqs=8)
    yield running
    running.wait_idle()
    running.close()


@pytest.fixture(scope="module")
def reference(tiny_model_dir):
    """The greedy continuation of PROMPT by transformers, with options of its `generate`."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)

    def generate(prompt_ids, **options):
        output = model.generate(
            torch.tensor([prompt_ids]),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return output[0, len(prompt_ids) :].tolist()

    return generate


def complete(server, **fields):
    plain = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": True}
    answer = server.complete(**({"prompt": PROMPT} | plain | fields))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def text_of(server, token_ids):
    return server.engine.tokenizer.decode(token_ids, skip_special_tokens=False)


def test_allowed_token_ids_are_what_is_left_when_all_others_are_suppressed(server, reference):
    free = complete(server)
    allowed = sorted({65, 66, 67, 200, *free["token_ids"][3:7]})
    others = [each for each in range(server.engine.spec.vocab_size) if each not in allowed]
    expected = reference(free["prompt_token_ids"], suppress_tokens=others)
    assert complete(server, allowed_token_ids=allowed)["token_ids"] == expected != free["token_ids"]


def test_allowed_tokens_of_a_sampled_answer(server):
    for seed in range(3):
        choice = complete(server, allowed_token_ids=[48, 49.0], temperature=2.0, seed=seed)
        assert set(choice["token_ids"]) == {48, 49}


def test_the_end_may_come_only_where_it_is_allowed(server):
    end = min(server.engine.eos_token_ids)
    choice = complete(
        server, allowed_token_ids=[65, end], ignore_eos=False, min_tokens=5, temperature=1.0, seed=1
    )
    assert set(choice["token_ids"][:5]) == {65}
    only = complete(server, allowed_token_ids=[end], ignore_eos=False, min_tokens=3)
    assert set(only["token_ids"]) == {end}  # nothing else may come
    assert complete(server, allowed_token_ids=[65], ignore_eos=False)["finish_reason"] == "length"


def test_bad_words_are_those_of_transformers(server, reference):
    """Single tokens, and pairs, of which only the second token is held back."""
    num_pairs = 0
    for prompt in "abcdefgh":
        free = complete(server, prompt=prompt)
        token_ids = free["token_ids"]
        pairs = [list(pair) for pair in pairwise(token_ids) if all(32 < each < 127 for each in pair)]
        single = next(each for each in token_ids if 32 < each < 127)
        banned = [[single], *[pair for pair in pairs if single not in pair][:1]]
        num_pairs += len(banned) - 1
        words = [text_of(server, each) for each in banned]
        expected = reference(free["prompt_token_ids"], bad_words_ids=banned)
        assert complete(server, prompt=prompt, bad_words=words)["token_ids"] == expected != token_ids
    assert num_pairs


def test_bad_words_of_a_sampled_answer(server):
    for seed in range(4):
        text = complete(
            server, bad_words=["ab", "b", "ccc"], allowed_token_ids=None, temperature=1.0, seed=seed
        )["text"]
        assert "b" not in text and "ccc" not in text


@pytest.mark.parametrize("limit", [1, 4, 500])
def test_a_prompt_is_cut_from_the_left(server, limit):
    whole = complete(server)["prompt_token_ids"]
    cut = complete(server, truncate_prompt_tokens=limit, echo=True)
    assert cut["prompt_token_ids"] == whole[-limit:]
    assert cut["text"].startswith(text_of(server, whole[-limit:]))
    assert cut["token_ids"] == complete(server, prompt=whole[-limit:])["token_ids"]
    messages = [{"role": "user", "content": PROMPT}]
    fields = {"messages": messages, "truncate_prompt_tokens": limit, "max_tokens": 1}
    assert server.post("/v1/chat/completions", **fields).json()["usage"]["prompt_tokens"] <= limit


def test_a_prompt_is_cut_to_what_fits(server):
    room = server.engine.max_model_len
    long = [*range(200)] * 5
    for fields, left in (({"max_tokens": 8}, 8), ({"max_tokens": -1}, 1)):
        choice = complete(server, prompt=long, truncate_prompt_tokens=-1, **fields)
        assert choice["prompt_token_ids"] == long[-(room - left) :]
        assert len(choice["token_ids"]) == left


def test_special_tokens_may_be_left_out(server):
    with_bos, without = (
        complete(server, add_special_tokens=each)["prompt_token_ids"] for each in (True, False)
    )
    assert without == list(PROMPT.encode()) and with_bos[-len(without) :] == without


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "bad_words": ["a"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1], "regex": "a"}, "allowed_token_ids"),
        ({"bad_words": ["  "]}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words": ["a"] * 300}, "bad_words"),
        ({"bad_words": ["a"], "response_format": {"type": "json_object"}}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 2**64}, "truncate_prompt_tokens"),
    ],
    ids=str,
)
def test_refused(server, fields, param):
    for answer in (server.complete("a", **fields), server.chat("a", **fields)):
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("num_top", [0, 3])
def test_prompt_logprobs_are_those_of_transformers(server, tiny_model_dir, num_top):
    fields = {"prompt_logprobs": num_top, "max_tokens": 2, "return_token_ids": True}
    chat = {"messages": [{"role": "user", "content": PROMPT}]}
    completion, conversation = (
        server.complete(PROMPT, **fields).json(),
        server.post("/v1/chat/completions", **chat, **fields).json(),
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for choice, told in (
        (completion["choices"][0], completion["choices"][0]["prompt_logprobs"]),
        (conversation["choices"][0], conversation["prompt_logprobs"]),
    ):
        token_ids = choice["prompt_token_ids"]
        expected = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        assert told[0] is None and len(told) == len(token_ids)
        for place in range(1, len(token_ids)):
            best = expected[place - 1].topk(num_top).indices.tolist()
            assert {int(each) for each in told[place]} == {*best, token_ids[place]}
            for token_id, entry in told[place].items():
                assert entry["logprob"] == pytest.approx(expected[place - 1, int(token_id)].item(), abs=1e-4)
                assert entry["rank"] == (best.index(int(token_id)) + 1 if int(token_id) in best else None)


def test_an_answer_that_loops_says_so_in_a_header_or_in_the_last_chunk(server):
    loop = {
        "logit_bias": {"65": 100},
        "repetition_detection": {"max_pattern_size": 4, "min_count": 6},
        "temperature": 0,
    }
    for path, fields in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}]}),
    ):
        answer = server.post(path, max_tokens=40, **loop, **fields)
        choice = answer.json()["choices"][0]
        assert answer.headers["X-Stop-Reason"] == choice["stop_reason"] == "repetition_detected"
        assert choice["finish_reason"] == "length" and answer.json()["usage"]["completion_tokens"] == 6
        stream = server.post(path, max_tokens=40, stream=True, **loop, **fields).text
        assert '"finish_reason":"length","stop_reason":"repetition_detected"' in stream
    free = server.complete(PROMPT, max_tokens=40, logit_bias=loop["logit_bias"], temperature=0)
    assert "X-Stop-Reason" not in free.headers and free.json()["choices"][0]["stop_reason"] is None
    bad = server.complete(PROMPT, repetition_detection={"max_pattern_size": 4}).json()["error"]
    assert bad["param"] == "repetition_detection" and "min_count" in bad["message"]

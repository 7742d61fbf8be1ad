"""The public face of the engine: prompts in, answers out, with every way for an answer to end."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sleb import LLM, LayerMap, SamplingParams
from sleb.engine.memory import GIB
from sleb.errors import ConfigError, ModelError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model_dir, tiny_chain):
    return LLM(tiny_model_dir, layer_map=tiny_chain, tiers=(0, 3, 5), page_size=4, max_num_seqs=8)


@pytest.fixture(autouse=True)
def nothing_left_behind(request):
    """After every test that used the shared LLM: nothing queued, all pages free, accounts in order."""
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        assert not engine.has_unfinished() and engine.num_running == engine.num_waiting == 0
        assert engine.stats().kv_cache_usage == 0.0
        engine.check_integrity()


def answer(llm, prompt="A prompt", depth=None, **params):
    """One greedy answer; the parameters given replace GREEDY's."""
    settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True} | params
    return llm.generate([prompt], SamplingParams(**settings), depth)[0]


def text_of(llm, token_ids):
    return bytes(token for token in token_ids if token < 256).decode(errors="replace")


def forced(text):
    """Parameters that make the model say bytes of these texts only: everything else is biased away."""
    return {"logit_bias": dict.fromkeys(text.encode(), 100)}


class TestPromptsAndDepths:
    def test_a_string_and_its_token_ids_are_the_same_prompt(self, llm):
        ids = llm.engine.encode("Grüße, 世界")
        assert ids == list("Grüße, 世界".encode())
        outputs = llm.generate(["Grüße, 世界", ids], GREEDY)
        assert outputs[0].token_ids == outputs[1].token_ids
        assert outputs[0].prompt_token_ids == outputs[1].prompt_token_ids == ids

    @pytest.mark.parametrize("prompt", ["one", [1, 2, 3], (1, 2, 3)], ids=["string", "list", "tuple"])
    def test_a_single_prompt_need_not_be_in_a_list(self, prompt, llm):
        outputs = llm.generate(prompt, GREEDY)
        assert len(outputs) == 1
        assert outputs[0].token_ids == llm.generate([prompt], GREEDY)[0].token_ids

    def test_no_prompts_no_outputs(self, llm):
        assert llm.generate([], GREEDY) == []

    def test_outputs_are_in_the_order_of_the_prompts(self, llm):
        prompts = [[40 + index] * (1 + 7 * index % 11) for index in range(12)]
        params = [SamplingParams(temperature=0.0, max_tokens=1 + 5 * index % 7) for index in range(12)]
        outputs = llm.generate(prompts, params)
        assert [output.prompt_token_ids for output in outputs] == prompts

    def test_depth_one_for_all_or_one_a_prompt(self, llm):
        prompt = list(range(50, 70))
        alone = {depth: answer(llm, prompt, depth).token_ids for depth in (0, 3, 5)}
        assert len({tuple(tokens) for tokens in alone.values()}) == 3
        mixed = llm.generate([prompt] * 4, GREEDY, [5, 0, None, 3])
        assert [output.depth for output in mixed] == [5, 0, 3, 3]
        assert [output.token_ids for output in mixed] == [alone[5], alone[0], alone[3], alone[3]]

    def test_default_tier_is_the_recommended_depth_if_served_else_the_first(self, tiny_model_dir, tiny_chain):
        def default(layer_map, tiers):
            return LLM(tiny_model_dir, layer_map, tiers).engine.default_tier.depth

        assert default(tiny_chain, (0, 3)) == 3
        assert default(tiny_chain, (5, 0)) == 5
        assert default(tiny_chain, None) == 3
        assert default(None, None) == default("none", None) == 0

    def test_tiers(self, llm, tiny_chain):
        tiers = llm.engine.tiers
        assert [tier.id for tier in tiers] == ["tiny-llama", "tiny-llama:sleb-3", "tiny-llama:sleb-5"]
        assert [tier.num_blocks_kept for tier in tiers] == [6, 4, 2]
        assert [tier.removed for tier in tiers] == [tiny_chain.removed[:depth] for depth in (0, 3, 5)]
        assert llm.engine.tier("tiny-llama:sleb-3") is llm.engine.tier(3) is tiers[1]
        with pytest.raises(RequestError, match="tiny-llama:sleb-3") as caught:
            llm.engine.tier("gpt-4")
        assert caught.value.code == "model_not_found"

    def test_a_layer_map_may_be_a_file(self, tiny_model_dir, tiny_chain, tmp_path, llm):
        tiny_chain.save(tmp_path / "map.json")
        loaded = LLM(tiny_model_dir, layer_map=tmp_path / "map.json")
        assert loaded.engine.layer_map == tiny_chain
        assert answer(loaded, "hello").token_ids == answer(llm, "hello", 3).token_ids

    def test_the_public_names_are_the_engines(self):
        from sleb.engine import llm
        from sleb.engine.requests import sampling_params

        assert LLM is llm.LLM and SamplingParams is sampling_params.SamplingParams


class TestOutput:
    def test_fields(self, llm):
        output = answer(llm, "Hello", logprobs=2, prompt_logprobs=1)
        assert len(output.token_ids) == 12 == len(output.logprobs)
        assert output.text == text_of(llm, output.token_ids)
        assert output.finish_reason == "length"
        assert len(output.prompt_logprobs) == 5 and output.prompt_logprobs[0] is None
        assert [len(entry.top) for entry in output.logprobs] == [2] * 12
        times = output.timings
        assert times.arrival <= times.first_scheduled <= times.first_token <= times.finished

    def test_absent_unless_asked_for(self, llm):
        output = answer(llm, "Hello")
        assert output.logprobs is None and output.prompt_logprobs is None

    def test_joined_increments_are_the_text(self, llm):
        """The engine's own increments, as the server streams them."""
        engine, pieces, tokens = llm.engine, [], []
        engine.add_request(
            "stream", list(b"stream me"), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        )
        while engine.has_unfinished():
            for output in engine.step():
                assert output.request_id == "stream" and output.num_prompt_tokens == 9
                pieces.append(output.new_text)
                tokens += output.new_token_ids
                assert output.num_output_tokens == len(tokens)
        assert output.finish_reason == "length"
        assert "".join(pieces) == text_of(llm, tokens)
        assert engine.step() == []

    def test_stats_count(self, tiny_model_dir):
        llm = LLM(tiny_model_dir, page_size=4)
        llm.generate([list(range(10))] * 3, GREEDY)
        llm.generate([list(range(10))], GREEDY)
        stats = llm.engine.stats()
        assert (stats.num_prompt_tokens, stats.num_output_tokens) == (40, 48)
        assert stats.num_cached_tokens == 8
        assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)

    def test_progress_counts_tokens(self, llm):
        seen = []
        llm.generate(["one", "two"], GREEDY, on_progress=seen.append)
        assert sum(seen) == 24


class TestScore:
    def test_shape_and_values(self, llm):
        ids = list(range(30, 60))
        scores = llm.score(ids, depth=3)
        assert scores.shape == (29,) and scores.dtype == torch.float32
        entries = answer(llm, ids, 3, max_tokens=0, prompt_logprobs=0).prompt_logprobs
        assert scores.tolist() == pytest.approx([entry.logprob for entry in entries[1:]], abs=1e-6)
        assert not torch.allclose(scores, llm.score(ids, depth=0), atol=0.1)

    def test_one_token_has_no_score(self, llm):
        assert llm.score([5]).shape == (0,)

    def test_a_full_context_can_be_scored(self, llm):
        ids = [index % 200 for index in range(llm.engine.max_model_len)]
        assert llm.score(ids).shape == (llm.engine.max_model_len - 1,)

    def test_score_of_an_answer_is_its_logprobs(self, llm):
        output = answer(llm, "So", logprobs=0)
        scores = llm.score(output.prompt_token_ids + output.token_ids)[1:]
        assert scores.tolist() == pytest.approx([entry.logprob for entry in output.logprobs], abs=1e-4)


class TestEnds:
    def test_max_tokens_zero_scores_only(self, llm):
        output = answer(llm, "Hello", max_tokens=0, prompt_logprobs=3)
        assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")
        assert len(output.prompt_logprobs) == 5

    def test_max_tokens_none_fills_the_context(self, llm):
        room = 9
        prompt = [33] * (llm.engine.max_model_len - room)
        assert len(answer(llm, prompt, max_tokens=None).token_ids) == room
        output = answer(llm, prompt, max_tokens=10_000)
        assert len(output.token_ids) == room and output.finish_reason == "length"

    @pytest.mark.parametrize("eos", [256, 258])
    def test_end_of_sequence(self, eos, llm):
        """Both ids of the generation config end an answer; they are in the ids, not in the text."""
        output = answer(llm, "Hi", ignore_eos=False, logit_bias={eos: 100})
        assert (output.token_ids, output.text, output.finish_reason) == ([eos], "", "stop")
        assert output.choices[0].stop_reason is None
        ignored = answer(llm, "Hi", logit_bias={eos: 100})
        assert ignored.token_ids == [eos] * 12 and ignored.finish_reason == "length"

    def test_a_token_that_merely_closes_nothing_is_no_end(self, llm):
        assert len(answer(llm, "Hi", ignore_eos=False, logit_bias={259: 100}).token_ids) == 12

    def test_min_tokens_puts_the_end_off(self, llm):
        output = answer(llm, "Hi", ignore_eos=False, min_tokens=5, logit_bias={258: 100})
        assert len(output.token_ids) == 6 and output.token_ids[-1] == 258
        assert not {256, 258} & set(output.token_ids[:5])

    def test_stop_token_ids(self, llm):
        tokens = answer(llm, "Hi").token_ids
        stop = next(token for index, token in enumerate(tokens) if index >= 3 and token not in tokens[:index])
        output = answer(llm, "Hi", stop_token_ids=[stop])
        assert output.token_ids == tokens[: tokens.index(stop) + 1]
        assert output.finish_reason == "stop" and output.choices[0].stop_reason == stop
        assert output.text == text_of(llm, output.token_ids[:-1])
        shown = answer(llm, "Hi", stop_token_ids=[stop], include_stop_str_in_output=True)
        assert shown.text == text_of(llm, output.token_ids)

    def test_stop_string_across_tokens(self, llm):
        """Every token is a byte, so a stop string of several characters always spans tokens."""
        free = answer(llm, "Hi", max_tokens=30, **forced("abcdef"))
        stop = free.text[7:11]
        at = free.text.index(stop)
        output = answer(llm, "Hi", max_tokens=30, stop=["zzz", stop], **forced("abcdef"))
        assert output.text == free.text[:at]
        assert output.token_ids == free.token_ids[: at + 4]
        assert output.finish_reason == "stop" and output.choices[0].stop_reason == stop
        shown = answer(
            llm, "Hi", max_tokens=30, stop=stop, include_stop_str_in_output=True, **forced("abcdef")
        )
        assert shown.text == free.text[: at + 4]

    def test_stop_string_waits_for_min_tokens(self, llm):
        free = answer(llm, "Hi", max_tokens=30, **forced("ab"))
        output = answer(llm, "Hi", max_tokens=30, min_tokens=20, stop=["a", "b"], **forced("ab"))
        assert len(output.token_ids) == 20
        assert output.text == free.text[:19]

    def test_an_unfinished_stop_string_comes_out_at_the_end(self, llm):
        free = answer(llm, "Hi", **forced("abc"))
        output = answer(llm, "Hi", stop=free.text[-3:] + "!", **forced("abc"))
        assert output.text == free.text and output.finish_reason == "length"

    def test_an_unfinished_character_becomes_a_replacement_character(self, llm):
        output = answer(llm, "Hi", max_tokens=1, logit_bias={0xE2: 100})
        assert output.text == "\ufffd"


class TestSeeds:
    PARAMS = SamplingParams(temperature=1.5, max_tokens=20, seed=11, ignore_eos=True)

    def test_the_same_seed_gives_the_same_tokens_alone_and_in_any_batch(self, llm):
        alone = llm.generate(["A prompt"], self.PARAMS)[0].token_ids
        assert llm.generate(["A prompt"], self.PARAMS)[0].token_ids == alone
        others = [SamplingParams(temperature=1.0, max_tokens=5 + index, seed=index) for index in range(6)]
        for place in (0, 3, 6):
            params = [*others[:place], self.PARAMS, *others[place:]]
            prompts = ["Something else"] * place + ["A prompt"] + ["Others"] * (6 - place)
            assert llm.generate(prompts, params)[place].token_ids == alone

    @pytest.mark.parametrize("other", [12, 0, -11, 2**63, 2**64 - 1, None])
    def test_another_seed_gives_other_tokens(self, other, llm):
        params = SamplingParams(temperature=1.5, max_tokens=20, seed=other, ignore_eos=True)
        assert (
            llm.generate(["A prompt"], params)[0].token_ids
            != llm.generate(["A prompt"], self.PARAMS)[0].token_ids
        )

    def test_requests_without_a_seed_differ(self, llm):
        params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
        assert len({tuple(output.token_ids) for output in llm.generate(["A prompt"] * 5, params)}) == 5

    def test_the_engines_seed_makes_a_run_repeatable(self, tiny_model_dir):
        params = SamplingParams(temperature=1.5, max_tokens=20, ignore_eos=True)
        runs = [LLM(tiny_model_dir, seed=seed).generate(["A"] * 2, params) for seed in (4, 4, 5)]
        tokens = [[output.token_ids for output in run] for run in runs]
        assert tokens[0] == tokens[1] != tokens[2]


class TestSeveralChoices:
    def test_choices_differ_and_repeat(self, llm):
        params = SamplingParams(
            n=3, temperature=1.5, max_tokens=15, seed=2, ignore_eos=True, prompt_logprobs=0, logprobs=1
        )
        first, second = (llm.generate(["A prompt"], params)[0] for _ in range(2))
        tokens = [tuple(choice.token_ids) for choice in first.choices]
        assert len(set(tokens)) == 3
        assert tokens == [tuple(choice.token_ids) for choice in second.choices]
        assert len(first.prompt_logprobs) == 8
        assert all(len(choice.logprobs) == 15 for choice in first.choices)
        assert first.text == first.choices[0].text

    @pytest.mark.parametrize("seed", [-1, 2**64 - 1])
    def test_at_the_ends_of_the_range_of_seeds(self, seed, llm):
        params = SamplingParams(n=3, temperature=1.5, max_tokens=15, seed=seed, ignore_eos=True)
        assert len({tuple(choice.token_ids) for choice in llm.generate(["A"], params)[0].choices}) == 3

    def test_greedy_choices_are_equal(self, llm):
        output = answer(llm, "A prompt", n=3)
        assert len(output.choices) == 3
        assert all(choice.token_ids == output.token_ids for choice in output.choices)


def test_logprobs_survive_preemption(tiny_model_dir, tiny_chain, llm):
    """Prompt log-probabilities and answers of requests that were thrown out and computed anew."""
    spec = llm.engine.spec
    memory = (16 * 4 * 6 * 2 * spec.kv_size * 4 + 0.5) / GIB  # 16 pages
    small = LLM(
        tiny_model_dir,
        tiny_chain,
        (0, 3, 5),
        page_size=4,
        max_model_len=60,
        kv_cache_memory=memory,
        max_num_batched_tokens=9,
    )
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(length)] for length in (20, 3, 14, 30, 25, 1, 18)]
    depths = [0, 3, 5, 0, 3, 5, 0]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=4, prompt_logprobs=4)
    outputs, expected = (
        small.generate(prompts, params, depths),
        [llm.generate([p], params, d)[0] for p, d in zip(prompts, depths, strict=True)],
    )
    assert small.engine.stats().num_preemptions > 2
    for output, wanted, prompt in zip(outputs, expected, prompts, strict=True):
        assert output.token_ids == wanted.token_ids and output.text == wanted.text
        assert len(output.prompt_logprobs) == len(prompt) and len(output.logprobs) == 24
        pairs = zip(
            output.prompt_logprobs[1:] + output.logprobs,
            wanted.prompt_logprobs[1:] + wanted.logprobs,
            strict=True,
        )
        for one, other in pairs:
            assert one.token_id == other.token_id and abs(one.logprob - other.logprob) < 1e-4
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)


class TestBadRequests:
    """Each names the field; whatever was queued before it in the same call is taken back."""

    def refused(self, llm, match, prompt="bad", depth=None, params=GREEDY):
        with pytest.raises(RequestError, match=match) as caught:
            llm.generate(["fine", prompt], [GREEDY, params], [None, depth])
        assert not llm.engine.has_unfinished()
        return caught.value

    def test_empty_prompt(self, llm):
        assert self.refused(llm, "empty", prompt=[]).param == "prompt"

    @pytest.mark.parametrize("token", [-1, 264, 10**9, True, 1.0], ids=str)
    def test_not_a_token_id(self, token, llm):
        error = self.refused(llm, "0 to 263", prompt=[5, token])
        assert error.param == "prompt"

    @pytest.mark.parametrize("depth", [1, 2, 6, -1])
    def test_depth_not_served(self, depth, llm):
        self.refused(llm, rf"depth {depth} .*0, 3, 5", depth=depth)

    def test_prompt_beyond_the_context(self, llm):
        limit = llm.engine.max_model_len
        for length in (limit, limit + 1):
            error = self.refused(llm, rf"{length} tokens.*{limit}", prompt=[7] * length)
            assert error.code == "context_length_exceeded"
        assert len(llm.generate([[7] * (limit - 1)], GREEDY)[0].token_ids) == 1

    def test_scoring_may_fill_the_context_but_no_more(self, llm):
        params = SamplingParams(max_tokens=0)
        limit = llm.engine.max_model_len
        assert llm.generate([[7] * limit], params)[0].finish_reason == "length"
        assert (
            self.refused(llm, "context", prompt=[7] * (limit + 1), params=params).code
            == "context_length_exceeded"
        )

    @pytest.mark.parametrize("params", [{"stop_token_ids": [264]}, {"logit_bias": {264: 1.0}}], ids=str)
    def test_ids_beyond_the_vocabulary_in_parameters(self, params, llm):
        self.refused(llm, "264", params=SamplingParams(**params))

    @pytest.mark.parametrize(
        ("params", "depths"),
        [([GREEDY], [0, 0]), ([GREEDY] * 2, [0]), ([GREEDY] * 3, None)],
        ids=["params", "depths", "more"],
    )
    def test_lists_of_another_length(self, params, depths, llm):
        with pytest.raises(RequestError, match="2 prompts"):
            llm.generate(["one", "two"], params, depths)

    def test_a_request_id_in_use(self, llm):
        llm.engine.add_request("same", [1], GREEDY)
        with pytest.raises(RequestError, match="same"):
            llm.engine.add_request("same", [1], GREEDY)
        llm.engine.abort("same")
        llm.engine.abort("same")
        llm.engine.abort("never there")

    def test_the_engine_takes_one_choice_a_request(self, llm):
        with pytest.raises(RequestError, match="n is 2"):
            llm.engine.add_request("two", [1], SamplingParams(n=2))

    def test_a_failing_step_leaves_nothing_queued(self, llm, monkeypatch):
        def fail(step):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(llm.engine.runner, "run", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            llm.generate(["one", "two"], GREEDY)
        monkeypatch.undo()
        assert len(answer(llm, "three").token_ids) == 12


class TestText:
    def test_a_chat_is_rendered_by_the_models_template(self, llm):
        ids = llm.engine.render_chat([{"role": "user", "content": "Hé"}])
        assert ids == [257, *"user\nHé".encode(), 258, 10, 257, *b"assistant\n"]
        plain = llm.engine.render_chat([{"role": "user", "content": "Hé"}], add_generation_prompt=False)
        assert plain == ids[: -len("assistant\n") - 1]

    def test_a_final_message_can_be_continued(self, llm):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
        ids = llm.engine.render_chat(messages, continue_final_message=True)
        assert ids[-4:] == list(b"Well")

    def test_the_templates_own_words_reach_the_caller(self, llm):
        with pytest.raises(RequestError, match="unknown role pirate"):
            llm.engine.render_chat([{"role": "pirate", "content": "Arr"}])

    def test_without_a_tokenizer_only_ids_work(self, tiny_model):
        llm = LLM(tiny_model("llama").path)
        output = llm.generate([[5, 6, 7]], GREEDY)[0]
        assert len(output.token_ids) == 12 and output.text == ""
        with pytest.raises(RequestError, match="tokenizer"):
            llm.generate(["text"], GREEDY)
        with pytest.raises(RequestError, match="template"):
            llm.engine.render_chat([{"role": "user", "content": "Hi"}])
        assert not llm.engine.has_unfinished()

    def test_sampling_defaults_come_from_the_generation_config(self, tiny_model_dir, tmp_path):
        import json
        import shutil

        folder = shutil.copytree(tiny_model_dir, tmp_path / "greedy")
        (folder / "generation_config.json").write_text(
            json.dumps({"do_sample": True, "top_k": 1, "eos_token_id": 0})
        )
        llm = LLM(folder)
        assert llm.engine.eos_token_ids == {0, 258}  # 258: the template's end of a turn
        unset = SamplingParams(max_tokens=10, ignore_eos=True)
        greedy = llm.generate(["abc"], GREEDY)[0].token_ids[:10]
        assert llm.generate(["abc"], unset)[0].token_ids == greedy
        free = SamplingParams(max_tokens=10, top_k=0, temperature=3.0, ignore_eos=True)
        assert llm.generate(["abc"], free)[0].token_ids != greedy


class TestLowPrecision:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_runs_and_is_near_float32(self, dtype, tiny_model_dir, llm):
        low = LLM(tiny_model_dir, dtype=dtype, kernels="torch")
        assert low.engine.runner.executor.decoder.weights.embed.dtype == getattr(torch, dtype)
        ids = list(range(40, 80))
        assert (low.score(ids) - llm.score(ids, depth=0)).abs().mean() < 0.3
        assert low.engine.weight_bytes(0) * 2 == llm.engine.weight_bytes(0)


class TestConfigErrors:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"dtype": "float8"}, r"dtype 'float8'.*auto, float32, bfloat16, float16"),
            ({"weights": "int3"}, r"weights 'int3'.*auto"),
            ({"device": "tpu"}, r"device 'tpu'.*auto, cpu, cuda"),
            ({"device": "cuda:99"}, r"device 'cuda:99'"),
            ({"load_format": "pickle"}, r"load_format 'pickle'.*auto, safetensors, dummy"),
            ({"kernels": "magic"}, r"'magic'.*auto, triton, torch"),
            ({"max_num_seqs": 0}, r"max_num_seqs is 0.*at least 1"),
            ({"max_num_batched_tokens": -1}, r"max_num_batched_tokens is -1.*at least 1"),
            ({"page_size": 1.5}, r"page_size is 1.5.*integer"),
            ({"page_size": True}, r"page_size is True.*integer"),
            ({"max_model_len": 0}, r"max_model_len is 0.*at least 1"),
            ({"max_model_len": 513}, r"max_model_len is 513.*512"),
            ({"threads": 0}, r"threads is 0.*at least 1"),
            ({"kv_cache_memory": 0.0}, r"kv_cache_memory is 0.0.*above 0"),
            ({"kv_cache_memory": float("nan")}, r"kv_cache_memory is nan.*above 0"),
            ({"kv_cache_memory": 1e-9}, r"KV cache"),
            ({"kv_cache_memory": 1e-4, "max_model_len": 500}, r"max_model_len is 500.*holds"),
            ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization is 1.5.*at most 1"),
            ({"tiers": ()}, r"tiers is empty"),
            ({"tiers": (0, 0)}, r"tiers \[0, 0\].*twice"),
            ({"tiers": (-1,)}, r"tiers is -1.*at least 0"),
            ({"tiers": ("3",)}, r"tiers is '3'.*integer"),
            ({"tiers": 3}, r"tiers"),
            ({"tiers": (6,)}, r"tier 6.*0 to 5"),
            ({"batch_size": 4}, r"option 'batch_size'.*max_num_seqs"),
            ({"num_threads": 4}, r"option 'num_threads' is called 'threads' now"),
            ({"enable_prefix_caching": False}, r"is called 'prefix_caching' now"),
        ],
        ids=lambda value: str(value) if isinstance(value, dict) else "",
    )
    def test_a_bad_option_is_named_with_what_is_allowed(self, options, match, tiny_model_dir, tiny_chain):
        with pytest.raises(ConfigError, match=match):
            LLM(tiny_model_dir, layer_map=tiny_chain, **options)

    def test_a_small_kv_cache_limits_the_context_by_itself(self, tiny_model_dir):
        assert LLM(tiny_model_dir, kv_cache_memory=1e-4, page_size=4).engine.max_model_len < 512

    def test_a_map_of_another_model(self, tiny_model_dir):
        from sleb.errors import LayerMapError

        with pytest.raises(LayerMapError, match=r"30 blocks.*6"):
            LLM(tiny_model_dir, layer_map=LayerMap.dense("other", 30))
        with pytest.raises(LayerMapError, match="fingerprint"):
            LLM(tiny_model_dir, layer_map=LayerMap.dense("other", 6, "sha256:0"))
        with pytest.raises(LayerMapError, match=r"missing\.json"):
            LLM(tiny_model_dir, layer_map="missing.json")

    def test_a_folder_that_is_no_model(self, tmp_path):
        with pytest.raises(ModelError, match=r"config\.json"):
            LLM(tmp_path)


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"n": 0}, "n is 0.*at least 1"),
        ({"max_tokens": -2}, "max_tokens is -2.*at least -1"),
        ({"max_tokens": 1.0}, r"max_tokens is 1\.0.*integer"),
        ({"min_tokens": 20}, "min_tokens is 20.*max_tokens"),
        ({"temperature": -0.1}, r"temperature is -0\.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": -0.1}, r"top_p is -0\.1"),
        ({"top_p": 1.01}, r"top_p is 1\.01"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_k": 1.5}, r"top_k is 1\.5"),
        ({"min_p": 1.5}, r"min_p is 1\.5"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2\.1"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty is -2\.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"logprobs": 21}, "logprobs is 21.*20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": True}, "seed is True"),
        ({"stop": ""}, "stop is ''"),
        ({"stop": ["a", ""]}, "stop is ''"),
        ({"stop": [1]}, "stop is 1"),
        ({"stop": ["x"] * 65}, "stop is.*64"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids is 'a'"),
        ({"logit_bias": {1: 101}}, "logit_bias is 101"),
        ({"logit_bias": {-1: 1}}, "logit_bias is -1"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias is nan"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_bad_sampling_values(params, match):
    with pytest.raises(RequestError, match=match) as caught:
        SamplingParams(**params)
    assert caught.value.param == next(iter(params))


def test_values_that_llama_and_vllm_have_for_unset(tiny_model_dir):
    llm = LLM(tiny_model_dir, dtype="float32", device="cpu")
    prompt, room = [5, 6, 7], llm.engine.max_model_len - 3
    greedy = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=12))[0].token_ids
    for seed in (1, -1):
        params = SamplingParams(temperature=1.8, top_p=0, seed=seed, max_tokens=12)
        assert llm.generate([prompt], params)[0].token_ids == greedy
    whole = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=-1, ignore_eos=True))[0]
    assert len(whole.token_ids) == room and whole.finish_reason == "length"


@pytest.mark.parametrize("as_type", [torch.tensor, np.array, tuple], ids=["tensor", "array", "tuple"])
def test_prompts_may_be_arrays_and_tensors(as_type, llm):
    params = SamplingParams(max_tokens=4, temperature=0.0)
    ids = [5, 6, 7, 8]
    [expected] = llm.generate([ids], params)
    assert llm.generate([as_type(ids)], params)[0].token_ids == expected.token_ids
    assert llm.generate(as_type(ids), params)[0].token_ids == expected.token_ids
    assert torch.equal(llm.score(as_type(ids)), llm.score(ids))


def test_stats_tell_how_far_a_long_prompt_is(make_llm, tiny_model_dir):
    engine = make_llm(tiny_model_dir, max_num_batched_tokens=16).engine
    engine.add_request("long", list(range(3, 43)), SamplingParams(max_tokens=1))
    seen = []
    while engine.has_unfinished():
        engine.step()
        seen.append((engine.stats().num_prefilled, engine.stats().num_to_prefill))
    assert seen == [(16, 40), (32, 40), (0, 0)]

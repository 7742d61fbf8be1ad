"""One batch of several depths, lengths, chunks, preemptions and prefix hits: each row gives what it gives alone."""

from __future__ import annotations

import random

import pytest
import torch

from sleb.engine.execute.step_arrays import StepArrays
from sleb.engine.memory import GIB
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.engine.schedule.step import ScheduledRow
from sleb.layer_map.layer_map import Unit

TOLERANCE = 1e-4
CHAIN = (Unit(3), Unit(1), Unit(4, "attention"), Unit(2), Unit(4, "mlp"), Unit(0))
TIERS = (0, 3, 6)  # depth 6 leaves no block at all


def kv_memory(llm_spec, num_pages, page_size=4, num_blocks=5):
    """GiB that hold `num_pages` pages in float32."""
    return (num_pages * page_size * num_blocks * 2 * llm_spec.kv_size * 4 + 0.5) / GIB


def traffic(seed, count=14):
    """Prompts of mixed lengths, half of them on a common prefix, with their depths and sampling parameters."""
    rng = random.Random(seed)
    prefix = [rng.randrange(3, 96) for _ in range(21)]
    prompts, depths, params = [], [], []
    for index in range(count):
        own = [rng.randrange(3, 96) for _ in range(rng.choice([1, 2, 3, 9, 17, 30]))]
        prompts.append(prefix + own if index % 2 else own)
        depths.append(rng.choice(TIERS))
        wanted = rng.choice([None, None, 20])
        params.append(
            SamplingParams(
                temperature=0.0,
                max_tokens=rng.choice([1, 5, 12]),
                ignore_eos=True,
                logprobs=20,
                prompt_logprobs=wanted,
            )
        )
    return prompts, params, depths


def run_checked(llm, prompts, params, depths):
    """generate, with integrity checked after every step."""
    engine, step = llm.engine, llm.engine.step

    def checked():
        outputs = step()
        engine.check_integrity()
        return outputs

    engine.step = checked
    try:
        return llm.generate(prompts, params, depths)
    finally:
        engine.step = step


def assert_same(mixed, alone):
    assert mixed.token_ids == alone.token_ids
    assert mixed.finish_reason == alone.finish_reason
    for ours, theirs in ((mixed.logprobs, alone.logprobs), (mixed.prompt_logprobs, alone.prompt_logprobs)):
        assert (ours is None) == (theirs is None)
        for one, other in zip(ours or [], theirs or [], strict=True):
            if one is None or other is None:
                assert one is other
                continue
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
            known = dict(other.top)
            shared = [(value, known[token]) for token, value in one.top if token in known]
            assert len(shared) >= len(one.top) - 1
            assert all(abs(value - expected) < TOLERANCE for value, expected in shared)


@pytest.mark.parametrize(
    "name", ["llama-gqa", "mistral-window", "smollm3", "qwen3-window", "opt-350m", "phi3-partial"]
)
def test_rows_of_a_mixed_batch_give_what_they_give_alone(name, tiny_model, make_llm):
    model = tiny_model(name)
    prompts, params, depths = traffic(seed=len(name))
    # Alone in every way: one request at a time, in an engine that serves its depth and no other.
    alone = {depth: make_llm(model, CHAIN, (depth,), prefix_caching=False) for depth in TIERS}
    expected = [
        alone[depth].generate([prompt], each)[0]
        for prompt, each, depth in zip(prompts, params, depths, strict=True)
    ]

    memory = kv_memory(alone[0].engine.spec, num_pages=18)
    mixed = make_llm(model, CHAIN, TIERS, max_num_batched_tokens=23, kv_cache_memory=memory)
    # Twice: the second time finds the first one's pages in the prefix cache.
    for _ in range(2):
        for output, wanted in zip(run_checked(mixed, prompts, params, depths), expected, strict=True):
            assert_same(output, wanted)
    stats = mixed.engine.stats()
    assert stats.num_preemptions > 0, "the KV cache was meant to be too small"
    assert stats.num_cached_tokens > 0, "the prompts were meant to share prefixes"


@pytest.fixture
def patches(random_patch):
    """For CHAIN: one of a depth, one that the next removal replaces, one of all depths, of every form."""

    def make(width):
        return (
            random_patch(width, (3, "attention"), (3, "mlp"), 1, 3),
            random_patch(width, (1, "attention"), (1, "mlp"), 2, 5, form="low-rank"),
            random_patch(width, (1, "attention"), (4, "attention"), 6, None, normed=False),
            random_patch(width, (4, "mlp"), (4, "mlp"), 5, None, form="scale"),
        )

    return make


@pytest.mark.parametrize("name", ["llama-gqa", "opt", "opt-350m"])
def test_patched_rows_of_a_mixed_batch_give_what_they_give_alone(name, tiny_model, make_llm, patches):
    model, tiers = tiny_model(name), (0, 2, 3, 6)
    prompts, params, depths = traffic(seed=5)
    depths = [tiers[index % 4] for index in range(len(depths))]
    made = patches(make_llm(model).engine.spec.hidden_size)
    alone = {depth: make_llm(model, CHAIN, (depth,), made, prefix_caching=False) for depth in tiers}
    expected = [
        alone[depth].generate([prompt], each)[0]
        for prompt, each, depth in zip(prompts, params, depths, strict=True)
    ]
    bare = make_llm(model, CHAIN, (3,)).generate([prompts[2]], params[2])[0]
    assert bare.logprobs[0].logprob != pytest.approx(expected[2].logprobs[0].logprob, abs=TOLERANCE)
    mixed = make_llm(model, CHAIN, tiers, made, max_num_batched_tokens=23)
    for output, wanted in zip(run_checked(mixed, prompts, params, depths), expected, strict=True):
        assert_same(output, wanted)


def test_mixed_batch_against_transformers(tiny_model, make_llm, assert_logprobs):
    """The same traffic, block by block depths, and transformers as the judge."""
    model = tiny_model("llama3")
    order, tiers = (3, 1, 4, 2), (0, 2, 4)
    prompts, params, depths = traffic(seed=77)
    depths = [tiers[TIERS.index(depth)] for depth in depths]
    probe = make_llm(model, order, tiers)
    memory = kv_memory(probe.engine.spec, num_pages=18)
    llm = make_llm(model, order, tiers, max_num_batched_tokens=19, kv_cache_memory=memory)
    outputs = run_checked(llm, prompts, params, depths)
    for prompt, depth, output in zip(prompts, depths, outputs, strict=True):
        reference = model.without(order[:depth]).logprobs([*prompt, *output.token_ids])[len(prompt) - 1 : -1]
        assert output.token_ids == reference.argmax(dim=-1).tolist()
        assert_logprobs(output.logprobs, reference)
    assert llm.engine.stats().num_preemptions > 0


def test_the_same_prefix_at_another_depth_is_no_hit(tiny_model, make_llm):
    """Keys and values of a prefix depend on the blocks before: tiers must not share pages."""
    llm = make_llm(tiny_model("llama-gqa"), CHAIN, TIERS)
    prompt, params = list(range(10, 40)), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    assert llm.generate([prompt], params, 0)[0].num_cached_tokens == 0
    assert llm.generate([prompt], params, 3)[0].num_cached_tokens == 0
    assert llm.generate([prompt], params, 3)[0].num_cached_tokens == 28
    assert llm.generate([prompt], params, 0)[0].num_cached_tokens == 28


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_hit_leaves_at_least_the_last_token(length, cached, tiny_model, make_llm):
    """A repeated prompt hits whole pages of 4, but never all of it: the last token's logits are needed."""
    llm = make_llm(tiny_model("llama"))
    prompt, params = (
        list(range(20, 20 + length)),
        SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True),
    )
    first, second = (llm.generate([prompt], params)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, cached)
    assert first.token_ids == second.token_ids


def test_prompt_logprobs_take_no_hits_and_are_whole(tiny_model, make_llm):
    llm = make_llm(tiny_model("llama"))
    prompt = list(range(20, 50))
    llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1))
    output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0))[0]
    assert output.num_cached_tokens == 0
    assert [entry.token_id for entry in output.prompt_logprobs[1:]] == prompt[1:]
    assert llm.generate([prompt], SamplingParams(max_tokens=1))[0].num_cached_tokens == 28


def test_prefix_caching_can_be_switched_off(tiny_model, make_llm):
    llm = make_llm(tiny_model("llama"), prefix_caching=False)
    for _ in range(2):
        assert llm.generate([list(range(20, 50))], SamplingParams(max_tokens=1))[0].num_cached_tokens == 0


def test_an_answer_can_be_continued_from_the_cache(tiny_model, make_llm):
    """Pages of generated tokens are shared too: the next turn of a conversation begins with them."""
    model = tiny_model("llama-gqa")
    llm, params = make_llm(model), SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    prompt = list(range(30, 40))
    turn = [*prompt, *llm.generate([prompt], params)[0].token_ids]
    second = llm.generate([[*turn, 50, 51]], params)[0]
    # The last sampled token was never computed: 23 of 24 tokens are in the cache, 5 whole pages.
    assert second.num_cached_tokens == 20
    reference = model.logits([*turn, 50, 51, *second.token_ids])[len(turn) + 1 : -1]
    assert second.token_ids == reference.argmax(dim=-1).tolist()


class Rig:
    """A step of four rows at depths 0, 0, 3, 6, made by hand."""

    def __init__(self, engine, make_request):
        self.engine = engine
        self.depths, lengths = [0, 0, 3, 6], [5, 1, 6, 3]
        self.rows, page = [], 0
        for depth, length in zip(self.depths, lengths, strict=True):
            pages = [page, page + 1]
            page += 2
            request = make_request(list(range(10, 10 + length)), engine.tier(depth), pages)
            self.rows.append(ScheduledRow(request, 0, length))
        self.starts = [0, 5, 6, 12]
        self.ends = [5, 6, 12, 15]

    @torch.inference_mode()
    def run(self):
        executor = self.engine.runner.executor
        step = StepArrays.of(self.rows, executor.unit_depths, executor.page_size)
        return executor.run(step, [], greedy=False).hidden.clone()


def test_every_sublayer_gets_exactly_the_rows_that_keep_it(tiny_model, make_llm, make_request, monkeypatch):
    engine = make_llm(tiny_model("llama-gqa"), CHAIN, TIERS).engine
    rig, decoder = Rig(engine, make_request), engine.runner.executor.decoder
    seen, run = {}, decoder.run

    def spy(sublayer, residual, rotation, attend):
        seen[sublayer] = residual.shape[0]
        return run(sublayer, residual, rotation, attend)

    monkeypatch.setattr(decoder, "run", spy)
    rig.run()
    for block in range(5):
        for part in ("attention", "mlp"):
            keeping = [
                end - start
                for depth, start, end in zip(rig.depths, rig.starts, rig.ends, strict=True)
                if not any((block, part) in unit.sublayers for unit in CHAIN[:depth])
            ]
            assert seen.get((block, part), 0) == sum(keeping), f"{block}.{part}"


def test_a_row_that_runs_nothing_keeps_its_embedding(tiny_model, make_llm, make_request):
    """The residual past a unit's prefix is not touched: at depth 6 of this chain it is bitwise the embedding."""
    engine = make_llm(tiny_model("llama-gqa"), CHAIN, TIERS).engine
    rig = Rig(engine, make_request)
    residual = rig.run()
    embedding = engine.runner.executor.decoder.weights.embed[rig.rows[3].request.tokens]
    assert torch.equal(residual[12:], embedding)
    assert not torch.allclose(
        residual[6:12], engine.runner.executor.decoder.weights.embed[rig.rows[2].request.tokens], atol=0.1
    )


@pytest.mark.parametrize("poisoned", range(4), ids=["depth-0", "depth-0-one-token", "depth-3", "depth-6"])
def test_nan_in_one_row_stays_in_that_row(poisoned, tiny_model, make_llm, make_request, monkeypatch):
    engine = make_llm(tiny_model("llama-gqa"), CHAIN, TIERS).engine
    rig, decoder = Rig(engine, make_request), engine.runner.executor.decoder
    clean, embed = rig.run(), decoder.embed

    def poison(token_ids, positions):
        residual = embed(token_ids, positions)
        residual[rig.starts[poisoned] : rig.ends[poisoned]] = float("nan")
        return residual

    monkeypatch.setattr(decoder, "embed", poison)
    dirty = rig.run()
    for row, (start, end) in enumerate(zip(rig.starts, rig.ends, strict=True)):
        if row == poisoned:
            assert dirty[start:end].isnan().all()
        else:
            assert torch.equal(dirty[start:end], clean[start:end])


def test_what_others_left_in_the_cache_is_never_read(tiny_model, make_llm, make_request):
    """Every slot but a row's own holds NaN, and so do the own ones at the blocks that its depth lacks."""
    engine = make_llm(tiny_model("llama-gqa"), CHAIN, TIERS).engine
    rig, cache = Rig(engine, make_request), engine.runner.executor.kv_cache
    clean = rig.run()
    cache._keys.fill_(float("nan"))
    cache._values.fill_(float("nan"))
    assert torch.equal(rig.run(), clean)


def test_a_tier_served_alone_allocates_only_what_it_keeps(tiny_model, make_llm):
    """Weights and KV of a removed sublayer that no tier runs are not there at all."""
    model = tiny_model("llama-gqa")
    alone = make_llm(model, CHAIN, (3,)).engine
    both = make_llm(model, CHAIN, (0, 3)).engine
    assert sorted(alone.runner.executor.decoder.weights.attention) == [0, 2]
    assert sorted(alone.runner.executor.decoder.weights.mlp) == [0, 2, 4]
    assert sorted(both.runner.executor.decoder.weights.attention) == [0, 1, 2, 3, 4]
    assert len(alone.runner.executor.kv_cache._layers) == 2
    spec = both.spec
    assert both.kv_bytes_per_token(0) == 2 * 5 * spec.num_kv_heads * spec.head_dim * 4
    assert (
        both.kv_bytes_per_token(3)
        == alone.kv_bytes_per_token(3)
        == 2 * 2 * spec.num_kv_heads * spec.head_dim * 4
    )
    dense = sum(parameter.numel() * 4 for parameter in model.model.parameters())
    layers = model.model.model.layers
    gone = [*layers[3].parameters(), *layers[1].parameters()]
    gone += [*layers[4].self_attn.parameters(), *layers[4].input_layernorm.parameters()]
    assert both.weight_bytes(0) == dense
    assert both.weight_bytes(3) == alone.weight_bytes(3) == dense - sum(each.numel() * 4 for each in gone)


def test_aborts_in_the_middle_leave_the_others_alone(tiny_model, make_llm):
    model = tiny_model("llama-gqa")
    llm = make_llm(model, CHAIN, TIERS, max_num_batched_tokens=11)
    engine, rng = llm.engine, random.Random(3)
    prompts, params, depths = traffic(seed=9)
    expected = [
        llm.generate([prompt], each, depth)[0].token_ids
        for prompt, each, depth in zip(prompts, params, depths, strict=True)
    ]
    answers = {}
    for index, (prompt, each, depth) in enumerate(zip(prompts, params, depths, strict=True)):
        engine.add_request(str(index), prompt, each, depth)
        answers[str(index)] = []
    aborted = set()
    while engine.has_unfinished():
        for output in engine.step():
            assert output.request_id not in aborted
            answers[output.request_id] += output.new_token_ids
        if rng.random() < 0.2:
            victim = str(rng.randrange(len(prompts)))
            engine.abort(victim)
            aborted.add(victim)
        engine.check_integrity()
    assert aborted and len(aborted) < len(prompts)
    for index, tokens in enumerate(expected):
        if str(index) not in aborted:
            assert answers[str(index)] == tokens
    assert engine.stats().kv_cache_usage == 0.0

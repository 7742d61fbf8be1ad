"""The C kernels behind the engine against transformers, and against the engine's own torch operators."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import replace

import pytest
import torch

from sleb import SamplingParams
from sleb.engine.execute.cpu import CpuExecutor
from sleb.engine.execute.eager import EagerExecutor
from sleb.engine.execute.executor import PlannedUnit
from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.execute.step_arrays import NEVER, StepArrays
from sleb.engine.model.allocation import all_sublayers, allocate
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.decoder import Decoder
from sleb.engine.requests.tier import Tier
from sleb.engine.schedule.step import ScheduledRow
from sleb.errors import ConfigError
from sleb.kernels.cpu import library
from sleb.kernels.cpu.features import cpu_features
from sleb.kernels.registry import select_kernels
from sleb.layer_map.layer_map import Unit

TOLERANCE = 1e-4
PROMPT = torch.randint(3, 96, (75,), generator=torch.Generator().manual_seed(5)).tolist()
UNSUPPORTED = ("opt-350m",)  # norms after the addition, projected embeddings
LEVELS = {
    "none": (),
    "avx512": ("avx512",),
    "avx512bf16": ("avx512", "avx512bf16", library.EMULATED),
    "amx": ("avx512", "avx512bf16", "amx", library.EMULATED),
}[cpu_features().level]

pytestmark = [
    pytest.mark.skipif(not LEVELS, reason="the C kernels need AVX-512 with VNNI"),
    pytest.mark.usefixtures("one_processor"),
]


@pytest.fixture(params=[LEVELS[0], LEVELS[-1]] if LEVELS else [])
def level(request, monkeypatch):
    """The lowest and the highest instruction set that can be run here."""
    monkeypatch.setattr(library, "isa_level", lambda: request.param)
    return request.param


@pytest.fixture
def make(make_llm):
    def build(model, removed=(), tiers=None, **options):
        defaults = {"kernels": "cpu", "page_size": 16, "threads": 3}
        llm = make_llm(model, removed, tiers, **(defaults | options))
        assert isinstance(llm.engine.runner.executor, CpuExecutor)
        return llm

    return build


def close(actual, expected, atol=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("removed", [(), (1, 2, 3)], ids=str)
def test_logits_equal_transformers(architecture, removed, level, tiny_model, make, make_request, forward):
    """Prefill at once, in uneven chunks across page borders, and token by token: the same logits each time."""
    if architecture in UNSUPPORTED:
        pytest.skip("not an architecture of the C kernels")
    model = tiny_model(architecture)
    prompt = PROMPT[: min(len(PROMPT), 60)]
    engine = make(model, removed, max_model_len=64).engine
    expected = model.without(removed).logits(prompt)
    tier = engine.default_tier

    whole = make_request(prompt, tier, [3, 2, 1, 0])
    close(forward(engine, [(whole, 0, len(prompt))]), expected)

    cut = make_request(prompt, tier, [7, 4, 6, 5])
    borders = [0, 1, 8, 15, 16, 25, 47, 49, *range(50, len(prompt) + 1)]
    pieces = [forward(engine, [(cut, start, end)]).clone() for start, end in itertools.pairwise(borders)]
    close(torch.cat(pieces), expected)


@pytest.mark.parametrize("units", [(Unit(1, "attention"),), (Unit(0, "mlp"), Unit(3, "attention"))], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-window", "phi3-partial", "opt"])
def test_removed_sublayers_add_nothing(name, units, tiny_model, make, make_request, forward):
    model = tiny_model(name)
    prompt = PROMPT[:37]
    engine = make(model, units).engine
    request = make_request(prompt, engine.default_tier, [2, 0, 1])
    close(forward(engine, [(request, 0, len(prompt))]), model.without_sublayers(units).logits(prompt))


def with_patches(model, removed, patches):
    """transformers without the blocks `removed`, and with a hook behind the last block of each patch's run."""
    bare = model.without_sublayers([Unit(block) for block in removed])
    layers = next(each.layers for each in bare.model.modules() if hasattr(each, "layers"))
    is_opt, eps = model.model.config.model_type == "opt", getattr(model.model.config, "rms_norm_eps", 1e-5)

    def apply(patch, hidden):
        tensors = {name: torch.from_numpy(tensor).float() for name, tensor in patch.tensors.items()}
        if patch.form == "scale":
            return hidden * tensors["scale"] + tensors["bias"]
        centred = hidden - hidden.mean(-1, keepdim=True) if is_opt else hidden
        rms = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        weight = tensors["weight"] if patch.form == "full" else tensors["up"] @ tensors["down"]
        return hidden + (centred / rms if patch.normed else hidden) @ weight.T + tensors["bias"]

    for each in patches:
        layers[each.last[0]].register_forward_hook(
            lambda module, inputs, output, patch=each: apply(patch, output)
        )
    return bare


@pytest.mark.parametrize(("name", "width"), [("llama-gqa", 32), ("llama-gqa", 44), ("opt", 32)])
def test_patched_rows_of_a_mixed_step(
    name, width, level, tiny_model, make, make_request, forward, random_patch, tmp_path
):
    """Chunks, then the rest and single tokens: each row as alone, and as transformers with the same patches."""
    model, chain, depths, lengths = tiny_model(name), (4, 1, 3, 2), (0, 0, 2, 3, 3, 4), (9, 2, 20, 6, 5, 38)
    if width != 32:
        config = copy.deepcopy(model.model.config)
        config.hidden_size, config.head_dim, config.initializer_range = width, 8, 0.2
        torch.manual_seed(0)
        odd = type(model.model)(config).float().eval()
        odd.save_pretrained(tmp_path)
        model = type(model)("odd", tmp_path, odd)
    patches = [
        random_patch(width, (4, "attention"), (4, "mlp"), 1, 2),
        random_patch(width, (1, "attention"), (1, "mlp"), 2, 3, form="low-rank"),
        random_patch(width, (3, "attention"), (4, "mlp"), 3, None, normed=False),
        random_patch(width, (1, "attention"), (2, "mlp"), 4, 4, form="scale"),
    ]
    engine = make(model, chain, (0, 2, 3, 4), patches=patches).engine
    prompts = [PROMPT[row : row + length] for row, length in enumerate(lengths)]
    expected = [
        with_patches(model, chain[:depth], [each for each in patches if each.serves(depth)]).logits(prompt)
        for depth, prompt in zip(depths, prompts, strict=True)
    ]

    def run(rows):
        requests = [
            make_request(prompts[row], engine.tier(depths[row]), [3 * row, 3 * row + 1, 3 * row + 2])
            for row in rows
        ]
        cuts = [(0, 1 if row % 2 else lengths[row] - 1, lengths[row]) for row in rows]
        parts = []
        for step in (0, 1):
            logits = forward(
                engine, [(each, *cut[step : step + 2]) for each, cut in zip(requests, cuts, strict=True)]
            )
            parts.append(logits.split([cut[step + 1] - cut[step] for cut in cuts]))
        return [torch.cat(pair) for pair in zip(*parts, strict=True)]

    mixed = run(range(len(depths)))
    for row, logits in enumerate(mixed):
        close(logits, run([row])[0])
        close(logits, expected[row])


AFTER = {"attention_post_norm": "after_attention", "mlp_post_norm": "after_mlp"}
FEATURES = {
    "norms-after": ({"qk_norm": "whole"}, {"attention_norm": None, "mlp_norm": None, **AFTER}),
    "norms-around-and-soft-caps": (
        {"qk_norm": "head", "embed_scale": 2.5, "attention_scale": 0.4, "attention_softcap": 3.0,
         "logit_softcap": 5.0, "activation": "gelu_pytorch_tanh", "windows": (6, 6, None, 6, None)},
        AFTER,
    ),
    "scales": ({"embed_scale": 0.7, "residual_scale": 0.3, "attention_scale": 0.1}, {}),
    "parallel": (
        {"parallel": True, "norm": "layer", "norm_bias": True, "gated": False, "activation": "relu2",
         "qkv_bias": True, "out_bias": True, "mlp_bias": True, "head_bias": True},
        {"up": ("mlp.up_proj",)},
    ),
    "parallel-with-one-norm": (
        {"parallel": True, "norm": "layer", "norm_bias": False, "qk_norm": "head"}, {"mlp_norm": None}
    ),
    "norms-of-heads-after-rotation": ({"qk_norm": "head", "qk_norm_after_rotation": True, "sinks": True}, {}),
    "clipped": ({"clip_qkv": 0.9, "norm": "layer", "norm_affine": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_of_a_decoder_against_the_torch_operators(name, level, tiny_model, make_request):
    """Rows of two depths in mixed steps, of many rows and of few: as alone, and as the eager executor's."""
    spec = resolve_spec(tiny_model("llama-gqa").path)
    changes, names = FEATURES[name]
    slow = replace(spec.rotaries[0], frequencies=tuple(f / 4 for f in spec.rotaries[0].frequencies[:5]))
    spec = replace(
        spec, rotaries=(*spec.rotaries, slow), block_rotary=(0, 1, None, 1, 0),
        **{**changes, "names": replace(spec.names, **names)},
    )  # fmt: skip
    cpu = torch.device("cpu")
    weights, targets = allocate(spec, all_sublayers(spec), torch.float32, cpu)
    generator = torch.Generator().manual_seed(7)
    for target in targets.values():
        is_norm = target.weight.dim() == 1 and len(target.weight) % 16 == 0
        target.weight.normal_(float(is_norm), 0.4, generator=generator)
    plan = tuple(
        PlannedUnit((block, part), (0, 2 if block in (1, 3) else NEVER))
        for block in range(5)
        for part in ("attention", "mlp")
    )
    blocks, pages = list(range(5)), 24
    decoder = Decoder(spec, copy.deepcopy(weights), select_kernels("torch", cpu, None, None), 64, cpu)
    eager = EagerExecutor(decoder, PagedKVCache(spec, blocks, pages, 16, torch.float32, cpu), plan, 16)
    kernels = library.CpuKernels.load(num_threads=3, level=level)
    executor = CpuExecutor(
        kernels, spec, weights, plan, max_model_len=64, num_pages=pages, page_size=16, max_num_tokens=128,
        max_num_seqs=8,
    )  # fmt: skip
    tiers = [Tier("model", depth, f"digest-{depth}", 1, ()) for depth in (0, 2)]
    lengths, depths = (9, 1, 33, 5, 41), (0, 0, 0, 1, 1)

    def logits(which, rows):
        requests = [
            make_request(
                PROMPT[row : row + lengths[row] + 2], tiers[depths[row]], range(4 * row, 4 * row + 4)
            )
            for row in rows
        ]
        parts = []
        for new in (0, 1, 2):  # the prompts, then two steps of single tokens
            scheduled = [
                ScheduledRow(request, lengths[row] + new - 1, 1)
                if new
                else ScheduledRow(request, 0, lengths[row])
                for row, request in zip(rows, requests, strict=True)
            ]
            step = StepArrays.of(scheduled, which.unit_depths, 16)
            with torch.inference_mode():
                out = which.logits(which.run(step, [], greedy=False).hidden).clone()
            parts.append(out.split([each.num_tokens for each in scheduled]))
        return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    mixed, expected = (logits(which, range(5)) for which in (executor, eager))
    for row in range(5):
        close(mixed[row], expected[row])
        close(mixed[row], logits(executor, [row])[0])


def workload(seed, vocab=96, count=14):
    """Prompts of mixed lengths, some of which begin alike, with depths."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, vocab) for _ in range(40)]
    prompts = []
    for number in range(count):
        start = shared[: rng.choice([0, 16, 17, 33])] if number % 3 else []
        prompts.append([*start, *(rng.randrange(3, vocab) for _ in range(rng.choice([1, 2, 5, 15, 17])))])
    return prompts, [rng.choice([0, 2, 4]) for _ in prompts]


@pytest.mark.parametrize(("name", "budget"), [("llama-gqa", 2048), ("llama-gqa", 19), ("qwen2-moe", 19)])
def test_mixed_depths_give_the_tokens_of_the_torch_operators(name, budget, level, tiny_model, make_llm, make):
    """A cache so small that requests are preempted, prefix hits, chunks, and three depths in one batch."""
    model = tiny_model(name)
    options = {"page_size": 16, "max_num_batched_tokens": budget}
    prompts, depths = workload(budget)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    plain = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    reference = make_llm(model, (4, 1, 3, 2), (0, 2, 4), **options)
    expected = reference.generate(prompts, params, depths)
    memory = 9.5 * 16 * reference.engine.kv_bytes_per_token(0) / 2**30  # nine pages
    llm = make(model, (4, 1, 3, 2), (0, 2, 4), **options, kv_cache_memory=memory)
    outputs = llm.generate(prompts, params, depths)
    again = llm.generate(prompts, plain, depths)
    for want, output, greedy in zip(expected, outputs, again, strict=True):
        assert output.token_ids == want.token_ids == greedy.token_ids
        got = [entry.logprob for entry in (*output.prompt_logprobs[1:], *output.logprobs)]
        close(
            torch.tensor(got),
            torch.tensor([e.logprob for e in (*want.prompt_logprobs[1:], *want.logprobs)]),
            5e-4,
        )
    assert llm.engine.stats().num_preemptions > 0
    llm.engine.check_integrity()


def test_arrivals_aborts_and_preemptions_leave_every_stream_as_it_is(level, tiny_model, make_llm, make):
    """Requests come and go between steps in a cache of nine pages; each gets the torch operators' tokens, as far as
    it gets."""
    model, chain, tiers = tiny_model("llama-gqa"), (4, 1, 3, 2), (0, 2, 4)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts, depths = workload(seed=21, count=60)
    reference = make_llm(model, chain, tiers, page_size=16)
    expected = [output.token_ids for output in reference.generate(prompts, params, depths)]
    memory = 9.5 * 16 * reference.engine.kv_bytes_per_token(0) / 2**30
    engine = make(model, chain, tiers, max_num_batched_tokens=37, kv_cache_memory=memory).engine
    rng, waiting, streams, aborted = random.Random(4), list(range(len(prompts))), {}, set()
    while waiting or engine.has_unfinished():
        for number in [waiting.pop(0) for _ in range(min(len(waiting), rng.choice([0, 0, 1, 4])))]:
            engine.add_request(str(number), prompts[number], params, depths[number])
            streams[number] = []
        for output in engine.step():
            assert int(output.request_id) not in aborted
            streams[int(output.request_id)] += output.new_token_ids
        if streams and rng.random() < 0.1:
            victim = rng.choice(list(streams))
            if len(streams[victim]) < 12:
                engine.abort(str(victim))
                aborted.add(victim)
        engine.check_integrity()
    for number, tokens in streams.items():
        assert tokens == expected[number][: len(tokens)]
        assert number in aborted or len(tokens) == 12
    assert 0 < len(aborted) < len(prompts) and engine.stats().num_preemptions > 0
    assert engine.stats().kv_cache_usage == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_in_one_request_stays_in_that_request(
    dtype, level, tiny_model, make, make_request, forward, tmp_path
):
    """Token 5 is NaN in this model: who has it gets NaN, who stands beside it in every step gets the same bits."""
    model = copy.copy(tiny_model("llama-gqa"))
    poisoned = copy.deepcopy(model.model)
    with torch.no_grad():
        poisoned.model.embed_tokens.weight[5] = torch.nan
    poisoned.save_pretrained(tmp_path)
    engine = make(type(model)("poisoned", tmp_path, model.model), (4, 1), (0, 2), dtype=dtype).engine
    outputs, text, depths = [], [token for token in PROMPT if token != 5], [0, 0, 2, 2]
    for token in (6, 5):
        prompts = [text[:21], [7, token, 8, *text[:30]], text[5:13], text[3:40]]
        rows = [
            make_request(prompt, engine.tier(depth), list(range(4 * row, 4 * row + 4)))
            for row, (prompt, depth) in enumerate(zip(prompts, depths, strict=True))
        ]
        for starts, ends in [([0] * 4, [20, 30, 7, 36]), ([20, 30, 7, 36], [21, 33, 8, 37])]:
            logits = forward(engine, list(zip(rows, starts, ends, strict=True)))
            lengths = [end - start for start, end in zip(starts, ends, strict=True)]
            outputs.append([(part, row) for row, part in enumerate(logits.split(lengths))])
    for clean, dirty in zip(outputs[:2], outputs[2:], strict=True):
        assert all(
            torch.equal(one, other) for (one, row), (other, _) in zip(clean, dirty, strict=True) if row != 1
        )
    assert outputs[2][1][0][1:].isnan().all() and outputs[3][1][0].isnan().all()


def test_repeated_runs_are_equal_to_the_bit(tiny_model, make):
    """With as many threads the same sums are made in the same order, whichever thread makes them: a race would show."""
    llm = make(tiny_model("llama-gqa"), (4, 1), (0, 2), threads=4, max_num_batched_tokens=64)
    prompts, _ = workload(3)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3, prompt_logprobs=3)
    depths = [number % 2 * 2 for number in range(len(prompts))]
    first = llm.generate(prompts, params, depths)
    for _ in range(10):
        for want, output in zip(first, llm.generate(prompts, params, depths), strict=True):
            assert output.logprobs == want.logprobs and output.prompt_logprobs == want.prompt_logprobs


def test_more_rows_than_are_sampled_at_once(tiny_model, make, make_request, forward):
    """The head takes prompts in pieces."""
    model = tiny_model("llama")
    engine = make(model, max_num_seqs=2).engine
    prompt = PROMPT[: engine.max_model_len]
    request = make_request(prompt, engine.default_tier, list(range(-(-len(prompt) // 16))))
    close(forward(engine, [(request, 0, len(prompt))]), model.logits(prompt))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-gqa", "bfloat16"), ("llama-gqa", "float16"), ("gpt-oss", "bfloat16")],
)
def test_half_precision_is_no_further_from_float32_than_torch(name, dtype, level, tiny_model, make_llm, make):
    model = tiny_model(name)
    exact = make(model).score(PROMPT[:60])
    error = (make(model, dtype=dtype, max_num_batched_tokens=40).score(PROMPT[:60]) - exact).abs().mean()
    torch_error = (make_llm(model, dtype=dtype, page_size=16).score(PROMPT[:60]) - exact).abs().mean()
    assert error < torch_error


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-moe"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_are_close_to_what_they_stand_for(weights, name, level, tiny_model, make_llm, make):
    """The torch operators compute with the same weights; the kernels round activations to eight bits besides, which
    now and then makes a token get another expert."""
    model = tiny_model(name)
    expected = make_llm(model, weights=weights, page_size=16).score(PROMPT[:60])
    error = (make(model, weights=weights, max_num_batched_tokens=40).score(PROMPT[:60]) - expected).abs()
    assert (error.mean() if name == "llama-gqa" else error.median()) < 0.1


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_patches_of_a_quantised_model_take_a_byte_a_weight(
    weights, level, tiny_model, make_llm, make, random_patch
):
    model, options = tiny_model("llama-gqa"), {"weights": weights, "page_size": 16}
    patches = [
        random_patch(32, (4, "attention"), (4, "mlp"), 1),
        random_patch(32, (1, "attention"), (1, "mlp"), 2, form="low-rank"),
    ]
    expected, bare = (make_llm(model, (4, 1), (2,), each, **options) for each in (patches, ()))
    llm = make(model, (4, 1), (2,), patches=patches, max_num_batched_tokens=40, **options)
    scale_and_bias = 4 * (32 + 32)
    sizes = [32 * 32 + scale_and_bias, 2 * 5 * 32 + 4 * 5 + scale_and_bias]
    assert llm.engine.weight_bytes(2) - bare.engine.weight_bytes(2) == sum(sizes)
    scores, wanted, others = (each.score(PROMPT[:60]) for each in (llm, expected, bare))
    assert (scores - wanted).abs().mean() < 0.1 < 0.5 < (scores - others).abs().mean()


class TestChoice:
    def test_auto_falls_back_where_the_kernels_lack_something(self, tiny_model, make_llm):
        llm = make_llm(tiny_model("opt-350m"), kernels="auto", page_size=16)
        assert isinstance(llm.engine.runner.executor, EagerExecutor)
        assert "no C kernels: they lack norms after the residual add" in llm.engine.description

    def test_an_explicit_choice_that_cannot_be_met_is_an_error(self, tiny_model, make_llm):
        with pytest.raises(ConfigError, match="do not run norms after the residual add; use kernels auto"):
            make_llm(tiny_model("opt-350m"), kernels="cpu", page_size=16)
        with pytest.raises(ConfigError, match="do not run a page size of 4"):
            make_llm(tiny_model("llama"), kernels="cpu", page_size=4)

    def test_no_level_is_said(self, tiny_model, make_llm, monkeypatch):
        monkeypatch.setenv("SLEB_CPU_ISA", "none")
        llm = make_llm(tiny_model("llama"), kernels="auto", page_size=16)
        assert "no C kernels: SLEB_CPU_ISA is none" in llm.engine.description
        with pytest.raises(ConfigError, match="kernels 'cpu' cannot be used: SLEB_CPU_ISA is none"):
            make_llm(tiny_model("llama"), kernels="cpu", page_size=16)

    def test_threads_and_affinity(self, tiny_model, make):
        assert make(tiny_model("llama"), threads=5).engine.runner.executor.num_threads == 5
        with pytest.raises(ConfigError, match="cpu_affinity names processor 100000"):
            make(tiny_model("llama"), cpu_affinity=[100000])


class TestInt8Cache:
    """Keys and values in bytes, against transformers whose attention rounds its own."""

    @pytest.fixture
    def rounded(self, tiny_model):
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        def in_bytes(heads):
            step = heads.abs().amax(dim=-1, keepdim=True) / 127
            return (heads / step).round() * step

        def attend(module, query, key, value, *rest, **options):
            return sdpa_attention_forward(module, query, in_bytes(key), in_bytes(value), *rest, **options)

        AttentionInterface.register("rounded", attend)
        model = tiny_model("llama-gqa")
        config = copy.deepcopy(model.model.config)
        other = type(model.model)(config).float().eval()
        other.load_state_dict(model.model.state_dict())
        other.config._attn_implementation = "rounded"
        return model, type(model)(model.name, model.path, other)

    def test_logits_equal_those_of_rounded_attention(self, rounded, level, make, make_request, forward):
        model, expected = rounded
        engine = make(model, (), max_model_len=64, kv_dtype="int8").engine
        whole = make_request(PROMPT[:60], engine.default_tier, [3, 2, 1, 0])
        logits = forward(engine, [(whole, 0, 60)])
        # A number that lies between two steps may go the other way, which later rows see; most meet none.
        off = (logits - expected.logits(PROMPT[:60])).abs().amax(dim=1)
        assert off.median() < TOLERANCE
        assert off.max() < 50 * TOLERANCE
        assert (logits - model.logits(PROMPT[:60])).abs().amax(dim=1).median() > 50 * TOLERANCE
        assert "KV cache in int8" in engine.runner.description

    def test_streams_hold_with_prefix_hits_and_preemptions(self, level, tiny_model, make):
        """Each request's tokens are those that it gets alone, in a cache that is too small for all."""
        model, (prompts, _) = tiny_model("llama-gqa"), workload(19)
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        llm = make(model, kv_dtype="int8", max_num_batched_tokens=19)
        alone = [llm.generate([prompt], params)[0].token_ids for prompt in prompts[:8]]
        memory = 9.5 * 16 * llm.engine.kv_bytes_per_token(0) / 2**30
        small = make(model, kv_dtype="int8", max_num_batched_tokens=19, kv_cache_memory=memory)
        assert [each.token_ids for each in small.generate(prompts[:8], params)] == alone
        small.engine.check_integrity()

    def test_bytes_of_a_token(self, tiny_model, make):
        engine = make(tiny_model("llama-gqa"), kv_dtype="int8").engine
        spec = engine.runner.spec
        assert engine.kv_bytes_per_token(0) == 2 * spec.num_blocks * spec.num_kv_heads * (spec.head_dim + 4)

    def test_it_is_refused_where_the_kernels_are_not_there(self, tiny_model, make_llm):
        with pytest.raises(
            ConfigError, match="kv_dtype 'int8' goes with the C kernels, and here kernels torch"
        ):
            make_llm(tiny_model("llama-gqa"), kernels="torch", kv_dtype="int8")
        with pytest.raises(ConfigError, match=r"kernels torch compute \(they lack norms after"):
            make_llm(tiny_model("opt-350m"), kernels="auto", kv_dtype="int8", page_size=16)

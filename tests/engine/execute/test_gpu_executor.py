"""The executor for a GPU: against transformers, against the eager one, replayed, overlapped, interpreted.

Most tests run the operators' torch specification, which is fast, and "capture" by keeping the function: what a graph
replays on a GPU is then called again on the same static tensors. The Triton kernels themselves run interpreted on
small steps at the end.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sleb import SamplingParams
from sleb.engine.execute.cuda_graphs import decode_buckets
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.execute.step_arrays import StepArrays
from sleb.engine.memory import GIB
from sleb.engine.schedule.step import ScheduledRow
from sleb.errors import ConfigError
from sleb.kernels import registry
from sleb.kernels.reference import device as device_reference
from sleb.layer_map.layer_map import Unit

pytest.importorskip("triton")  # the interpreter, or a GPU: the registry asks for one

TOLERANCE = 1e-4
PROMPT = torch.randint(3, 96, (41,), generator=torch.Generator().manual_seed(5)).tolist()
CHAIN = (Unit(3), Unit(1), Unit(2, "attention"), Unit(2, "mlp"), Unit(0))
TIERS = (0, 2, 3, 5)  # depth 5 leaves no block at all
PROMPT_BUCKETS = (8, 19)  # tokens of captured steps with prompts: larger ones are eager


class Recorder:
    """A capture that calls the function again, and counts."""

    def __init__(self):
        self.num_replays = 0

    def __call__(self, function):
        function()

        def replay():
            self.num_replays += 1
            function()

        return replay


def linear_of_rows(x, weight, bias, rows=None, *, norm=None):
    """The specification, with NaN in the rows that it does not promise."""
    out = device_reference.linear(x, weight, bias, norm=norm)
    if rows is not None:
        start, end = map(int, rows)
        out[:start] = out[end:] = float("nan")
    return out


def watch(llm):
    """Before a step: pages that nobody needs, and everything past the step's tokens, are NaN. After it: the table that
    is kept has every row's pages. On the way: the bounds that attention is told hold."""
    pages, executor = llm.engine.scheduler.block_manager, llm.engine.runner.executor
    cache, decoder, run = executor._decoder.kv_cache, executor._decoder.decoder, executor.run
    embed, num_tokens, attention = decoder.embed, 0, executor._decoder._attention

    def poisoned(*arguments):
        residual = embed(*arguments).clone()
        residual[num_tokens:] = float("nan")
        return residual

    def attend(query, keys, values, batch, *arguments):
        lens = batch.to_host()
        assert max(lens.query_lens, default=0) <= batch.max_query_len
        assert max(lens.context_lens, default=0) <= batch.max_context_len
        return attention(query, keys, values, batch, *arguments)

    def watched(step, *arguments, **options):
        nonlocal num_tokens
        num_tokens, before = step.num_tokens, llm.replays.num_replays
        if llm.engine.has_unfinished():  # else the step is made by hand
            unused = [page for page in pages._free if page not in pages._key_of]
            for layer in cache._layers.values():
                for part in layer:
                    nan = float("nan") if part.is_floating_point() else 0x7F  # of e4m3
                    part.unflatten(0, (-1, executor.page_size))[unused] = nan
        forward = run(step, *arguments, **options)
        replayed = llm.replays.num_replays - before
        llm.seen[step.num_tokens > step.num_sequences, replayed] += 1
        for row, ids in zip(step.table_rows, step.page_ids, strict=True):
            assert executor._page_table[row, : len(ids)].tolist() == ids.tolist()
        return forward

    decoder.embed, executor.run, llm.seen = poisoned, watched, Counter()
    executor._decoder._attention = attend


@pytest.fixture
def make(make_llm, monkeypatch):
    """make(model, …, graphs=True): an LLM over the operators' specification; `llm.replays` counts replays, `llm.seen`
    steps by whether they had prompts and whether they were replayed."""

    def build(model, removed=(), tiers=None, graphs=True, name="torch", **options):
        with monkeypatch.context() as patch:
            specification = replace(registry.torch_gpu_kernels(), linear=linear_of_rows, name=name)
            patch.setattr(registry, "triton_gpu_kernels", lambda: specification)
            llm = make_llm(model, removed, tiers, kernels="triton", **options)
        executor = llm.engine.runner.executor
        assert isinstance(executor, GpuExecutor) and llm.engine.overlap == options.get("overlap", True)
        llm.replays = Recorder()
        if graphs:
            executor.capture(decode_buckets(executor.max_num_seqs), llm.replays, prompts=PROMPT_BUCKETS)
        watch(llm)
        return llm

    return build


def close(actual, expected, atol=TOLERANCE):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("removed", [(), (1, 2, 3)], ids=str)
def test_logits_equal_transformers(architecture, removed, tiny_model, make, make_request, forward):
    """Prefill at once, in uneven chunks across page borders, and token by token: the same logits each time."""
    model = tiny_model(architecture)
    engine = make(model, removed, max_model_len=44).engine
    expected = model.without(removed).logits(PROMPT)
    tier = engine.default_tier
    pages = list(range(22))
    random.Random(1).shuffle(pages)
    whole = make_request(PROMPT, tier, pages[:11])
    close(forward(engine, [(whole, 0, len(PROMPT))]), expected)
    cut = make_request(PROMPT, tier, pages[11:])
    borders = [0, 1, 7, 8, 12, 25, *range(26, len(PROMPT) + 1)]
    pieces = [forward(engine, [(cut, start, end)]).clone() for start, end in itertools.pairwise(borders)]
    close(torch.cat(pieces), expected)


def traffic(seed, count=16):
    """Prompts, some of which begin alike, with depths and greedy, sampled, penalised and reported requests."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 96) for _ in range(14)]
    prompts, depths, params = [], [], []
    for number in range(count):
        start = shared[: rng.choice([0, 4, 9])] if number % 3 else []
        prompts.append([*start, *(rng.randrange(3, 96) for _ in range(rng.choice([1, 2, 5, 15, 17])))])
        depths.append(rng.choice(TIERS))
        kind = rng.randrange(5)
        options = {"temperature": 0.0}
        if kind == 1:
            options = {"temperature": 1.0, "top_p": 0.9, "top_k": rng.choice([0, 5]), "seed": number}
        if kind == 2:
            options = {
                "temperature": 0.7,
                "repetition_penalty": 1.2,
                "frequency_penalty": 0.3,
                "seed": number,
            }
        if kind == 3:
            options |= {"logprobs": 3, "prompt_logprobs": rng.choice([None, 2])}
        if kind == 4:
            options |= {"logit_bias": {7: 4.0}, "min_tokens": 3, "stop_token_ids": [7]}
        params.append(SamplingParams(max_tokens=rng.choice([3, 5, 9, 14]), ignore_eos=True, **options))
    return prompts, params, depths


def values(output):
    entries = [entry for entry in output.prompt_logprobs or [] if entry] + (output.logprobs or [])
    return torch.tensor([entry.logprob for entry in entries])


@pytest.fixture(scope="module", params=[2048, 19])
def traffic_answered(request, tiny_model, make_llm):
    """A token budget, its traffic, the eager executor's answers, and KV memory that is too little for all of it."""
    prompts, params, depths = traffic(request.param)
    options = {"max_num_batched_tokens": request.param, "seed": 3}
    reference = make_llm(tiny_model("llama-gqa"), CHAIN, TIERS, **options)
    options["kv_cache_memory"] = (16 * 4 * reference.engine.kv_bytes_per_token(0) + 0.5) / GIB
    return options, (prompts, params, depths), reference.generate(prompts, params, depths)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
def test_mixed_traffic_equals_the_eager_executor(traffic_answered, graphs, overlap, tiny_model, make):
    """Four depths, preemptions, prefix hits, chunks; tokens chosen in every way: the same answers, value for value."""
    options, asked, expected = traffic_answered
    llm = make(tiny_model("llama-gqa"), CHAIN, TIERS, graphs, overlap=overlap, **options)
    outputs = llm.generate(*asked)
    for want, output in zip(expected, outputs, strict=True):
        assert output.token_ids == want.token_ids
        close(values(output), values(want), 5e-4)
    assert (llm.seen[False, True] > 10) == (llm.seen[True, True] >= 5) == graphs
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0 and stats.num_cached_tokens > 0
    llm.engine.check_integrity()


@pytest.mark.parametrize("name", ["opt", "opt-350m", "qwen3-window", "phi3-partial", "llama-tied"])
def test_replayed_steps_of_every_kind_of_decoder(name, tiny_model, make, make_llm):
    model = tiny_model(name)
    units = (Unit(2), Unit(1, "mlp"), Unit(1, "attention"))
    rng = random.Random(4)
    prompts = [[rng.randrange(3, 90) for _ in range(length)] for length in (3, 9, 1, 14, 6)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    depths = [0, 3, 1, 0, 3]
    expected = make_llm(model, units, (0, 1, 3)).generate(prompts, params, depths)
    llm = make(model, units, (0, 1, 3))
    for want, output in zip(expected, llm.generate(prompts, params, depths), strict=True):
        assert output.token_ids == want.token_ids
        close(values(output), values(want))
    assert llm.replays.num_replays >= 10


@pytest.fixture
def patches(random_patch):
    """patches(width): of every form, for PATCHED_UNITS; one is of depths 1 and 2, the others of deeper ones."""

    def make(width):
        return (
            random_patch(width, (2, "attention"), (2, "mlp"), 1, 2),
            random_patch(width, (2, "attention"), (2, "mlp"), 3, normed=False),
            random_patch(width, (1, "mlp"), (1, "mlp"), 2, form="low-rank"),
            random_patch(width, (1, "attention"), (1, "attention"), 3, form="scale"),
        )

    return make


PATCHED_UNITS = (Unit(2), Unit(1, "mlp"), Unit(1, "attention"))


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "opt", "opt-350m", "opt-no-final-norm"])
def test_patched_rows_of_mixed_steps_equal_the_eager_executor(
    name, graphs, tiny_model, make, make_llm, patches
):
    """Prompts in chunks and decode steps of every mixture of four depths, as requests end one after another."""
    model, tiers = tiny_model(name), (0, 1, 2, 3)
    rng = random.Random(6)
    prompts = [[rng.randrange(3, 90) for _ in range(length)] for length in (3, 9, 1, 14, 6, 2, 5)]
    depths = [0, 3, 1, 2, 0, 3, 1]
    greedy = {"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    params = [SamplingParams(max_tokens=count, **greedy) for count in (2, 9, 7, 5, 4, 11, 3)]
    made, options = patches(make_llm(model).engine.spec.hidden_size), {"max_num_batched_tokens": 13}
    expected = make_llm(model, PATCHED_UNITS, tiers, made, **options).generate(prompts, params, depths)
    llm = make(model, PATCHED_UNITS, tiers, graphs, patches=made, **options)
    for want, output in zip(expected, llm.generate(prompts, params, depths), strict=True):
        assert output.token_ids == want.token_ids
        close(values(output), values(want))
    assert (llm.seen[False, True] >= 8) == (llm.seen[True, True] >= 2) == graphs


def test_graphs_of_one_depth_leave_out_the_patches_of_deeper_ones(tiny_model, make, make_request, patches):
    """A patch of every depth asked for is in the graph that a step replays; of others, none in a step of one depth."""
    llm = make(tiny_model("llama-gqa"), PATCHED_UNITS, (0, 2, 3), graphs=False, patches=patches(32))
    tiers = {tier.depth: tier for tier in llm.engine.tiers}
    executor = llm.engine.runner.executor
    run, launched = executor._decoder._patch, []

    def spy(stream, rows):
        launched.append(executor._patches.index(rows.patch))
        return run(stream, rows)

    executor._decoder._patch = spy
    assert executor.capture([4], Recorder()) == 5  # depth 3 is the deepest: its steps are of one depth
    for depths, some in (
        ([0, 0], []),
        ([2], [1, 2]),
        ([3, 3], [0, 1, 3]),
        ([0, 2], [0, 1, 2, 3]),
        ([2, 3], [0, 1, 2, 3]),
    ):
        rows = [make_request(PROMPT[:6], tiers[each], [2 * n, 2 * n + 1]) for n, each in enumerate(depths)]
        scheduled = [ScheduledRow(request, 5, 1) for request in rows]
        launched.clear()
        executor.run(StepArrays.of(scheduled, executor.unit_depths, executor.page_size), [0], greedy=True)
        assert launched == some


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights(weights, tiny_model, make, make_llm, patches):
    model, depths = tiny_model("llama-tied"), [0, 3, 0]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    prompts, options = [PROMPT[:7], PROMPT[2:12], PROMPT[9:30]], {"patches": patches(32), "weights": weights}
    expected = make_llm(model, PATCHED_UNITS, (0, 3), **options).generate(prompts, params, depths)
    outputs = make(model, PATCHED_UNITS, (0, 3), **options).generate(prompts, params, depths)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]


def test_rows_past_a_units_prefix_stay_as_they_are(tiny_model, make, make_request):
    """A replay of mixed depths writes no K and V of a skipped block, and none at all for the bucket's empty rows."""
    llm = make(tiny_model("llama-gqa"), CHAIN, TIERS)
    runner = llm.engine.runner
    tiers = {tier.depth: tier for tier in llm.engine.tiers}
    rows = [
        make_request(PROMPT[:6], tiers[depth], [2 * index, 2 * index + 1])
        for index, depth in enumerate((0, 0, 3))
    ]
    cache = runner.executor._decoder.kv_cache
    for block in (0, 1, 2, 3):
        for part in cache.layer(block):
            part.fill_(7.0)
    executor = runner.executor
    step = StepArrays.of(
        [ScheduledRow(request, 5, 1) for request in rows], executor.unit_depths, executor.page_size
    )
    before = llm.replays.num_replays
    forward = runner.executor.run(step, [0, 1, 2], greedy=True)
    assert llm.replays.num_replays == before + 1 and forward.greedy.shape == (3,)
    written = {
        block: sorted(set((cache.layer(block)[0] != 7.0).flatten(1).any(1).nonzero().flatten().tolist()))
        for block in (0, 1, 2, 3)
    }
    # Slots of position 5: the second page's second. Depth 3 skips blocks 3 and 1, and the attention of 2.
    assert written == {0: [5, 13, 21], 1: [5, 13], 2: [5, 13], 3: [5, 13]}


def test_stops_are_seen_and_the_extra_token_is_dropped(tiny_model_dir, tiny_chain, make, make_llm):
    """Stop strings, stop tokens and aborts end a request whose next step is under way already."""
    prompts = [[65, 66, 67], [70, 71], list(range(80, 97))]
    reference = make_llm(tiny_model_dir, max_num_seqs=8)
    plain = reference.generate(prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    stops = [output.token_ids[4] for output in plain]
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
        for stop in stops
    ]
    expected = reference.generate(prompts, params)
    llm = make(tiny_model_dir, max_num_seqs=8)
    outputs = llm.generate(prompts, params)
    assert [(output.token_ids, output.finish_reason) for output in outputs] == [
        (output.token_ids, output.finish_reason) for output in expected
    ]
    assert all(output.finish_reason == "stop" for output in outputs)
    assert not llm.engine.has_unfinished()
    llm.engine.check_integrity()


def test_an_abort_while_a_step_is_under_way(tiny_model_dir, make):
    llm = make(tiny_model_dir)
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    engine.add_request("a", [5, 6, 7], params)
    engine.add_request("b", [8, 9], params)
    assert engine.step() == []  # launched, nothing read yet
    engine.abort("a")
    engine.add_request("a", [5, 6, 7], params)  # the id is free again
    engine.check_integrity()
    tokens = {"a": [], "b": []}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] += output.new_token_ids
        engine.check_integrity()
    [alone_a, alone_b] = llm.generate([[5, 6, 7], [8, 9]], params)
    assert tokens == {"a": alone_a.token_ids, "b": alone_b.token_ids}


def test_the_next_step_is_launched_before_the_last_is_read(tiny_model_dir, make):
    """Order of events: launch n + 1, then read n; with a penalty: read n, then launch n + 1."""
    for penalty, wanted in ((0.0, "LLRLRLR"), (0.5, "LRLRLRL")):
        llm = make(tiny_model_dir)
        events = []
        runner = llm.engine.runner
        sample = runner.sample

        def spy(step, forward, sample=sample, events=events):
            events.append("L")
            launched = sample(step, forward)
            read = launched.sampled.read
            launched.sampled.read = lambda: (events.append("R"), read())[1]
            return launched

        runner.sample = spy
        llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, max_tokens=6, presence_penalty=penalty))
        assert "".join(events).startswith(wanted)


def test_a_bucket_is_at_most_half_empty_and_the_last_holds_all():
    assert decode_buckets(1) == (1,)
    assert decode_buckets(5) == (1, 2, 4, 5)
    assert decode_buckets(64)[-3:] == (48, 56, 64)
    for most in (1, 2, 7, 64, 100, 256, 1000):
        buckets = decode_buckets(most)
        assert buckets[-1] == most and list(buckets) == sorted(set(buckets))
        assert all(after <= 2 * before for before, after in itertools.pairwise(buckets))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernels": "torch", "overlap": True}, "overlap is on"),
        ({"kernels": "torch", "attention": "flash"}, "attention 'flash'.*kernels torch"),
        ({"kernels": "triton", "attention": "magic"}, "'magic'.*auto, triton, flash, torch"),
        ({"kernels": "triton", "attention": "flash"}, "'flash' cannot be used.*choose one of"),
    ],
    ids=str,
)
def test_an_attention_that_cannot_be_had(options, match, tiny_model_dir, make_llm):
    with pytest.raises(ConfigError, match=match):
        make_llm(tiny_model_dir, **options)


@pytest.mark.parametrize("name", ["llama-gqa", pytest.param("qwen3-window", marks=pytest.mark.slow), "opt"])
def test_triton_interpreted_equals_the_reference(name, tiny_model, make_llm, patches):
    """Chunked prefill beside decoding, three depths, then decode steps replayed: tokens and log-probabilities.

    The norms of two of them serve patches too.
    """
    from sleb.kernels.triton.runtime import INTERPRETED

    if not INTERPRETED:
        pytest.skip("kernels are compiled here")
    model = tiny_model(name)
    made = () if name == "qwen3-window" else patches(32)
    options = {"max_tokens": 3, "ignore_eos": True, "logprobs": 2}
    greedy = SamplingParams(temperature=0.0, **options)
    sampled = SamplingParams(temperature=0.9, top_k=7, top_p=0.9, seed=2, **options)
    params = [greedy, sampled if name == "llama-gqa" else greedy, greedy]
    prompts, depths = [PROMPT[:9], PROMPT[5:6], PROMPT[11:15]], [0, 3, 1]
    options = {"max_num_batched_tokens": 7}
    expected = make_llm(model, PATCHED_UNITS, (0, 1, 3), made, **options).generate(prompts, params, depths)
    llm = make_llm(model, PATCHED_UNITS, (0, 1, 3), made, kernels="triton", **options)
    replays = Recorder()
    llm.engine.runner.executor.capture([4], replays, prompts=[8] if name == "llama-gqa" else [])
    for want, output in zip(expected, llm.generate(prompts, params, depths), strict=True):
        assert output.token_ids == want.token_ids
        close(values(output), values(want))
    assert replays.num_replays >= (4 if name == "llama-gqa" else 2)


class TestFp8Cache:
    """Keys and values as bytes of e4m3, without a scale."""

    def test_answers_are_those_of_an_engine_that_rounds(self, tiny_model, make, make_llm):
        """Mixed depths, prefix hits and preemptions, replayed: against the eager engine over rounded K and V."""
        prompts, params, depths = traffic(19)
        options = {"max_num_batched_tokens": 19, "seed": 3}
        model = tiny_model("llama-gqa")
        eager = make_llm(model, CHAIN, TIERS, **options)
        executor = eager.engine.runner.executor
        kernels = executor.decoder.kernels
        exact = eager.generate(prompts, params, depths)

        def store(key, value, *rest):
            rounded = (each.clamp(-448, 448).to(torch.float8_e4m3fn).to(each.dtype) for each in (key, value))
            kernels.store_kv(*rounded, *rest)

        rounding = make_llm(model, CHAIN, TIERS, **options)
        decoder = rounding.engine.runner.executor.decoder
        decoder.kernels = replace(kernels, store_kv=store)
        expected = rounding.generate(prompts, params, depths)
        token = rounding.engine.kv_bytes_per_token(0)
        options["kv_cache_memory"] = (16 * token + 0.5) / GIB
        llm = make(model, CHAIN, TIERS, name="triton", kv_dtype="fp8", **options)
        assert llm.engine.kv_bytes_per_token(0) * 4 == token  # of float32
        assert "KV cache in fp8" in llm.engine.runner.description
        outputs = llm.generate(prompts, params, depths)
        same = [want.token_ids == output.token_ids for want, output in zip(expected, outputs, strict=True)]
        # A number that lies between two bytes may go the other way.
        assert sum(same) >= len(same) - 2
        for want, output, alike in zip(expected, outputs, same, strict=True):
            if alike:
                close(values(output), values(want), 5e-3)
        changed = [
            (values(old) - values(new)).abs().max()
            for old, new in zip(exact, expected, strict=True)
            if old.token_ids == new.token_ids and len(values(old))
        ]
        assert not changed or max(changed) > 0
        assert llm.seen[False, True] > 10 and llm.engine.stats().num_preemptions > 0
        llm.engine.check_integrity()

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"kernels": "torch"}, "'fp8' goes with the attention of kernels triton, and here kernels torch"),
            ({"kernels": "cpu"}, "here kernels cpu compute; use kv_dtype auto or int8"),
            ({"kernels": "triton", "attention": "torch"}, "with attention torch sdpa; use attention triton, or"),
        ],
        ids=str,
    )  # fmt: skip
    def test_it_is_refused_elsewhere(self, options, match, tiny_model, make_llm):
        with pytest.raises(ConfigError, match=match):
            make_llm(tiny_model("llama-gqa"), kv_dtype="fp8", page_size=16, **options)

    def test_int8_is_refused_with_what_there_is(self, tiny_model, make_llm):
        with pytest.raises(ConfigError, match="with attention triton; use kv_dtype auto or fp8"):
            make_llm(tiny_model("llama-gqa"), kv_dtype="int8", kernels="triton")

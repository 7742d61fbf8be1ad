"""The engine on a CUDA GPU (`pytest -m gpu`): Triton kernels, captured graphs, overlapped steps, mixed tiers."""

from __future__ import annotations

import pytest
import torch

from sleb import LLM, SamplingParams
from sleb.engine.execute.gpu import GpuExecutor
from sleb.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

PROMPTS = [[7, 8, 9], list(range(10, 60)), [100] * 17, [65, 66]]
TIERS = (0, 2, 4)
DEPTHS = [4, 0, 2, 0]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0, prompt_logprobs=0)
PLAIN = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SMALL = {"max_num_seqs": 8, "kv_cache_memory": 0.25}


@pytest.fixture(scope="module")
def on_cpu(tiny_model_dir, tiny_chain):
    llm = LLM(tiny_model_dir, tiny_chain, TIERS, device="cpu", dtype="float32", kernels="torch")
    return llm.generate(PROMPTS, GREEDY, DEPTHS)


@pytest.fixture
def make(tiny_model_dir, tiny_chain):
    def build(**options):
        return LLM(
            tiny_model_dir, tiny_chain, TIERS, device="cuda", **({"dtype": "float32"} | SMALL | options)
        )

    return build


def logprobs(output):
    """All log-probabilities of an output, prompt first: [len - 1]."""
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    return torch.tensor([entry.logprob for entry in entries])


def test_a_gpu_gets_triton_graphs_and_overlap(make):
    engine = make().engine
    executor = engine.runner.executor
    assert isinstance(executor, GpuExecutor) and engine.overlap
    assert (executor.name, executor.kernels, executor.attention) == ("gpu", "triton", "triton")
    assert "captured graphs" in engine.description


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("max_num_batched_tokens", [2048, 16], ids=["whole", "chunked"])
def test_float32_equals_the_cpu(on_cpu, make, kernels, max_num_batched_tokens):
    llm = make(kernels=kernels, max_num_batched_tokens=max_num_batched_tokens)
    for params in (GREEDY, PLAIN):
        for expected, output in zip(on_cpu, llm.generate(PROMPTS, params, DEPTHS), strict=True):
            assert output.token_ids == expected.token_ids
            if params is GREEDY:
                assert torch.allclose(logprobs(output), logprobs(expected), atol=1e-3)
    llm.engine.check_integrity()


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_graphs_and_overlap_change_nothing(on_cpu, make, cuda_graphs, overlap):
    llm = make(cuda_graphs=cuda_graphs, overlap=overlap)
    outputs = llm.generate(PROMPTS * 3, PLAIN, DEPTHS * 3)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in on_cpu] * 3


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_patched_steps_equal_the_cpu(tiny_model_dir, make_llm, random_patch, cuda_graphs):
    """Depths with patches of every form beside the dense one: prompts in chunks, then decode steps."""
    width = make_llm(tiny_model_dir).engine.spec.hidden_size
    patches = (
        random_patch(width, (3, "attention"), (3, "mlp"), 1, 1),
        random_patch(width, (3, "attention"), (3, "mlp"), 2, normed=False),
        random_patch(width, (1, "attention"), (1, "attention"), 2, form="scale"),
        random_patch(width, (1, "mlp"), (1, "mlp"), 2, form="low-rank"),
    )
    served = (tiny_model_dir, (3, 1), (0, 1, 2), patches)
    expected = make_llm(*served).generate(PROMPTS * 2, GREEDY, [2, 0, 1, 2] * 2)
    options = {
        "device": "cuda",
        "kernels": "triton",
        "cuda_graphs": cuda_graphs,
        "max_num_batched_tokens": 30,
    }
    outputs = make_llm(*served, page_size=16, **SMALL, **options).generate(
        PROMPTS * 2, GREEDY, [2, 0, 1, 2] * 2
    )
    for want, output in zip(expected, outputs, strict=True):
        assert output.token_ids == want.token_ids
        assert torch.allclose(logprobs(output), logprobs(want), atol=1e-3)


@pytest.mark.parametrize("attention", ["triton", "flash", "torch"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_scores_close_to_float32(tiny_model_dir, tiny_chain, make, dtype, attention):
    """Scores, not tokens: rounding may turn a near tie, and everything after it."""
    reference = LLM(tiny_model_dir, tiny_chain, TIERS, device="cpu", dtype="float32", kernels="torch")
    try:
        llm = make(dtype=dtype, attention=attention)
    except ConfigError as reason:
        pytest.skip(str(reason))
    for prompt, depth in zip(PROMPTS, DEPTHS, strict=True):
        error = (llm.score(prompt, depth) - reference.score(prompt, depth)).abs().mean()
        assert error < 0.3
    [output] = llm.generate([PROMPTS[1]], PLAIN)
    assert len(output.token_ids) == 24


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_equal_the_reference_operators(make, weights):
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    expected = make(weights=weights, kernels="torch").generate(PROMPTS, params, DEPTHS)
    outputs = make(weights=weights).generate(PROMPTS, params, DEPTHS)
    for want, output in zip(expected, outputs, strict=True):
        entries = [
            (a.logprob, b.logprob)
            for a, b in zip(want.prompt_logprobs[1:], output.prompt_logprobs[1:], strict=True)
        ]
        assert all(abs(a - b) < 1e-3 for a, b in entries)


def test_a_decode_step_waits_for_the_device_only_to_read_tokens(make):
    """Torch raises at every other synchronisation: copies from pageable memory, values read on the host."""
    llm = make()
    engine = llm.engine
    sampled = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, max_tokens=24, seed=1, ignore_eos=True)
    llm.generate(PROMPTS, sampled, DEPTHS)
    for index, (prompt, depth) in enumerate(zip(PROMPTS, DEPTHS, strict=True)):
        engine.add_request(str(index), prompt, sampled if index % 2 else PLAIN, depth)
    runner = engine.runner

    def strict(function):
        def checked(*arguments):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return checked

    runner.run, runner.sample = strict(runner.run), strict(runner.sample)
    tokens = 0
    while engine.has_unfinished():
        tokens += sum(len(output.new_token_ids) for output in engine.step())
    assert tokens == 24 * len(PROMPTS)


def test_sampling_with_a_seed_repeats(make):
    llm = make()
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, max_tokens=20, seed=3, ignore_eos=True)
    [alone] = llm.generate([PROMPTS[1]], params)
    assert llm.generate(PROMPTS, params)[1].token_ids == alone.token_ids


@pytest.mark.alone
def test_the_cache_takes_the_share_of_the_memory_that_was_asked_for(make):
    """Weights, KV, graphs and a full step stay within gpu_memory_utilization of the GPU."""
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.2
    llm = make(gpu_memory_utilization=share, kv_cache_memory=None, max_num_seqs=256)
    llm.generate([[5] * 400] * 64, SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True))
    free, total = torch.cuda.mem_get_info()
    assert (total - free) / total < share + 0.02

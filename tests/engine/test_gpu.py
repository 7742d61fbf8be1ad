"""The engine on a CUDA card (`pytest -m gpu`): float32 as on the CPU, half precision close to it, tiers mixed."""

from __future__ import annotations

import pytest
import torch

from sleb import LLM, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

PROMPTS = [[7, 8, 9], list(range(10, 60)), [100] * 17, [65, 66]]
TIERS = (0, 2, 4)
DEPTHS = [4, 0, 2, 0]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def on_cpu(tiny_model_dir, tiny_chain):
    llm = LLM(tiny_model_dir, tiny_chain, TIERS, device="cpu", dtype="float32")
    return llm.generate(PROMPTS, GREEDY, DEPTHS)


def logprobs(output):
    """All log-probabilities of an output, prompt first: [len - 1]."""
    entries = [*output.prompt_logprobs[1:], *output.logprobs]
    return torch.tensor([entry.logprob for entry in entries])


@pytest.mark.parametrize("max_num_batched_tokens", [2048, 16], ids=["whole", "chunked"])
def test_float32_equals_the_cpu(on_cpu, tiny_model_dir, tiny_chain, max_num_batched_tokens):
    llm = LLM(
        tiny_model_dir,
        tiny_chain,
        TIERS,
        device="cuda",
        dtype="float32",
        max_num_batched_tokens=max_num_batched_tokens,
    )
    for expected, output in zip(on_cpu, llm.generate(PROMPTS, GREEDY, DEPTHS), strict=True):
        assert output.token_ids == expected.token_ids
        assert torch.allclose(logprobs(output), logprobs(expected), atol=1e-3)
    llm.engine.check_integrity()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_scores_close_to_float32(tiny_model_dir, tiny_chain, dtype):
    """Scores, not tokens: rounding may turn a near tie, and everything after it."""
    reference = LLM(tiny_model_dir, tiny_chain, TIERS, device="cpu", dtype="float32")
    llm = LLM(tiny_model_dir, tiny_chain, TIERS, device="cuda", dtype=dtype)
    for prompt, depth in zip(PROMPTS, DEPTHS, strict=True):
        error = (llm.score(prompt, depth) - reference.score(prompt, depth)).abs().mean()
        assert error < 0.3


def test_sampling_with_a_seed_repeats(tiny_model_dir, tiny_chain):
    llm = LLM(tiny_model_dir, tiny_chain, TIERS, device="cuda", dtype="float32")
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, max_tokens=20, seed=3, ignore_eos=True)
    [alone] = llm.generate([PROMPTS[1]], params)
    assert llm.generate(PROMPTS, params)[1].token_ids == alone.token_ids

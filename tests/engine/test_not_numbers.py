"""A model whose logits are not numbers ends the requests that meet them, and no others, on every executor."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass

import pytest
import torch

from sleb import SamplingParams
from sleb.errors import InvalidOutputError
from sleb.kernels import registry
from sleb.kernels.cpu.features import cpu_features

POISON = 5  # a token whose embedding is NaN
GREEDY = {"temperature": 0.0, "max_tokens": 9, "ignore_eos": True}
SAMPLED = {"temperature": 1.0, "top_k": 20, "seed": 4, "max_tokens": 9, "ignore_eos": True}


KINDS = ["greedy", "sampled", "logprobs", "penalty", "grammar", "prompt_logprobs"]


@dataclass
class Anything:
    """A grammar that allows every token but POISON."""

    finished = False

    def start(self):
        return self

    def fill(self, mask):
        mask.fill(-1)
        mask[0] &= ~(1 << POISON)

    def accept(self, token_id):
        assert token_id >= 0


HEALTHY = [
    ([7, 8, 9, 10, 11, 12], GREEDY),
    ([20, 21, 22], SAMPLED),
    ([30, 31, 32, 33], GREEDY | {"logprobs": 2}),
    ([40, 41], GREEDY | {"repetition_penalty": 1.3}),
    ([50, 51, 52], GREEDY | {"grammar": Anything()}),
    ([60, 61, 62, 63], GREEDY | {"prompt_logprobs": 1}),
]


def changed(tiny_model, folder, change):
    """The tiny Llama after `change`, saved in `folder`."""
    tiny = tiny_model("llama-gqa")
    model = copy.deepcopy(tiny.model)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return type(tiny)("changed", folder, model)


@pytest.fixture(scope="module")
def poisoned(tiny_model, tmp_path_factory):
    """The tiny Llama in which POISON is embedded as NaN, in float32 and with a head of its own."""
    return changed(
        tiny_model,
        tmp_path_factory.mktemp("poisoned"),
        lambda model: model.model.embed_tokens.weight[POISON].fill_(torch.nan),
    )


@pytest.fixture(params=["torch", "cpu", "triton"])
def make(request, make_llm, monkeypatch):
    """make(folder, **options) -> an LLM over each executor; a GPU's runs the torch specification, and overlaps."""
    if request.param == "cpu" and cpu_features().level == "none":
        pytest.skip("the C kernels need AVX-512 with VNNI")
    if request.param == "triton":
        pytest.importorskip("triton")
        specification = registry.torch_gpu_kernels()
        monkeypatch.setattr(registry, "triton_gpu_kernels", lambda: specification)

    def build(folder, **options):
        return make_llm(folder, kernels=request.param, **({"page_size": 16} | options))

    return build


def generate(llm, work):
    prompts, params = zip(*work, strict=True)
    return llm.generate([list(prompt) for prompt in prompts], [SamplingParams(**each) for each in params])


@pytest.mark.parametrize("fields", [fields for _, fields in HEALTHY], ids=KINDS)
def test_a_request_that_meets_nan_ends_alone(fields, poisoned, make):
    """Its neighbours in every step, and those that get its pages afterwards, answer as they do without it."""
    llm = make(poisoned, max_num_seqs=8)
    expected = generate(make(poisoned, prefix_caching=False), HEALTHY)
    mates = [*HEALTHY[:3], ([7, POISON, 8, 9, *range(10, 40)], fields), *HEALTHY[3:]]
    outputs = generate(llm, mates)
    broken = outputs.pop(3)
    assert broken.finish_reason == "error" and broken.token_ids == []
    assert isinstance(broken.choices[0].failure, InvalidOutputError)
    for want, each in zip(expected, outputs, strict=True):
        assert each.finish_reason == "length" and each.choices[0].failure is None
        assert each.token_ids == want.token_ids
    again = generate(llm, HEALTHY)
    assert [each.token_ids for each in again] == [each.token_ids for each in expected]
    llm.engine.check_integrity()


def test_an_answer_that_meets_nan_on_its_way_ends_there(poisoned, make):
    """A bias makes it say POISON; what was said up to then is kept."""
    [output] = generate(make(poisoned), [([7, 8], GREEDY | {"logit_bias": {POISON: 100.0}})])
    assert output.token_ids == [POISON] and output.finish_reason == "error"


def test_scores_of_a_prompt_that_are_no_numbers_are_refused(poisoned, make):
    """Every log-probability after the token is NaN, even where no answer is asked for."""
    llm = make(poisoned)
    with pytest.raises(InvalidOutputError, match="logits are not numbers"):
        llm.score([7, 8, POISON, 9, 10])
    assert llm.score([7, 8, 9, 10]).isfinite().all()


def test_it_is_logged_once_with_its_cause(poisoned, make, caplog):
    llm = make(poisoned)
    with caplog.at_level(logging.ERROR):
        generate(llm, [([POISON, number], GREEDY) for number in range(6, 12)])
    [record] = caplog.records
    assert "float32" in record.getMessage() and "checkpoint" in record.getMessage()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_logit_is_enough(value, tiny_model, make, tmp_path):
    """A row of the head that is no number gives one such logit in every row, which others may exceed."""
    model = changed(tiny_model, tmp_path, lambda model: model.lm_head.weight[70].fill_(value))
    outputs = generate(make(model), HEALTHY)
    assert {output.finish_reason for output in outputs} == {"error"}
    assert not any(output.token_ids for output in outputs)


def test_float16_that_overflows_is_named(tiny_model, make_llm, tmp_path, caplog):
    """300 times 300 is above 65,504, and fits bfloat16."""

    def widen(model):
        for block in model.model.layers:
            block.mlp.gate_proj.weight.mul_(300)
            block.mlp.up_proj.weight.mul_(300)

    model = changed(tiny_model, tmp_path, widen)
    with caplog.at_level(logging.ERROR):
        [output] = generate(make_llm(model, dtype="float16"), [([7, 8, 9], GREEDY)])
    assert output.finish_reason == "error"
    assert "float16" in caplog.text and "65504" in caplog.text and "bfloat16" in caplog.text
    [output] = generate(make_llm(model, dtype="bfloat16"), [([7, 8, 9], GREEDY)])
    assert output.finish_reason == "length"

"""The engine against transformers: the same logits for every architecture, however a sequence is cut into steps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import pytest
import torch

from sleb.engine.execute.cpu import unsupported_feature
from sleb.engine.model.architecture import DecoderSpec, resolve_spec
from sleb.engine.requests.sampling_params import SamplingParams
from sleb.kernels.cpu.features import cpu_features
from sleb.layer_map.layer_map import Unit
from sleb.models.families import FAMILIES, Family

TOLERANCE = 1e-4
PROMPT = torch.randint(3, 96, (37,), generator=torch.Generator().manual_seed(5)).tolist()
REMOVALS = [(), (2,), (0, 4), (1, 2, 3), (4, 3, 1, 0)]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


def own_pages(length, page_size=4, first=0):
    """Page numbers in reverse order, so that nothing works by pages happening to be adjacent."""
    return list(range(first, first + -(-length // page_size)))[::-1]


@pytest.mark.parametrize("removed", REMOVALS, ids=str)
def test_logits_of_any_subset_of_blocks(architecture, removed, tiny_model, make_llm, make_request, forward):
    """Prefill at once, in uneven chunks across page borders, and token by token: the same logits each time."""
    model = tiny_model(architecture)
    engine = make_llm(model, removed).engine
    expected = model.without(removed).logits(PROMPT)
    tier = engine.default_tier

    whole = make_request(PROMPT, tier, own_pages(len(PROMPT)))
    close(forward(engine, [(whole, 0, len(PROMPT))]), expected)

    cut = make_request(PROMPT, tier, own_pages(len(PROMPT), first=20))
    borders = [0, 1, 8, 15, 16, 25, *range(26, len(PROMPT) + 1)]
    pieces = [forward(engine, [(cut, start, end)]) for start, end in itertools.pairwise(borders)]
    close(torch.cat(pieces), expected)


@pytest.mark.parametrize("budget", [2048, 7], ids=["whole", "chunked"])
def test_generation_and_prompt_logprobs(architecture, budget, tiny_model, make_llm, assert_logprobs):
    """Through the public API: prompt log-probabilities, greedy tokens and their log-probabilities."""
    model, removed = tiny_model(architecture), (3,)
    llm = make_llm(model, removed, max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=20, prompt_logprobs=20)
    output = llm.generate([PROMPT], params)[0]
    # One causal forward over prompt and answer holds every step's full forward without a cache.
    reference = model.without(removed).logprobs([*PROMPT, *output.token_ids])

    answer = reference[len(PROMPT) - 1 : -1]
    assert output.token_ids == answer.argmax(dim=-1).tolist()
    assert_logprobs(output.logprobs, answer)
    assert output.prompt_logprobs[0] is None
    assert [entry.token_id for entry in output.prompt_logprobs[1:]] == PROMPT[1:]
    assert_logprobs(output.prompt_logprobs[1:], reference[: len(PROMPT) - 1])
    llm.engine.check_integrity()


def test_score(architecture, tiny_model, make_llm):
    """score(ids): float32 log-probabilities of ids[1:]."""
    model = tiny_model(architecture)
    llm = make_llm(model, (4, 1), tiers=(0, 2), max_num_batched_tokens=16)
    following = torch.tensor(PROMPT[1:])
    for depth, removed in ((0, ()), (2, (4, 1))):
        scores = llm.score(PROMPT, depth=depth)
        expected = model.without(removed).logprobs(PROMPT)[:-1].gather(1, following[:, None]).squeeze(1)
        assert scores.dtype == torch.float32 and scores.shape == (len(PROMPT) - 1,)
        close(scores, expected)


@pytest.mark.parametrize(
    "units",
    [
        (Unit(1, "attention"),),
        (Unit(0, "mlp"), Unit(3, "attention")),
        (Unit(2, "mlp"), Unit(1), Unit(2, "attention"), Unit(4, "attention")),
    ],
    ids=lambda units: "+".join(map(str, units)),
)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-window", "smollm3", "phi3-partial", "opt"])
def test_removed_sublayers_add_nothing(name, units, tiny_model, make_llm, make_request, forward):
    """A sublayer that is removed is one whose output projection is zero."""
    model = tiny_model(name)
    engine = make_llm(model, units).engine
    request = make_request(PROMPT, engine.default_tier, own_pages(len(PROMPT)))
    close(forward(engine, [(request, 0, len(PROMPT))]), model.without_sublayers(units).logits(PROMPT))


def test_post_norm_sublayer_takes_its_norm_with_it(tiny_model, make_llm, make_request, forward):
    """In OPT-350M the norm stands after the addition and belongs to the sublayer: removed, both are gone."""
    model = tiny_model("opt-350m")
    engine = make_llm(model, (Unit(1, "attention"), Unit(1, "mlp"), Unit(3))).engine
    request = make_request(PROMPT, engine.default_tier, own_pages(len(PROMPT)))
    close(forward(engine, [(request, 0, len(PROMPT))]), model.without((1, 3)).logits(PROMPT))


def test_longrope_is_that_of_the_length_reached(tiny_model, make_llm, make_request, forward):
    """Short factors up to the original context, which is 24 here, and long ones past it, by one engine."""
    model = tiny_model("phi3-longrope")
    engine = make_llm(model).engine
    for length in (24, 25, 24, len(PROMPT)):
        request = make_request(PROMPT[:length], engine.default_tier, own_pages(length))
        found = forward(engine, [(request, 0, length)])
        close(found, model.logits(PROMPT[:length]))


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"kv_cache_memory": 2e-4}])
@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_longrope_across_the_original_context(kernels, options, tiny_model, make_llm):
    """Answers that grow past it beside others, and prompts that begin alike: transformers' own tokens, one by one."""
    if kernels == "cpu" and cpu_features().level == "none":
        pytest.skip("the C kernels need AVX-512 with VNNI")
    model = tiny_model("phi3-longrope")
    llm = make_llm(model, kernels=kernels, page_size=4 if kernels == "torch" else 16, **options)
    prompts = [PROMPT[:20], PROMPT[:30], PROMPT[:24], PROMPT[:3], PROMPT[:23], PROMPT[:20]]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        for entry in output.logprobs:
            wanted = model.logprobs(tokens)[-1]
            assert entry.token_id == wanted.argmax()
            assert abs(entry.logprob - wanted.max()) < 1e-4
            tokens.append(entry.token_id)
        assert len(tokens) == len(prompt) + 12
    for length in (20, 24, 25, 31):
        wanted = model.logprobs(PROMPT[:length])[:-1]
        chosen = wanted.gather(1, torch.tensor(PROMPT[1:length])[:, None])[:, 0]
        assert (llm.score(PROMPT[:length]) - chosen).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "llama3", "llama-yarn", "phi3-longrope", "qwen3-window"])
def test_rope_settings_as_older_checkpoints_write_them(
    name, tiny_model, make_llm, make_request, forward, tmp_path
):
    """Checkpoints from before transformers 5 have rope_theta and rope_scaling at the top of config.json."""
    model = tiny_model(name)
    folder = shutil.copytree(model.path, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if name == "phi3-longrope" and key in parameters:
            config[key] = parameters.pop(key)
    config["rope_scaling"] = None if parameters["rope_type"] == "default" else parameters
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    engine = make_llm(type(model)(name, folder, model.model)).engine
    request = make_request(PROMPT, engine.default_tier, own_pages(len(PROMPT)))
    close(forward(engine, [(request, 0, len(PROMPT))]), model.logits(PROMPT))


@pytest.mark.parametrize("name", ["llama-gqa", "opt", "qwen3"])
def test_scorer_loss_is_mean_cross_entropy_times_length(name, tiny_model):
    """DecoderScorer, which the search runs on: loss of windows, with units skipped."""
    from sleb.engine.model.scoring import DecoderScorer

    model = tiny_model(name)
    scorer = DecoderScorer.load(str(model.path), device="cpu")
    windows = torch.randint(3, 96, (3, 21), generator=torch.Generator().manual_seed(1))
    for removed in ((), (1, 3)):
        reference = model.without(removed)
        expected = sum(
            torch.nn.functional.cross_entropy(reference.logits(window.tolist())[:-1], window[1:]).item() * 21
            for window in windows
        )
        hidden = scorer.embed(windows)
        for block in range(scorer.num_blocks):
            if block in removed:
                continue
            before = hidden.clone()
            hidden, given = scorer.run(Unit(block), hidden), hidden
            assert torch.equal(given, before), "the input of run must stay as it is"
        losses = scorer.token_losses(hidden, windows)
        assert losses.shape == (3, 20)
        assert float(losses.mean(1).sum() * 21) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_every_family(variant, kernels, tiny_model, make_llm, make_request, forward):
    """Whole and pruned, at once and in pieces: transformers' logits, by each executor that knows the family."""
    model, removed, page_size = tiny_model(variant), (3, 1), 4 if kernels == "torch" else 16
    if kernels == "cpu" and (lacking := unsupported_feature(resolve_spec(model.path), page_size)):
        pytest.skip(f"the C kernels lack {lacking}")
    if kernels == "cpu" and cpu_features().level == "none":
        pytest.skip("the C kernels need AVX-512 with VNNI")
    engine = make_llm(model, removed, (0, 2), kernels=kernels, page_size=page_size).engine
    assert engine.runner.executor.name == {"torch": "eager"}.get(kernels, kernels)
    for depth in (0, 2):
        expected = model.without(removed[:depth]).logits(PROMPT)
        whole, cut = (
            make_request(PROMPT, engine.tier(depth), own_pages(len(PROMPT), page_size, first))
            for first in (0, 10)
        )
        close(forward(engine, [(whole, 0, len(PROMPT))]), expected)
        pieces = [forward(engine, [(cut, *piece)]).clone() for piece in itertools.pairwise((0, 17, 36, 37))]
        close(torch.cat(pieces), expected)


def test_every_family_and_every_column_is_tested(model_names, tiny_model):
    """Each column of the table differs somewhere from what it is by default, and what comes of it between models."""
    specs = [resolve_spec(tiny_model(name).path) for name in model_names]
    assert {spec.architecture for spec in specs} == set(FAMILIES)
    columns = {each.name for each in dataclasses.fields(Family)} - {"architecture", "model_type", "fields"}
    plain = Family("", "", {})
    unused = {
        name
        for name in columns
        if all(getattr(each, name) == getattr(plain, name) for each in FAMILIES.values())
    }
    assert not unused
    same = {
        each.name
        for each in dataclasses.fields(DecoderSpec)
        if len({str(getattr(spec, each.name)) for spec in specs}) == 1
    }
    same -= {"vocab_size", "max_positions", "num_heads", "num_blocks", "checkpoint_dtype"}
    assert not same

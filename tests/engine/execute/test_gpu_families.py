"""The executor for a GPU on every part that an architecture may have, against the eager executor on the same weights.

A decoder is a spec with some of its values changed, over random weights: no checkpoint, so that parts meet in pairs
that no family has. Most run the operators' torch specification, one of each kind the interpreted Triton kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sleb.engine.execute.eager import EagerExecutor
from sleb.engine.execute.executor import PlannedUnit
from sleb.engine.execute.gpu import GpuExecutor
from sleb.engine.execute.gpu_decoder import GpuDecoder
from sleb.engine.execute.gpu_setup import lacks_feature
from sleb.engine.execute.kv_cache import PagedKVCache
from sleb.engine.execute.step_arrays import NEVER, StepArrays
from sleb.engine.model.allocation import all_sublayers, allocate, patch_weights
from sleb.engine.model.architecture import ExpertsSpec, resolve_spec
from sleb.engine.model.decoder import Decoder
from sleb.engine.requests.tier import Tier
from sleb.engine.schedule.step import ScheduledRow
from sleb.errors import ConfigError
from sleb.kernels.attention.select import AttentionBackend
from sleb.kernels.registry import select_kernels, torch_gpu_kernels, triton_gpu_kernels
from sleb.models.families.family import Experts

CPU = torch.device("cpu")
BLOCKS, PAGE_SIZE, PAGES = 4, 4, 40
DEPTHS = (0, 1, 2)  # depth 1 leaves out block 1, depth 2 block 2 as well
PROMPTS = {0: [3, 14, 15, 92, 65, 35, 8], 1: [9, 79, 32, 38, 46], 2: [26, 43, 38, 32, 79, 50, 28, 84, 19]}

POST = {"attention_post_norm": "post_a", "mlp_post_norm": "post_m"}
NO_PRE = {"attention_norm": None, "mlp_norm": None, **POST}
LAYER = {"norm": "layer", "norm_bias": True}


def mixture(activation="silu", shared_size=0, normalised=True):
    """In every block but the first; of gpt-oss's kind its matrices have biases, and rows of gate and up in turn."""
    alternating = activation == "clamped_swiglu"
    names = Experts(
        router="mlp.gate",
        router_bias=alternating,
        up=("mlp.up",),
        up_bias="mlp.up_bias" if alternating else None,
        down="mlp.down",
        down_bias="mlp.down_bias" if alternating else None,
        alternating=alternating,
        shared="mlp.shared",
        shared_gate="mlp.shared_gate" if shared_size else None,
    )
    return ExpertsSpec(6, 2, 10, shared_size, normalised, activation, (False, *[True] * (BLOCKS - 1)), names)


# Values of the spec, and names of norms, that a family changes.
PARTS = {
    "Llama": ({}, {}),
    "Gemma 2": (
        {
            "attention_softcap": 3.0,
            "logit_softcap": 5.0,
            "embed_scale": 5.5,
            "norm_shift": 1.0,
            "windows": (3, None, 3, None),
        },
        POST,
    ),
    "OLMo 2": ({"qk_norm": "whole"}, NO_PRE),
    "OLMo": (
        {"clip_qkv": 0.8, "norm": "layer", "norm_affine": False, "activation": "relu2", "gated": False},
        {"up": ("mlp.up_proj",)},
    ),
    "Granite": (
        {"residual_scale": 0.3, "attention_scale": 0.1, "qk_norm": "head", "qk_norm_after_rotation": True},
        {},
    ),
    "GPT-NeoX": ({"parallel": True, "qkv_bias": True, **LAYER}, {}),
    "Cohere": ({"parallel": True, "norm": "layer", "qk_norm": "head"}, {"mlp_norm": None}),
    "Phi": ({"parallel": True, "head_bias": True, **LAYER}, {"mlp_norm": None}),
    "gpt-oss": ({"sinks": True, "attention_softcap": 2.0, "windows": (3, None, 3, None)}, {}),
    "two tables": (
        {"windows": (3, None, 3, 3), "block_rotary": (1, 0, 1, None), "qk_norm": "head", **LAYER},
        POST,
    ),
    "Qwen3-MoE": ({"experts": mixture(), "qk_norm": "head"}, {}),
    "gpt-oss experts": (
        {"experts": mixture("clamped_swiglu", shared_size=12, normalised=False), "sinks": True},
        POST,
    ),
    "layer norms everywhere": ({"qk_norm": "whole", "residual_scale": 0.5, **LAYER}, NO_PRE),
}


def decoder_of(spec, random_patch, seed=0):
    """Random weights, none of them near its usual value, and two patches."""
    weights, targets = allocate(spec, all_sublayers(spec), torch.float32, CPU)
    generator = torch.Generator().manual_seed(seed)
    for name, target in targets.items():
        deviation = 0.4 if target.weight.dim() > 1 else 0.3
        target.weight.normal_(
            1.0 if "norm" in name and "bias" not in name else 0.0, deviation, generator=generator
        )
    width = spec.hidden_size
    patches = (
        random_patch(width, (1, "attention"), (1, "mlp"), 1, form="low-rank"),
        random_patch(width, (2, "attention"), (2, "mlp"), 2, form="scale"),
    )
    patched = tuple(patch_weights(patch, torch.float32, CPU) for patch in patches)
    return Decoder(spec, replace(weights, patches=patched), select_kernels("torch", CPU), 64, CPU)


def plan():
    """Units by block, and after blocks 1 and 2 what stands for them."""
    units = []
    for block in range(BLOCKS):
        depths = (0, block if block in DEPTHS and block else NEVER)
        units += [PlannedUnit((block, part), depths) for part in ("attention", "mlp")]
        if depths[1] != NEVER:
            units.append(PlannedUnit(block - 1, (block, NEVER)))
    return tuple(units)


class Sequences:
    """Three requests of different depths; their prompts in two pieces, then token by token."""

    def __init__(self, make_request):
        self.requests = []
        for depth in DEPTHS:
            tier = Tier("model", depth, f"digest-{depth}", BLOCKS - depth, ())
            pages = [depth + 3 * number for number in range(5)]
            self.requests.append(make_request(PROMPTS[depth], tier, pages))

    def steps(self, executor, turns=3):
        """Logits of each step's last tokens, the tokens themselves given: nothing is sampled."""
        whole = [(request, len(request.tokens)) for request in self.requests]
        pieces = [[(0, length - 3) for _, length in whole]]
        pieces += [[(length - 3 + turn, 1) for _, length in whole] for turn in range(turns)]
        pieces.append([(0, 1), (len(PROMPTS[1]) - 1, 1), (0, len(PROMPTS[2]))])  # chunks beside single tokens
        for piece in pieces:
            rows = [
                ScheduledRow(request, start, count)
                for request, (start, count) in zip(self.requests, piece, strict=True)
            ]
            step = StepArrays.of(rows, executor.unit_depths, PAGE_SIZE)
            last = [end - 1 for end in step.query_starts[1:]]
            yield executor.run(step, last, greedy=False).logits.clone()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def base(tiny_model):
    spec = resolve_spec(tiny_model("llama-gqa").path)
    rotary = spec.rotaries[0]
    slower = replace(rotary, frequencies=tuple(0.3 * each for each in rotary.frequencies))
    return replace(
        spec,
        num_blocks=BLOCKS,
        windows=(None,) * BLOCKS,
        block_rotary=(0,) * BLOCKS,
        rotaries=(rotary, slower),
    )


def executors(base, name, random_patch, kernels):
    values, names = PARTS[name]
    spec = replace(base, names=replace(base.names, **names), **values)
    assert lacks_feature(spec) is None
    decoder = decoder_of(spec, random_patch)
    caches = [PagedKVCache(spec, range(BLOCKS), PAGES + 1, PAGE_SIZE, torch.float32, CPU) for _ in range(2)]
    gpu = GpuExecutor(
        GpuDecoder(decoder, kernels, kernels.attention, caches[0]),
        kernels,
        AttentionBackend(kernels.name, kernels.attention),
        plan(),
        depths=DEPTHS,
        page_size=PAGE_SIZE,
        padding_page=PAGES,
        max_num_seqs=4,
        max_pages=6,
    )
    return EagerExecutor(decoder, caches[1], plan(), PAGE_SIZE), gpu


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_of_an_architecture(base, random_patch, make_request, name, graphs):
    """Prompts in pieces and single tokens of three depths: the eager executor's logits, replayed or not."""
    eager, gpu = executors(base, name, random_patch, torch_gpu_kernels())
    if graphs:
        gpu.capture([4], lambda function: function)
    expected = list(Sequences(make_request).steps(eager))
    for actual, want in zip(Sequences(make_request).steps(gpu), expected, strict=True):
        close(actual, want)
        assert want.std() > 0.3  # there is something to compare


@pytest.mark.parametrize("name", ["Llama", "Granite", "Qwen3-MoE"])
def test_updates_are_added_by_norms_where_rows_are_many(base, random_patch, make_request, name):
    """As in the test above, where no step has so few rows that products norm what they read."""
    eager, gpu = executors(base, name, random_patch, replace(torch_gpu_kernels(), fused_rows=0))
    gpu.capture([4], lambda function: function)
    for actual, want in zip(
        Sequences(make_request).steps(gpu), Sequences(make_request).steps(eager), strict=True
    ):
        close(actual, want)


@pytest.mark.parametrize(
    "name",
    [
        "Gemma 2",
        *(pytest.param(each, marks=pytest.mark.slow) for each in PARTS if each != "Gemma 2"),
    ],
)
def test_triton_interpreted(base, random_patch, make_request, name):
    triton = pytest.importorskip("sleb.kernels.triton.runtime")
    if not triton.INTERPRETED:
        pytest.skip("kernels are compiled here")
    eager, gpu = executors(base, name, random_patch, triton_gpu_kernels())
    expected = Sequences(make_request).steps(eager, 0)
    for actual, want in zip(Sequences(make_request).steps(gpu, 0), expected, strict=True):
        close(actual, want)


def test_what_is_lacking_is_said(base, tiny_model, make_llm, monkeypatch):
    """Where kernels triton were asked for by name it is an error, else the reason why torch computes."""
    whole = replace(base, qk_norm="whole", qk_norm_after_rotation=True)
    assert lacks_feature(whole) == "norms of all queries together after their rotation"
    post = replace(base.names, **POST)
    assert "parallel" in lacks_feature(replace(base, parallel=True, names=post))
    monkeypatch.setattr("sleb.engine.execute.build.lacks_feature", lambda spec: "grace")
    with pytest.raises(ConfigError, match="kernels 'triton' do not run grace; use kernels auto or torch"):
        make_llm(tiny_model("llama-gqa"), kernels="triton")

"""Checkpoints of patched depths: transformers, and where it can be had llama.cpp, compute what plain torch does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from sleb import LLM, LayerMap, SamplingParams
from sleb.errors import ConfigError
from sleb.formats.decilm_model import DeciLMForCausalLM
from sleb.formats.exporting import export_model
from sleb.layer_map.layer_map import Patch, Patches, Unit

PROMPT = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(7)).tolist()


def patch(first, last, form="full", rank=3, *, normed=True, width=32, seed=0):
    """A random patch whose change is as large as a block's."""
    draw = np.random.default_rng([first[0], last[0], seed]).normal
    shapes = {
        "full": {"weight": (width, width)},
        "low-rank": {"down": (rank, width), "up": (width, rank)},
        "scale": {"scale": (width,)},
    }
    tensors = {name: draw(0, 0.3, shape) for name, shape in (shapes[form] | {"bias": (width,)}).items()}
    return Patch(first, last, 1, None, form, normed, tensors)


def chain(path, removed, *patches):
    units = tuple(unit if isinstance(unit, Unit) else Unit(unit) for unit in removed)
    num_blocks = json.loads((path / "config.json").read_text())["num_hidden_layers"]
    patches = (replace(each, first_depth=len(units)) for each in patches)
    return LayerMap(path.name, None, num_blocks, removed=units, patches=Patches.of(patches))


def patched(model, layer_map):
    """transformers' model without the sublayers, and with the patches as hooks: plain torch, float32.

    A run adds nothing, so that its patch may stand at the end of its last block, or before that one's attention.
    """
    config = model.model.config
    eps = getattr(config, "rms_norm_eps", 1e-5)
    changed = model.without_sublayers(layer_map.removed).model
    layers = next(
        m.layers for m in changed.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList)
    )

    def apply(each, hidden):
        tensors = {name: torch.from_numpy(np.float32(array)) for name, array in each.tensors.items()}
        if each.form == "scale":
            return tensors["scale"] * hidden + tensors["bias"]
        weight = tensors["weight"] if each.form == "full" else tensors["up"] @ tensors["down"]
        inputs = hidden
        if each.normed:
            rms = hasattr(config, "rms_norm_eps")
            inputs = (
                F.rms_norm(hidden, hidden.shape[-1:], None, eps)
                if rms
                else F.layer_norm(hidden, hidden.shape[-1:])
            )
        return hidden + inputs @ weight.T + tensors["bias"]

    for each in layer_map.patches.load():
        block, part = each.last
        if part == "mlp":
            layers[block].register_forward_hook(lambda module, _, output, each=each: apply(each, output))
        else:
            layers[block].register_forward_pre_hook(
                lambda module, inputs, each=each: (apply(each, inputs[0]), *inputs[1:])
            )
    return changed


def logits(model):
    with torch.inference_mode():
        return model(torch.tensor([PROMPT]), use_cache=False).logits[0]


def reload(folder, cls=None):
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = (cls or AutoModelForCausalLM).from_pretrained(folder, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def block_kinds(folder, width):
    """For each block: attention, linear or none; the width of its MLP."""
    kinds = []
    for each in json.loads((folder / "config.json").read_text())["block_configs"]:
        attention, ffn = each["attention"], each["ffn"]
        kind = "none" if attention["no_op"] else "linear" if attention["replace_with_linear"] else "attention"
        mult = ffn.get("ffn_mult")
        size = (
            0
            if ffn["no_op"]
            else ffn["intermediate_size"]
            if mult is None
            else -(-int(2 * mult * width / 3) // 256) * 256
        )
        kinds.append((kind, size))
    return kinds


BLOCK, ATTENTION, MLP = (
    ((2, "attention"), (2, "mlp")),
    ((2, "attention"), (2, "attention")),
    ((2, "mlp"), (2, "mlp")),
)
CASES = {
    "a run": ((2, 3), [patch((2, "attention"), (3, "mlp"))]),
    "two runs": (
        (1, 3),
        [patch((1, "attention"), (1, "mlp")), patch((3, "attention"), (3, "mlp"), "low-rank")],
    ),
    "one a block": ((2, 3), [patch(*BLOCK), patch((3, "attention"), (3, "mlp"), "low-rank", 5)]),
    "an MLP": ((Unit(2, "mlp"),), [patch(*MLP)]),
    "an attention": ((Unit(2, "attention"),), [patch(*ATTENTION, "low-rank")]),
    "between": (
        (Unit(2, "mlp"), Unit(3, "attention")),
        [patch((2, "mlp"), (3, "attention"))],
    ),
    "not all": ((1, 3), [patch((3, "attention"), (3, "mlp"))]),
    "the last": ((4,), [patch((4, "attention"), (4, "mlp"))]),
}


EVERY_MODEL = [("two runs", name) for name in ("llama-tied", "llama-biases", "mistral")]


@pytest.mark.parametrize(("case", "name"), [*((case, "llama-gqa") for case in CASES), *EVERY_MODEL])
def test_decilm_holds_patches_exactly(case, name, tiny_model, tmp_path):
    model = tiny_model(name)
    layer_map = chain(model.path, CASES[case][0], *CASES[case][1])
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=layer_map)
    expected = logits(patched(model, layer_map))
    torch.testing.assert_close(
        logits(reload(tmp_path / "out", DeciLMForCausalLM)), expected, atol=1e-4, rtol=0
    )
    assert (expected - logits(model.without_sublayers(layer_map.removed).model)).abs().max() > 0.1


def test_decilm_generates_with_its_cache_what_our_engine_does(tiny_model, tmp_path):
    model = tiny_model("llama-gqa")
    layer_map = chain(model.path, CASES["two runs"][0], *CASES["two runs"][1])
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=layer_map)
    loaded = reload(tmp_path / "out", DeciLMForCausalLM)
    tokens = loaded.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    llm = LLM(
        model.path,
        layer_map,
        [2],
        page_size=4,
        dtype="float32",
        device="cpu",
        kernels="torch",
        max_num_seqs=4,
    )
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert tokens[0, len(PROMPT) :].tolist() == llm.generate([PROMPT], params)[0].token_ids


@pytest.mark.parametrize(("case", "name"), [("two runs", name) for name in ("llama-gqa", "smollm3", "opt")])
def test_zeroed_holds_patches_exactly(case, name, tiny_model, tmp_path):
    """In the removed blocks' own MLPs, of 48 features here: those of 32 that a full patch has go into no such."""
    model = tiny_model(name)
    runs = [replace(each, form="low-rank", tensors=patch(each.first, each.last, "low-rank", 24).tensors)
            for each in CASES[case][1]]  # fmt: skip
    layer_map = chain(model.path, CASES[case][0], *runs)
    export_model(str(model.path), "zeroed", tmp_path / "out", layer_map=layer_map)
    torch.testing.assert_close(
        logits(reload(tmp_path / "out")), logits(patched(model, layer_map)), atol=1e-4, rtol=0
    )


def test_the_form_of_a_patch_is_the_one_that_takes_fewer_weights(tmp_path):
    """A model 1,024 wide: MLPs of 256 and 512 features for ranks up to 256, a linear attention for what is fuller."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 9, "vocab_size": 8}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "wide")

    def run(first, last, form, rank):
        return patch(first, last, form, rank, width=1024)

    removed = [Unit(1), Unit(3), Unit(5), Unit(6, "attention"), Unit(8, "mlp")]
    patches = [
        run((1, "attention"), (1, "mlp"), "low-rank", 128),
        run((3, "attention"), (3, "mlp"), "low-rank", 129),
        run((5, "attention"), (5, "mlp"), "full", 0),
        run((8, "mlp"), (8, "mlp"), "low-rank", 400),
    ]
    layer_map = chain(tmp_path / "wide", removed, *patches)
    export_model(str(tmp_path / "wide"), "decilm", tmp_path / "out", layer_map=layer_map)
    whole = ("attention", 512)
    kinds = [
        whole,
        ("none", 256),
        whole,
        ("none", 512),
        whole,
        ("linear", 256),
        ("none", 512),
        whole,
        ("attention", 0),
    ]
    assert block_kinds(tmp_path / "out", 1024) == [*kinds, ("linear", 256)]
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16, torch.float32}
    linear = tensors["model.layers.5.self_attn.linear_attn.weight"]
    stored = layer_map.patches.load()[2].tensors["weight"]
    assert np.array_equal(linear.numpy(), stored.astype(np.float32))  # bfloat16 would have rounded it
    assert tensors["model.layers.0.mlp.up_proj.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "case", "notation", "message"),
    [
        ("llama", "a run", "hf", "depth 2 has 1 patch, which format hf cannot hold: use --format decilm"),
        ("llama", "two runs", "mergekit", "depth 2 has 2 patches, which format mergekit cannot hold: use"),
        ("llama", "a run", "zeroed", "patch 2.attention to 3.mlp, of rank 32, has no room in format zeroed"),
        ("llama", "an attention", "zeroed", "patch 2.attention to 2.attention, of rank 3, has no room"),
        ("qwen2", "two runs", "zeroed", "the MLPs of Qwen2ForCausalLM have no biases here"),
        (
            "llama",
            "a scale",
            "decilm",
            "patch 2.attention to 2.mlp is a scale of the residual stream as it is",
        ),
        (
            "llama",
            "not normed",
            "zeroed",
            "patch 2.attention to 2.mlp is a map of the residual stream as it is",
        ),
        ("llama", "the first", "decilm", "patch 0.attention to 0.mlp stands before the first attention"),
    ],
)
def test_patches_are_never_lost_in_silence(name, case, notation, message, tiny_model, tmp_path):
    others = {
        "a scale": ((2,), [patch(*BLOCK, "scale", normed=False)]),
        "not normed": ((2,), [patch(*BLOCK, "low-rank", normed=False)]),
        "the first": ((0,), [patch((0, "attention"), (0, "mlp"))]),
    }
    removed, patches = (CASES | others)[case]
    path = tiny_model(name).path
    with pytest.raises(ConfigError, match=message):
        export_model(str(path), notation, tmp_path / "out", layer_map=chain(path, removed, *patches))
    assert list(tmp_path.iterdir()) == []


def test_leaving_patches_out_is_said(tiny_model, tmp_path):
    model = tiny_model("llama-gqa")
    layer_map = chain(model.path, *CASES["two runs"][:1], *CASES["two runs"][1])
    export_model(str(model.path), "hf", tmp_path / "out", layer_map=layer_map, patches="drop")
    assert torch.equal(logits(reload(tmp_path / "out")), model.without((1, 3)).logits(PROMPT))
    record = json.loads((tmp_path / "out/sleb.json").read_text())["patches"]
    assert (record["written"], record["number"], record["sha256"]) == ("drop", 2, layer_map.patches.sha256)
    assert "The depth's 2 patches are left out" in (tmp_path / "out/README.md").read_text()
    text = export_model(str(model.path), "removal-list", layer_map=layer_map, patches="drop")[1]
    assert text == "[1, 3]\n"
    first = export_model(str(model.path), "removal-list", layer_map=layer_map, depth=1)[1]  # which has none
    assert first == "[1]\n"
    with pytest.raises(ConfigError, match="patches 'lose' is unknown: choose keep"):
        export_model(str(model.path), "hf", tmp_path / "x", layer_map=layer_map, patches="lose")


def test_the_model_card_says_what_stands_where_blocks_stood(tiny_model, tmp_path):
    model = tiny_model("llama-gqa")
    export_model(str(model.path), "decilm", tmp_path / "out", layer_map=chain(model.path, *CASES["two runs"][:1],
                                                                            *CASES["two runs"][1]))  # fmt: skip
    assert "2 linear maps of the residual stream" in (tmp_path / "out/README.md").read_text()
    record = json.loads((tmp_path / "out/sleb.json").read_text())["patches"]
    assert (record["written"], record["num_parameters"]) == ("keep", 32 * 32 + 32 + 2 * 3 * 32 + 32)

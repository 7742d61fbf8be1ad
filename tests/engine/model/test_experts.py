"""Checkpoints of mixtures of experts: what is read of them, what is refused, and what is written."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sleb.engine.llm import LLM
from sleb.engine.model.allocation import all_sublayers, num_parameters
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.loader import load_weights
from sleb.engine.model.weights import DecoderWeights, num_bytes
from sleb.errors import ConfigError, ModelError
from sleb.formats.exporting import export_model
from sleb.layer_map.layer_map import LayerMap, Patches, Unit

CPU = torch.device("cpu")
PROMPT = torch.randint(3, 96, (21,), generator=torch.Generator().manual_seed(7)).tolist()


def load(folder: Path) -> DecoderWeights:
    spec = resolve_spec(folder)
    return load_weights(folder, spec, all_sublayers(spec), torch.float32, CPU)


def score(folder: Path) -> torch.Tensor:
    return LLM(str(folder), dtype="float32", device="cpu", kernels="torch", page_size=16).score(PROMPT)


# Tiny Qwen3-MoE: hidden 32, four heads of 16 and two for keys, four experts of 24; block 1 has an MLP of 48 instead.
ATTENTION = (4 + 2 * 2) * 16 * 32 + 32 * 4 * 16 + 2 * 16 + 32
MIXTURE = 4 * 3 * 24 * 32 + 4 * 32 + 32
DENSE = 3 * 48 * 32 + 32


def without_block(path: Path, block: int, folder: Path) -> Path:
    """A copy in which nothing of that block can be read: its tensors are NaN."""
    shutil.copytree(path, folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{block}."
    spoilt = {
        name: value * torch.nan if name.startswith(prefix) else value for name, value in tensors.items()
    }
    save_file(spoilt, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_removed_block_takes_its_experts_along(tiny_model, tmp_path):
    model = tiny_model("qwen3-moe")
    spec = resolve_spec(model.path)
    assert num_parameters(spec, Unit(0)) == ATTENTION + MIXTURE
    assert num_parameters(spec, Unit(1)) == ATTENTION + DENSE
    assert num_parameters(spec, Unit(2, "mlp")) == MIXTURE
    folder = without_block(model.path, 2, tmp_path / "spoilt")
    whole = num_bytes(load(model.path))
    keep = {each for each in all_sublayers(spec) if each[0] != 2}
    pruned = load_weights(folder, spec, keep, torch.float32, CPU)
    assert num_bytes(pruned) == whole - 4 * (ATTENTION + MIXTURE)
    assert all(bool(part.up.weight.isfinite().all()) for part in pruned.mlp.values())
    assert load(folder).mlp[2].up.weight.isnan().all()  # where it is kept it is read


@pytest.mark.parametrize(
    ("name", "removed"),
    [
        ("qwen3-moe", (3, 0)),
        ("qwen2-moe", (1, 2)),
        ("ernie4.5-moe", (2, 4)),
        ("gpt-oss", (0,)),
        ("granite-moe", (4,)),
    ],
)
def test_exports_are_the_model_without_its_blocks(name, removed, tiny_model, tmp_path):
    """By transformers, which tells by a block's number whether it has experts, and by our own engine."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(name)
    layer_map = LayerMap(name, None, 5, removed=tuple(map(Unit, removed)))
    export_model(str(model.path), "hf", tmp_path / "hf", layer_map=layer_map, depth=len(removed))
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    expected = model.without(removed).logits(PROMPT)
    with torch.inference_mode():
        found = loaded.eval()(torch.tensor([PROMPT]), use_cache=False).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    following = torch.tensor(PROMPT[1:])[:, None]
    ours = score(tmp_path / "hf")
    torch.testing.assert_close(
        ours, expected.log_softmax(-1)[:-1].gather(1, following)[:, 0], atol=1e-4, rtol=0
    )


def test_what_config_json_cannot_say_is_refused(tiny_model, tmp_path):
    """Experts in every other block, but by a first and a last number: written with zeros, but not without blocks."""
    model = tiny_model("ernie4.5-moe")
    folder = shutil.copytree(model.path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"moe_layer_interval": 2}
    (folder / "config.json").write_text(json.dumps(config))
    spec = resolve_spec(folder)
    assert spec.experts is not None and spec.experts.blocks == (False, True, False, True, False)
    from sleb.formats.model_config import compact_config

    with pytest.raises(ConfigError, match="neighbouring blocks"):
        compact_config(config, spec, (0, 1, 2, 3))
    assert compact_config(config, spec, (0, 1, 3, 4))["moe_layer_end_index"] == 2


@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss", "granite-moe"])
def test_zeroed_exports_add_nothing_where_an_mlp_is_removed(name, tiny_model, make_llm, tmp_path):
    """A block without its MLP, here, is the one whose experts, and the one that all tokens get, give zero."""
    model, units = tiny_model(name), (Unit(1, "mlp"), Unit(3, "attention"))
    layer_map = LayerMap(name, None, 5, removed=units)
    export_model(str(model.path), "zeroed", tmp_path / "out", layer_map=layer_map, depth=2)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(load_file(model.path / "model.safetensors"))
    zeroed = score(tmp_path / "out")
    removed = make_llm(model, units, page_size=16).score(PROMPT)
    torch.testing.assert_close(zeroed, removed, atol=1e-5, rtol=0)


def test_formats_without_a_place_for_experts_refuse_them(tiny_model, random_patch, tmp_path):
    model = tiny_model("mixtral")
    parts = LayerMap("mixtral", None, 5, removed=(Unit(1, "mlp"),))
    with pytest.raises(ConfigError, match="mixtures of experts, which mergekit"):
        export_model(str(model.path), "mergekit", layer_map=parts, depth=1)
    with pytest.raises(ConfigError, match="decilm is a Llama"):
        export_model(str(model.path), "decilm", tmp_path / "decilm", layer_map=parts, depth=1)
    patch = random_patch(32, (2, "attention"), (2, "mlp"), 1)
    patched = LayerMap("mixtral", None, 5, removed=(Unit(2),), patches=Patches.of([patch]))
    with pytest.raises(ConfigError, match="MLPs are mixtures of experts"):
        export_model(str(model.path), "zeroed", tmp_path / "zeroed", layer_map=patched, depth=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, "gets 5 of 4 experts"),
        ({"num_local_experts": 4096}, "num_local_experts is 4096; it must be an integer from 1 to 1024"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers is"),
        ({"num_local_experts": 1024, "num_hidden_layers": 100}, "100 blocks of 1024 experts"),
        ({"num_local_experts": 5}, "lacks model.layers.0.mlp.experts.4"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_numbers_get_a_line(change, message, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("qwen3-moe").path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_gpt_oss_as_published(tiny_model, tmp_path):
    """Its experts in MXFP4 (OCP Microscaling Formats 1.0): four bits a number, and a power of two for every 32."""
    model = tiny_model("gpt-oss")
    folder, generator = shutil.copytree(model.path, tmp_path / "model"), torch.Generator().manual_seed(2)
    tensors, reference = load_file(folder / "model.safetensors"), copy.deepcopy(model.model)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        number, inputs, outputs = tensors.pop(name).shape
        shape = (number, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, shape, dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        nibbles = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(3).long()
        plain = torch.cat((values, -values))[nibbles] * 2.0 ** (scales[..., None].float() - 127)
        reference.get_parameter(name).data.copy_(plain.flatten(2).transpose(1, 2))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    expected = type(model)("reference", folder, reference).logprobs(PROMPT)[:-1]
    following = torch.tensor(PROMPT[1:])[:, None]
    torch.testing.assert_close(score(folder), expected.gather(1, following)[:, 0], atol=1e-4, rtol=0)


def test_other_clamps_than_gpt_oss_has_are_refused(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("gpt-oss").path, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"swiglu_limit": 5.0}))
    with pytest.raises(ModelError, match=r"swiglu_limit is 5.0; it must be 7.0"):
        resolve_spec(folder)

"""Quantised checkpoints: each format written from its definition, against the model of its dequantised matrices.

A writer draws the codes, not the weights, packs them one by one as the format says, and gives the matrix that they
stand for, in float64.
"""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sleb.engine.llm import LLM
from sleb.engine.model.allocation import all_sublayers
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.checkpoint import open_checkpoint
from sleb.engine.model.loader import load_weights
from sleb.errors import ConfigError, ModelError
from sleb.formats.exporting import export_model
from sleb.kernels.quantization import GroupedWeight, Groups, Int8Weight
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.models.resolve import resolve_model

TOKENS = [5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 50]
HIDDEN, INNER = 128, 256
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
NF4 = np.float32(np.linspace(-1, 1, 16) ** 3)  # any table will do: the file has it


def pack(values, bits, axis):
    """Unsigned numbers along `axis`, the lowest bits first, in words of 32 bits."""
    values, num = np.moveaxis(np.asarray(values, np.int64), axis, -1), 32 // bits
    padded = np.zeros((*values.shape[:-1], -(-values.shape[-1] // num) * num), np.int64)
    padded[..., : values.shape[-1]] = values
    out = np.zeros((*padded.shape[:-1], padded.shape[-1] // num), np.uint32)
    for place in range(num):
        out |= (padded[..., place::num] << (bits * place)).astype(np.uint32)
    return torch.from_numpy(np.moveaxis(out, -1, axis).copy().view(np.int32))


def half(values, dtype=torch.float16):
    """Values as the checkpoint rounds them: the tensor, and what it holds."""
    tensor = torch.tensor(values).to(dtype)
    return tensor, tensor.double().numpy()


class Writer:
    """Draws the numbers of a matrix [n, k]."""

    def __init__(self, n, k, rng):
        self.n, self.k, self.rng = n, k, rng

    def codes(self, bits, size, low=0):
        """q [n, k], a scale for each `size` inputs [n, k / size], and zero points between `low` and the highest."""
        groups = self.k // size
        q = self.rng.integers(0, 1 << bits, (self.n, self.k))
        scale = self.rng.uniform(0.5, 1.0, (self.n, groups)) * 0.5 / (1 << bits)
        return q, scale, self.rng.integers(low, 1 << bits, (self.n, groups))


class Rounder(Writer):
    """The numbers of a weight that there is, rounded to the nearest."""

    def __init__(self, weight):
        super().__init__(*weight.shape, None)
        self.weight = weight.double().numpy()

    def codes(self, bits, size, low=0):
        groups, top = self.weight.reshape(self.n, -1, size), (1 << bits) - 1
        least, most = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
        scale = ((most - least) / top).astype(np.float16).astype(np.float64)
        zero = np.clip(np.rint(-least / scale), low, top).astype(np.int64)
        q = np.clip(np.rint(groups / scale[..., None]) + zero[..., None], 0, top).astype(np.int64)
        return q.reshape(self.n, -1), scale, zero


def wide(values, size):
    return np.repeat(values, size, axis=1)


def awq(w, size=32):
    q, scale, zero = w.codes(4, size)
    tensor, scale = half(scale)
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble i of a word holds column order[i] of its eight

    def packed(columns):  # [rows, n]
        blocks = columns.reshape(len(columns), -1, 8)[..., order]
        return pack(blocks.reshape(len(columns), -1), 4, 1)

    parts = {"qweight": packed(q.T), "qzeros": packed(zero.T), "scales": tensor.t().contiguous()}
    return parts, wide(scale, size) * (q - wide(zero, size))


def gptq(w, bits=4, size=64, v2=False, order=None):
    q, scale, zero = w.codes(bits, size, 1)
    tensor, scale = half(scale)
    index = np.arange(w.k) // size if order is None else order(w.k) // size
    parts = {
        "qweight": pack(q.T, bits, 0),
        "qzeros": pack(zero.T - (0 if v2 else 1), bits, 1),
        "scales": tensor.t().contiguous(),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    return parts, scale[:, index] * (q - zero[:, index])


def compressed(w, bits=4, size=128, zeros=False):
    q, scale, zero = w.codes(bits, size)
    tensor, scale = half(scale, torch.bfloat16)
    parts = {
        "weight_packed": pack(q, bits, 1),
        "weight_scale": tensor,
        "weight_shape": torch.tensor([w.n, w.k]),
    }
    if zeros:
        parts["weight_zero_point"] = pack(zero, bits, 0)
    return parts, wide(scale, size) * (q - (wide(zero, size) if zeros else 1 << bits - 1))


def bytes_by_row(w):
    q = w.rng.integers(-128, 128, (w.n, w.k))
    tensor, scale = half(w.rng.uniform(0.5, 1.0, (w.n, 1)) * 0.002, torch.bfloat16)
    return {"weight": torch.from_numpy(q.astype(np.int8)), "weight_scale": tensor}, q * scale


def fp8(w, scale_shape, static=False):
    weight = torch.from_numpy(w.rng.normal(0, 100, (w.n, w.k))).to(torch.float8_e4m3fn)
    tensor, scale = half(w.rng.uniform(0.5, 1.0, scale_shape(w)) * 0.001, torch.float32)
    parts = {"weight": weight, "weight_scale": tensor}
    if static:
        parts["input_scale"] = torch.ones(1)
    return parts, weight.double().numpy() * scale


def fp8_blocks(w):
    shape = -(-w.n // 48), -(-w.k // 32)
    drawn = w.rng.uniform(0.5, 1.0, shape) * 0.001 if w.rng else np.full(shape, np.abs(w.weight).max() / 448)
    tensor, scale = half(drawn, torch.float32)
    each = np.repeat(np.repeat(scale, 48, 0)[: w.n], 32, 1)[:, : w.k]
    weight = torch.from_numpy(w.rng.normal(0, 100, (w.n, w.k)) if w.rng else w.weight / each).to(
        torch.float8_e4m3fn
    )
    return {"weight": weight, "weight_scale_inv": tensor}, weight.double().numpy() * each


def bnb4(w, kind="nf4", nested=False):
    block, total = 64, w.n * w.k
    q = w.rng.integers(0, 16, total)
    state = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": [w.n, w.k]}
    parts = {
        "weight": torch.from_numpy((q[0::2] << 4 | q[1::2]).astype(np.uint8))[:, None],
        "weight.quant_map": torch.from_numpy(NF4.copy()),
    }
    if nested:
        inner = w.rng.integers(0, 256, total // block)
        table, tops = (
            w.rng.uniform(0, 1, 256).astype(np.float32),
            w.rng.uniform(0, 0.1, -(-len(inner) // 256)),
        )
        scale = table[inner] * np.repeat(tops.astype(np.float32), 256)[: len(inner)].astype(np.float64) + 0.05
        state |= {"nested_blocksize": 256, "nested_offset": 0.05, "nested_dtype": "float32"}
        parts["weight.absmax"] = torch.from_numpy(inner.astype(np.uint8))
        parts["weight.nested_absmax"] = torch.from_numpy(tops.astype(np.float32))
        parts["weight.nested_quant_map"] = torch.from_numpy(table)
    else:
        parts["weight.absmax"], scale = half(w.rng.uniform(0.05, 0.2, total // block), torch.float32)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8).copy()
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.from_numpy(text)
    return parts, (NF4[q].astype(np.float64) * np.repeat(scale, block)).reshape(w.n, w.k)


def bnb8(w):
    q = w.rng.integers(-127, 128, (w.n, w.k))
    tensor, top = half(w.rng.uniform(0.1, 0.3, w.n), torch.float32)
    parts = {"weight": torch.from_numpy(q.astype(np.int8)), "SCB": tensor}
    return parts | {"weight_format": torch.tensor(0, dtype=torch.uint8)}, q * top[:, None] / 127


def mlx(w, bits=4, size=64):
    q, scale, _ = w.codes(bits, size)
    scales, scale = half(scale, torch.bfloat16)
    biases, bias = half(-wide(scale, 1) * w.rng.uniform(0.3, 0.6, scale.shape) * (1 << bits), torch.bfloat16)
    parts = {"weight": pack(q, bits, 1).view(torch.uint32), "scales": scales, "biases": biases}
    return parts, wide(scale, size) * q + wide(bias, size)


def e2m1(q):
    return np.where(q & 8, -1.0, 1.0) * np.array(E2M1)[q & 7]


def nvfp4(w, compressed=False):
    q = w.rng.integers(0, 16, (w.n, w.k))
    scale = torch.from_numpy(w.rng.uniform(0.5, 2.0, (w.n, w.k // 16))).to(torch.float8_e4m3fn)
    packed = torch.from_numpy((q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8))
    whole = np.float32(32.0 if compressed else 1 / 32)
    values = e2m1(q) * wide(scale.double().numpy(), 16) * (1 / whole if compressed else whole)
    if compressed:
        parts = {"weight_packed": packed, "weight_global_scale": torch.tensor([whole])}
    else:
        parts = {"weight": packed, "weight_scale_2": torch.tensor(whole), "input_scale": torch.tensor(1.0)}
    return parts | {"weight_scale": scale}, values


def quantization_config(method, **values):
    return {"quantization_config": {"quant_method": method, **values}}


def shuffled(k):
    return np.random.default_rng(k).permutation(k)


W8A8 = quantization_config("compressed-tensors", format="int-quantized", ignore=["lm_head"])
FLOATS = quantization_config("compressed-tensors", format="float-quantized")
PACKED = quantization_config("compressed-tensors", format="pack-quantized")
BNB = quantization_config("bitsandbytes", load_in_4bit=True)
# The writer, the config's words, and what `--weights auto` holds the matrices in; None: wider numbers.
FORMATS = {
    "awq 32": (awq, quantization_config("awq", bits=4, group_size=32, version="gemm"), Groups(4, 32, "zero")),
    "awq 128": (
        lambda w: awq(w, 128),
        quantization_config("awq", bits=4, group_size=128, zero_point=True),
        Groups(4, 128, "zero"),
    ),
    "gptq": (gptq, quantization_config("gptq", bits=4, group_size=64, desc_act=False), Groups(4, 64, "zero")),
    "gptq v2, 8 bits, one group": (
        lambda w: gptq(w, 8, w.k, v2=True),
        quantization_config("gptq", bits=8, group_size=-1, checkpoint_format="gptq_v2"),
        "rows",
    ),
    "gptq in the order of activations": (
        lambda w: gptq(w, order=shuffled),
        quantization_config("gptq", bits=4, group_size=64, desc_act=True),
        None,
    ),
    "compressed w4a16": (compressed, PACKED, Groups(4, 128, "middle")),
    "compressed w8a16, zero points": (
        lambda w: compressed(w, 8, 64, zeros=True),
        PACKED,
        Groups(8, 64, "zero"),
    ),
    "compressed w8a8": (bytes_by_row, W8A8, Int8Weight),
    "compressed fp8": (lambda w: fp8(w, lambda w: (w.n, 1)), FLOATS, None),
    "fp8, one scale, static": (
        lambda w: fp8(w, lambda w: (), static=True),
        quantization_config("fp8", activation_scheme="static"),
        None,
    ),
    "fp8 in blocks": (fp8_blocks, quantization_config("fp8", fmt="e4m3", weight_block_size=[48, 32]), None),
    "fbgemm": (lambda w: fp8(w, lambda w: (w.n, 1)), quantization_config("fbgemm_fp8"), None),
    "bitsandbytes nf4": (bnb4, BNB, None),
    "bitsandbytes fp4, nested": (lambda w: bnb4(w, "fp4", nested=True), BNB, None),
    "bitsandbytes int8": (bnb8, quantization_config("bitsandbytes", load_in_8bit=True), Int8Weight),
    "mlx": (mlx, {"quantization": {"group_size": 64, "bits": 4}}, Groups(4, 64, "minimum")),
    "mlx 8": (
        lambda w: mlx(w, 8, 32),
        {"quantization": {"group_size": 32, "bits": 8}},
        Groups(8, 32, "minimum"),
    ),
    "nvfp4": (nvfp4, quantization_config("modelopt", quant_algo="NVFP4"), None),
    "nvfp4 of compressed-tensors": (
        lambda w: nvfp4(w, compressed=True),
        quantization_config("compressed-tensors", format="nvfp4-pack-quantized"),
        None,
    ),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a Llama that has room for groups of 128, and its model."""
    torch.manual_seed(1)
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (1 if parameter.dim() == 1 else 0))
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def quantize(plain, tmp_path):
    """quantize(name) -> the folder of the model in that format, and transformers' model of what it stands for."""

    def make(name, skip=()):
        folder, model = plain
        write, config, _ = FORMATS[name]
        rng, tensors = np.random.default_rng(len(name)), load_file(folder / "model.safetensors")
        state = {}
        for key in [key for key in tensors if key.endswith("proj.weight") and key not in skip]:
            parts, values = write(Writer(*tensors.pop(key).shape, rng))
            tensors |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
            state[key] = torch.from_numpy(values).float()
        target = tmp_path / "model"
        target.mkdir()
        save_file(tensors, target / "model.safetensors")
        words = json.loads((folder / "config.json").read_text()) | config
        (target / "config.json").write_text(json.dumps(words))
        return target, {**model.state_dict(), **state}

    return make


def logprobs(model, state):
    """transformers' log-probabilities of TOKENS[1:] with the weights of `state`."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    with torch.inference_mode():
        scores = model(torch.tensor([TOKENS])).logits[0].float().log_softmax(-1)
    model.load_state_dict(before)
    return scores[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None]).squeeze(1)


def served(folder):
    """As `make_llm` takes a model."""
    return SimpleNamespace(path=folder, num_blocks=2)


def load(folder, dtype=torch.float32, as_stored=True):
    spec = resolve_spec(folder)
    device = torch.device("cpu")
    return load_weights(folder, spec, all_sublayers(spec), dtype, device, as_stored=as_stored)


def matrices(weights):
    parts = [*weights.attention.values(), *weights.mlp.values()]
    return [
        getattr(part, name).weight
        for part in parts
        for name in ("qkv", "out", "up", "down")
        if hasattr(part, name)
    ]


def configure(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for method in ("quantization_config", "quantization"):
        if method in config:
            config[method] = {k: v for k, v in (config[method] | changes).items() if v is not None}
    file.write_text(json.dumps(config))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_the_model_of_its_dequantised_matrices(name, quantize, plain, make_llm, caplog):
    folder, state = quantize(name)
    with caplog.at_level(logging.WARNING, "sleb"):
        llm = make_llm(served(folder), max_model_len=24)
    expected = logprobs(plain[1], state)
    torch.testing.assert_close(llm.score(TOKENS), expected, atol=1e-4, rtol=0)
    kind, weights = FORMATS[name][2], matrices(load(folder))
    kinds = [weight.groups if isinstance(weight, GroupedWeight) else type(weight) for weight in weights]
    if kind == "rows":
        assert kinds == [Groups(8, weight.shape[1], "zero") for weight in weights]
    else:
        assert set(kinds) == {kind or torch.Tensor}
    assert ("held as float32" in caplog.text) == (kind is None)


@pytest.mark.parametrize("name", ["awq 32", "mlx 8", "fp8 in blocks", "compressed w8a8"])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_other_formats_are_made_of_its_numbers(
    name, weights, quantize, plain, make_llm, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    folder, state = quantize(name)
    scores = make_llm(served(folder), max_model_len=24, weights=weights).score(TOKENS)
    expected = logprobs(plain[1], state)
    torch.testing.assert_close(scores, expected, atol=1e-4 if weights == "float32" else 0.3, rtol=0)


def test_memory_is_what_the_bits_say(quantize):
    """Of N outputs and K inputs: four bits each, and for 128 of them a scale and a zero point of 16 bits."""
    folder, _ = quantize("awq 128")
    numbers = sum(weight.shape[0] * weight.shape[1] for weight in matrices(load(folder)))
    assert sum(weight.num_bytes for weight in matrices(load(folder))) == numbers * (4 + 32 / 128) / 8
    assert sum(weight.nbytes for weight in matrices(load(folder, as_stored=False))) == numbers * 4


def test_modules_that_a_tool_left_out_stay_plain(quantize, plain, make_llm):
    """One of the three that a matrix is fused of: the whole of it has wider numbers."""
    skip = ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight")
    folder, state = quantize("gptq", skip)
    scores = make_llm(served(folder), max_model_len=24).score(TOKENS)
    torch.testing.assert_close(scores, logprobs(plain[1], state), atol=1e-4, rtol=0)
    weights = load(folder)
    assert isinstance(weights.attention[0].qkv.weight, GroupedWeight)
    assert isinstance(weights.attention[1].qkv.weight, torch.Tensor)
    assert isinstance(weights.mlp[0].down.weight, torch.Tensor)


@pytest.mark.parametrize("name", ["awq 128", "compressed w4a16", "mlx 8", "compressed w8a8", "gptq"])
def test_the_c_kernels_compute_with_its_bits(name, quantize, plain, make_llm):
    """Their activations are rounded to bytes, and nothing else."""
    folder, state = quantize(name)
    llm = make_llm(served(folder), max_model_len=24, page_size=16, kernels="cpu")
    expected = logprobs(plain[1], state)
    assert (llm.score(TOKENS) - expected).abs().mean() < 0.15


REFUSED = {
    "bits": ("gptq", {"bits": 3}, None, "bits is 3; it must be 4 or 8"),
    "a version of awq": ("awq 32", {"version": "gemv"}, None, 'version is "gemv"; it must be gemm'),
    "a group size that is not the scales'": (
        "awq 32",
        {"group_size": 64},
        None,
        "groups of 64 of 256 inputs",
    ),
    "a group of 24": ("mlx", {"group_size": 24}, None, "group_size is 24"),
    "no group size": ("gptq", {"group_size": None}, None, "group_size is missing"),
    "a marlin layout": ("gptq", {"checkpoint_format": "marlin"}, None, "one of gptq, gptq_v2"),
    "blocks of words": ("fp8 in blocks", {"weight_block_size": [0, 1]}, None, "two sizes from 1 to 65536"),
    "another mode": ("mlx", {"mode": "mxfp4"}, None, 'mode is "mxfp4"; it must be affine'),
    "scales of another shape": ("awq 32", {}, ("scales", lambda x: x[:, 1:]), "shape (any, 128)"),
    "no zero points": ("gptq", {}, ("qzeros", None), "is there without its qzeros"),
    "columns out of order": ("gptq", {"desc_act": True}, ("g_idx", lambda x: x + 7), "of groups from 0 to 3"),
    "one group for all columns": ("gptq", {}, ("g_idx", lambda x: x[0]), "and shape (256)"),
    "no scale for all": ("nvfp4", {}, ("weight_scale_2", None), "is there without its weight_scale_2"),
    "no bytes beside scales": ("nvfp4", {}, ("proj.weight", None), "is there without its weight"),
    "scales in bytes": (
        "compressed w8a8",
        {},
        ("weight_scale", lambda x: x.to(torch.int8)),
        "weight_scale is I8",
    ),
    "words that are too many": (
        "compressed w4a16",
        {},
        ("weight_packed", lambda x: x[:, 1:]),
        "in 4 or 8 bits",
    ),
    "a state that is no JSON": (
        "bitsandbytes nf4",
        {},
        ("bitsandbytes__nf4", lambda x: x[1:]),
        "read as JSON",
    ),
    "more columns than the config's": (
        "awq 32",
        {},
        ("qweight", lambda x: torch.cat((x, x))),
        "groups of 32 of 512",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(case, quantize):
    name, config, change, wanted = REFUSED[case]
    folder, _ = quantize(name)
    configure(folder, **config)
    if change is not None:
        key = next(key for key in load_file(folder / "model.safetensors") if key.endswith(change[0]))

        def apply(tensors):
            tensor = tensors.pop(key)
            if change[1] is not None:
                tensors[key] = change[1](tensor).contiguous()

        rewrite(folder, apply)
    with pytest.raises(ModelError) as caught:
        open_checkpoint(folder, resolve_spec(folder))
    assert wanted in str(caught.value) and "\n" not in str(caught.value)


def test_an_order_that_the_config_denies_is_found_as_it_is_read(quantize):
    folder, _ = quantize("gptq in the order of activations")
    configure(folder, desc_act=False)
    with pytest.raises(ModelError, match="in order, as desc_act"):
        load(folder)


def test_experts_in_mxfp4(tmp_path):
    """The matrices of gpt-oss's experts, which transformers has transposed."""
    from sleb.engine.model.quantized.find import quantized_tensors
    from sleb.models.weight_files import stored_tensors

    rng = np.random.default_rng(0)
    q, power = rng.integers(0, 16, (3, 6, 2, 32)), rng.integers(120, 134, (3, 6, 2))
    blocks = (q[..., 0::2] | q[..., 1::2] << 4).astype(np.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{name}_blocks": torch.from_numpy(blocks),
        f"{name}_scales": torch.from_numpy(power.astype(np.uint8)),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(quantization_config("mxfp4")))
    found = quantized_tensors(tmp_path, stored_tensors(tmp_path))
    assert list(found) == [name] and found[name].shape == (3, 64, 6)
    expected = (e2m1(q) * 2.0 ** (power[..., None] - 127)).reshape(3, 6, 64).transpose(0, 2, 1)
    assert np.array_equal(found[name].read().double().numpy(), expected)


@pytest.mark.parametrize("name", ["awq 32", "bitsandbytes nf4", "compressed w8a8"])
def test_an_exported_checkpoint_keeps_the_bits(name, quantize, make_llm, tmp_path):
    folder, _ = quantize(name)
    layer_map = LayerMap(folder.name, None, 2, removed=(Unit(0),))
    export_model(str(folder), "hf", tmp_path / "hf", layer_map=layer_map)
    pruned = make_llm(served(folder), (0,), max_model_len=24).score(TOKENS)
    alone = make_llm(SimpleNamespace(path=tmp_path / "hf", num_blocks=1), max_model_len=24).score(TOKENS)
    assert torch.equal(alone, pruned)
    with pytest.raises(ConfigError, match="format zeroed would change them"):
        export_model(str(folder), "zeroed", tmp_path / "zeroed", layer_map=layer_map)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "write", "bits"),
    [("awq 32", lambda w: awq(w, 32), 5), ("gptq", gptq, 4.5), ("fp8 in blocks", fp8_blocks, 16)],
)
def test_copies_of_smollm2(name, write, bits, tmp_path):
    """Four bits and a scale and a zero point of 16 for 32, or 64; FP8 is held in bfloat16, as is told."""
    source = resolve_model("smollm2").path
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    folder = tmp_path / "model"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    tensors = load_file(source / "model.safetensors")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("proj.weight"):
                parts, values = write(Rounder(tensors.pop(key)))
                tensors |= {key.removesuffix("weight") + end: part for end, part in parts.items()}
                parameter.copy_(torch.from_numpy(values))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | FORMATS[name][1]
    (folder / "config.json").write_text(json.dumps(config))
    tokens = list(range(1000, 1064))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0].log_softmax(-1)[:-1]
    expected = expected.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    options = {"kernels": "torch", "device": "cpu", "max_model_len": 128}
    scores = LLM(folder, "none", dtype="float32", **options).score(tokens)
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=0)
    weights = matrices(load(folder, torch.bfloat16))
    numbers = sum(weight.shape[0] * weight.shape[1] for weight in weights)
    sizes = [each.nbytes if isinstance(each, torch.Tensor) else each.num_bytes for each in weights]
    assert sum(sizes) == numbers * bits / 8

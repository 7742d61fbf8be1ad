"""Which tensors a folder's model has: against transformers, in float32, on the same folder; and what is refused."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sleb.engine.llm import LLM
from sleb.engine.model.allocation import all_sublayers
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.checkpoint import open_checkpoint
from sleb.engine.model.loader import load_weights
from sleb.errors import ModelError
from sleb.formats.exporting import export_model
from sleb.layer_map.layer_map import LayerMap, Unit
from sleb.models.weight_files import INDEX, SINGLE, stored_tensors

TOKENS = [5, 17, 3, 88, 41, 9, 60, 2, 33, 71, 12, 50]
NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def copied(tiny_model, tmp_path):
    """copied(name): a copy of that tiny model's folder, to be changed."""
    return lambda name: Path(shutil.copytree(tiny_model(name).path, tmp_path / name))


def rewrite(folder, change):
    """The folder's tensors, changed by a function, written back."""
    tensors = load_file(folder / SINGLE)
    tensors = change(tensors) or tensors
    save_file(tensors, folder / SINGLE)


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def split(folder, parts, index=True):
    """The one file as several: parts(name) is the number of the file that a tensor goes to."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {}
    for name, tensor in tensors.items():
        files.setdefault(f"model-{parts(name):05}-of-00002.safetensors", {})[name] = tensor
    for name, part in files.items():
        save_file(part, folder / name)
    if index:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def by_block(name):
    return 1 if ".layers." in name else 2


def scores(folder):
    from sleb import LLM

    return LLM(folder, dtype="float32", device="cpu").score(TOKENS)


def reference(folder):
    """transformers' log-probabilities of TOKENS[1:]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logprobs = model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


def equals_transformers(folder):
    return bool((scores(folder) - reference(folder)).abs().max() < 1e-4)


def message(folder):
    """What `load` refuses the folder with: one line, and a short one."""
    spec = resolve_spec(folder)
    with pytest.raises(ModelError) as caught:
        load_weights(folder, spec, all_sublayers(spec), torch.float32, torch.device("cpu"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800 and "download" not in text
    return text


class TestWhichFiles:
    def other(self, folder, name, names=None):
        """Five of the model's tensors, with other values, in another file."""
        tensors = load_file(folder / SINGLE)
        save_file({each: -tensors[each] for each in (names or list(tensors)[:5])}, folder / name)

    @pytest.mark.parametrize(
        "name", ["training_state.safetensors", "consolidated.safetensors", "zz.safetensors"]
    )
    def test_a_file_beside_the_models_own_is_not_read(self, name, copied):
        folder = copied("llama-gqa")
        expected = scores(folder)
        self.other(folder, name)
        assert torch.equal(scores(folder), expected) and equals_transformers(folder)

    def test_mistrals_own_layout_beside_it(self, copied):
        folder = copied("mistral")
        tensors = load_file(folder / SINGLE)
        save_file(
            {"tok_embeddings.weight": tensors["model.embed_tokens.weight"]},
            folder / "consolidated.safetensors",
        )
        assert equals_transformers(folder)

    def test_model_safetensors_wins_over_an_index_as_in_transformers(self, copied):
        folder = copied("llama-gqa")
        whole = load_file(folder / SINGLE)
        split(folder, by_block)
        save_file({name: tensor * 0.9 for name, tensor in whole.items()}, folder / SINGLE)
        assert equals_transformers(folder)

    def test_files_that_the_index_does_not_name_are_not_read(self, copied):
        folder = copied("llama-gqa")
        self.other(folder, "later.safetensors")
        shutil.move(folder / "later.safetensors", folder / "kept")
        split(folder, by_block)
        shutil.move(folder / "kept", folder / "model-00003-of-00003.safetensors")
        assert equals_transformers(folder)

    def test_a_tied_head_that_is_in_the_index_alone(self, copied):
        folder = copied("llama-tied")
        split(folder, by_block)
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
        (folder / INDEX).write_text(json.dumps(index))
        assert equals_transformers(folder)
        index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
        (folder / INDEX).write_text(json.dumps(index))
        assert "of one checkpoint" in message(folder)

    @pytest.mark.parametrize("beside", [(), ("training_state.safetensors", "optimizer.safetensors")])
    def test_the_only_file(self, beside, copied):
        folder = copied("llama-gqa")
        expected = scores(folder)
        for name in beside:
            self.other(folder, name)
        (folder / SINGLE).rename(folder / "weights.safetensors")
        assert torch.equal(scores(folder), expected)

    def test_numbered_files_without_an_index(self, copied):
        folder = copied("llama-gqa")
        expected = scores(folder)
        split(folder, by_block, index=False)
        assert torch.equal(scores(folder), expected)
        (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00002-of-00003.safetensors")
        assert "2 .safetensors files" in message(folder) and INDEX in message(folder)

    def test_several_files_and_no_index(self, copied):
        folder = copied("llama-gqa")
        (folder / SINGLE).rename(folder / "one.safetensors")
        shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
        assert "2 .safetensors files, one.safetensors, two.safetensors" in message(folder)

    def test_only_another_layout(self, copied):
        folder = copied("llama-gqa")
        (folder / SINGLE).rename(folder / "consolidated.safetensors")
        assert "only consolidated.safetensors" in message(folder)

    def test_a_name_in_two_files(self, copied):
        folder = copied("llama-gqa")
        tensors = load_file(folder / SINGLE)
        split(folder, by_block)
        second = folder / "model-00002-of-00002.safetensors"
        save_file(load_file(second) | {NAME: tensors[NAME] * 2}, second)
        assert f'holds "{NAME}" twice' in message(folder)

    def test_one_tensor_under_two_names(self, copied):
        folder = copied("opt")
        name = "decoder.layers.1.fc1.weight"
        rewrite(folder, lambda tensors: tensors.update({name: tensors[f"model.{name}"] * 2}))
        assert f"two names, {name} and model.{name}" in message(folder)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "prefix", "stored"),
        [
            ("opt", "model.decoder.", "decoder."),
            ("opt-350m", "model.decoder.", "decoder."),
            ("llama-tied", "model.", ""),
            ("smollm3-interval", "model.", ""),
        ],
    )
    def test_without_the_outer_prefix(self, name, prefix, stored, copied):
        folder = copied(name)
        rewrite(
            folder,
            lambda tensors: {stored + each.removeprefix(prefix): part for each, part in tensors.items()},
        )
        assert equals_transformers(folder)

    @pytest.mark.parametrize("stored", ["", "model.", "model.model.decoder."])
    def test_other_prefixes_give_the_same_model(self, stored, copied):
        folder = copied("opt")
        expected = scores(folder)
        rewrite(
            folder,
            lambda tensors: {
                stored + each.removeprefix("model.decoder."): part for each, part in tensors.items()
            },
        )
        assert torch.equal(scores(folder), expected)

    def test_an_untied_model_without_prefix_still_needs_its_head(self, copied):
        folder = copied("llama-gqa")
        rewrite(
            folder,
            lambda tensors: {
                each.removeprefix("model."): part for each, part in tensors.items() if "head" not in each
            },
        )
        text = message(folder)
        assert "lacks lm_head.weight" in text and "tie_word_embeddings" in text


class TestTied:
    @pytest.mark.parametrize("name", ["opt", "opt-350m", "llama-tied"])
    def test_a_head_of_other_values_is_used_and_said_once(self, name, copied, caplog):
        folder = copied(name)
        embed = next(each for each in load_file(folder / SINGLE) if "embed_tokens" in each)
        before = scores(folder)
        rewrite(
            folder, lambda tensors: tensors.update({"lm_head.weight": tensors[embed].flip(0).contiguous()})
        )
        with caplog.at_level(logging.WARNING, "sleb"):
            after = scores(folder)
        assert len(caplog.records) == 1 and "lm_head.weight is stored with values of its own" in caplog.text
        assert (after - before).abs().max() > 0.1 and equals_transformers(folder)

    def test_one_value_makes_a_head_of_its_own(self, copied):
        folder = copied("llama-tied")

        def change(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][-1, -1] += 1

        rewrite(folder, change)
        assert not open_checkpoint(folder, resolve_spec(folder)).spec.tied_embeddings
        assert equals_transformers(folder)

    @pytest.mark.parametrize("name", ["opt", "opt-350m", "llama-tied"])
    def test_the_head_stands_for_an_embedding_that_is_not_stored(self, name, copied):
        folder = copied(name)
        expected = scores(folder)

        def change(tensors):
            embed = next(each for each in tensors if "embed_tokens" in each)
            tensors["lm_head.weight"] = tensors.pop(embed)

        rewrite(folder, change)
        assert torch.equal(scores(folder), expected) and equals_transformers(folder)

    def test_a_copy_costs_no_word_and_no_memory(self, copied, caplog):
        folder = copied("llama-tied")
        rewrite(
            folder,
            lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
        )
        spec = resolve_spec(folder)
        with caplog.at_level(logging.WARNING, "sleb"):
            weights = load_weights(folder, spec, all_sublayers(spec), torch.float32, torch.device("cpu"))
        assert weights.head.weight is weights.embed and not caplog.records


class TestExtras:
    @pytest.mark.parametrize(
        "names",
        [
            ["model.layers.0.self_attn.k_proj.k_scale", "model.layers.0.self_attn.v_proj.v_scale"],
            [
                "model.layers.1.self_attn.rotary_emb.cos_cached",
                "model.layers.1.self_attn.rotary_emb.sin_cached",
            ],
            ["model.layers.1.self_attn.cos_cached", "model.rotary_emb.inv_freq"],
            ["v_head.summary.weight", "v_head.summary.bias"],
            ["model.layers.3.self_attn.masked_bias"],
        ],
        ids=lambda names: names[0].rpartition(".")[2],
    )
    def test_harmless_ones_are_named_in_one_warning(self, names, copied, caplog):
        folder = copied("llama-gqa")
        rewrite(folder, lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
        with caplog.at_level(logging.WARNING, "sleb"):
            assert equals_transformers(folder)
        records = [each for each in caplog.records if each.name.startswith("sleb")]
        assert len(records) == 1 and all(name in records[0].getMessage() for name in names)

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head.bias",
            "model.layers.0.self_attn.q_proj.lora_A.weight",
            "model.layers.0.self_attn.q_proj.bias",
        ],
    )
    def test_those_that_would_change_the_answer_are_refused(self, name, copied):
        folder = copied("llama-gqa")
        rewrite(folder, lambda tensors: tensors.update({name: torch.ones(64)}))
        assert f"holds {name}, for which LlamaForCausalLM has no place" in message(folder)

    def test_more_blocks_than_the_config_says(self, copied):
        folder = copied("llama-gqa")
        configure(folder, num_hidden_layers=3)
        text = message(folder)
        assert "holds model.layers.3 too" in text and "5 blocks" in text and "num_hidden_layers 3" in text

    def test_fewer_blocks_than_the_config_says(self, copied):
        folder = copied("llama-gqa")
        configure(folder, num_hidden_layers=7)
        text = message(folder)
        assert "num_hidden_layers 7" in text and "no block 5" in text and "up to 4" in text


F8 = torch.float8_e4m3fn


def quantized(**parts):
    """Every linear layer of the blocks in tensors of these kinds, as (dtype, shape)."""

    def change(tensors):
        for name in [each for each in tensors if each.endswith("proj.weight")]:
            shape = tensors.pop(name).shape
            for kind, dtype in parts.items():
                tensors[f"{name.removesuffix('weight')}{kind}"] = torch.ones(shape).to(dtype)

    return change


# config, tensors in place of each weight, how the message names it. The names are those that each tool writes.
QUANTIZED = {
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
        "gptq, 4 bits",
    ),
    "awq": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
        {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
        "awq, 4 bits",
    ),
    "compressed w4a16": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
        "compressed-tensors, pack-quantized",
    ),
    "compressed fp8": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        {"weight": F8, "weight_scale": torch.bfloat16, "input_scale": torch.bfloat16},
        "compressed-tensors, float-quantized",
    ),
    "compressed int8": (
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
        {"weight": torch.int8, "weight_scale": torch.bfloat16},
        "compressed-tensors, int-quantized",
    ),
    "hqq": (
        {
            "quantization_config": {
                "quant_method": "hqq",
                "quant_config": {"weight_quant_params": {"nbits": 4}},
            }
        },
        {"W_q": torch.uint8, "scale": torch.float16, "zero": torch.float16},
        "hqq",
    ),
    "fp8 in blocks": (
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
        {"weight": F8, "weight_scale_inv": torch.float32},
        "fp8, e4m3",
    ),
    "fp8 static": (
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}},
        {"weight": F8, "weight_scale": torch.float32, "input_scale": torch.float32},
        "fp8",
    ),
    "nvfp4": (
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        {
            "weight": torch.uint8,
            "weight_scale": F8,
            "weight_scale_2": torch.float32,
            "input_scale": torch.float32,
        },
        "modelopt, NVFP4",
    ),
    "mlx": (
        {
            "quantization": {"group_size": 64, "bits": 4},
            "quantization_config": {"group_size": 64, "bits": 4},
        },
        {"weight": torch.uint32, "scales": torch.bfloat16, "biases": torch.bfloat16},
        "MLX, 4 bits",
    ),
    "bitsandbytes 4": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {
            "weight": torch.uint8,
            "weight.absmax": torch.uint8,
            "weight.quant_state.bitsandbytes__nf4": torch.uint8,
        },
        "bitsandbytes, 4 bits",
    ),
    "bitsandbytes 8": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"weight": torch.int8, "SCB": torch.float32},
        "bitsandbytes, 8 bits",
    ),
}
# The same without a word in config.json.
BY_TENSORS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed w4a16": "compressed-tensors",
    "compressed fp8": "scale for each weight",
    "compressed int8": "scale for each weight",
    "hqq": "HQQ",
    "fp8 in blocks": "FP8 in blocks",
    "fp8 static": "scale for each weight",
    "nvfp4": "NVFP4",
    "mlx": "MLX",
    "bitsandbytes 4": "bitsandbytes, 4 bit",
    "bitsandbytes 8": "bitsandbytes, 8 bit",
}


class TestQuantized:
    @pytest.mark.parametrize("name", QUANTIZED)
    def test_a_format_is_named_and_so_is_the_remedy(self, name, copied):
        """That of one that is read, in tensors of no shape that it has: which tensor, and what it must be."""
        config, parts, wanted = QUANTIZED[name]
        folder = copied("llama-gqa")
        rewrite(folder, quantized(**parts))
        configure(folder, **config)
        text = message(folder)
        if name == "hqq":
            assert f"quantised weights ({wanted}; " in text and "--weights int8 or int4" in text
            assert "GGUF" in text and "quant_method awq, bitsandbytes" in text
        else:
            assert "layers.0.mlp.down_proj" in text or "is missing" in text
            assert "it must be " in text

    @pytest.mark.parametrize("name", QUANTIZED)
    def test_its_tensors_tell_it_too(self, name, copied):
        folder = copied("llama-gqa")
        rewrite(folder, quantized(**QUANTIZED[name][1]))
        assert BY_TENSORS[name] in message(folder)

    @pytest.mark.parametrize(
        "dtype", [torch.int8, torch.uint8, F8, torch.float8_e5m2, torch.int64, torch.bool], ids=str
    )
    def test_a_tensor_that_is_no_number_with_a_point_is_refused_by_name(self, dtype, copied):
        folder = copied("llama-gqa")
        rewrite(folder, lambda tensors: tensors.update({NAME: torch.ones(tensors[NAME].shape).to(dtype)}))
        assert f"{NAME} is " in message(folder)

    def test_scales_beside_plain_numbers_are_not_passed_over(self, copied):
        folder = copied("llama-gqa")
        rewrite(folder, lambda tensors: tensors.update({f"{NAME}_scale": torch.ones(1)}))
        assert f"{NAME}_scale is F32" in message(folder)

    def test_a_left_over_word_in_the_config_is_said_and_no_more(self, copied, caplog):
        folder = copied("llama-gqa")
        expected = scores(folder)
        configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
        with caplog.at_level(logging.WARNING, "sleb"):
            assert torch.equal(scores(folder), expected)
        assert len(caplog.records) == 1 and "gptq, 4 bits" in caplog.text


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def tensor(dtype="F32", shape=(4, 4), offsets=(0, 64)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS = {
    "longer than the file": (b"{}", b"", 1 << 40),
    "of 2**63 bytes": (b"{}", b"", 1 << 63),
    "a list": ([1], b""),
    "no text": (b"\xff\xfe", b""),
    "nested": (b"[" * 100_000, b""),
    "objects nested": (b'{"a":' * 100_000, b""),
    "a shape that is larger than the data": ({NAME: tensor(shape=(4, 5))}, bytes(64)),
    "a shape of 2**80": ({NAME: tensor(shape=(2**40, 2**40))}, bytes(64)),
    "a negative shape": ({NAME: tensor(shape=(-4, -4))}, bytes(64)),
    "a shape that is none": ({NAME: tensor(shape="4")}, bytes(64)),
    "offsets beyond the file": ({NAME: tensor(offsets=(64, 128))}, bytes(64)),
    "offsets that overlap": ({NAME: tensor(), "b": tensor()}, bytes(64)),
    "offsets backwards": ({NAME: tensor(offsets=(64, 0))}, bytes(64)),
    "a dtype that is none": ({NAME: tensor(dtype="F3")}, bytes(64)),
    "a cut file": ({NAME: tensor()}, bytes(60)),
    "a name of 5,000 characters": ({"x" * 5000: tensor()}, bytes(64)),
    "a name with terminal escapes": ({"\x1b[2J\n": tensor()}, bytes(64)),
}


class TestHeader:
    @pytest.mark.parametrize("name", HEADERS)
    def test_one_line(self, name, copied):
        folder = copied("llama-gqa")
        write(folder / SINGLE, *HEADERS[name])
        text = message(folder)
        assert text.isprintable()

    @pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device", "link to nothing"])
    @pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json"])
    def test_what_is_no_file(self, name, kind, copied, tmp_path, monkeypatch):
        import socket

        folder = copied("llama-gqa")
        spec = resolve_spec(folder)
        (folder / SINGLE).unlink()
        (folder / name).unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(folder / name)
        elif kind == "folder":
            (folder / name).mkdir()
        elif kind == "socket":
            monkeypatch.chdir(folder)  # a socket's path is short
            socket.socket(socket.AF_UNIX).bind(name)
        else:
            (folder / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "nothing")
        with pytest.raises(ModelError) as caught:
            open_checkpoint(folder, spec)
        assert str(caught.value).isprintable() and str(folder) in str(caught.value)


INDICES = {
    "a list": [1],
    "a number": 3,
    "no map": {"metadata": {}},
    "a map that is a list": {"weight_map": []},
    "an empty map": {"weight_map": {}},
    "a number for a file": {"weight_map": {NAME: 3}},
    "nothing for a file": {"weight_map": {NAME: None}},
    "a list for a file": {"weight_map": {NAME: ["a"]}},
    "a file of 5,000 characters": {"weight_map": {NAME: "x" * 5000}},
    "a name of 5,000 characters": {"weight_map": {"x" * 5000: SINGLE}},
    "a zero byte": {"weight_map": {NAME: "a\0b"}},
    "half a pair": {"weight_map": {NAME: "\ud800"}},
    "the folder": {"weight_map": {NAME: "."}},
    "the one above": {"weight_map": {NAME: ".."}},
    "nothing": {"weight_map": {NAME: ""}},
    "outside": {"weight_map": {NAME: "../a.safetensors"}},
    "elsewhere": {"weight_map": {NAME: "/etc/passwd"}},
    "below": {"weight_map": {NAME: "below/a.safetensors"}},
    "escapes": {"weight_map": {NAME: "\x1b[2J.safetensors"}},
}


class TestIndex:
    @pytest.mark.parametrize("name", INDICES)
    def test_one_line(self, name, copied):
        folder = copied("llama-gqa")
        (folder / SINGLE).rename(folder / "below")
        (folder / INDEX).write_text(json.dumps(INDICES[name]))
        text = message(folder)
        assert text.isprintable() and "safetensors" in text

    @pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a":' * 100_000, "\0", "null"], ids=range(6))
    def test_no_json(self, text, copied):
        folder = copied("llama-gqa")
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(text)
        assert INDEX in message(folder)


def test_what_stands_in_the_place_of_missing_tensors_is_named(copied):
    folder = copied("llama-gqa")
    rewrite(folder, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    text = message(folder)
    assert "no block at all" in text and "stored instead: _orig_mod.lm_head.weight" in text
    folder = copied("llama-tied")
    configure(folder, quantization_config={"quant_method": "vptq"})
    up = "model.layers.0.mlp.up_proj"
    rewrite(
        folder,
        lambda tensors: {
            name.replace(f"{up}.w", f"{up}.centroids.w"): each for name, each in tensors.items()
        },
    )
    text = message(folder)
    assert f"lacks {up}.weight" in text and f"{up}.centroids.weight" in text and "vptq" in text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
FIELD = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", "F4", "I64", "X"]) | JSON,
        "shape": st.lists(st.integers(-2, 2**65) | st.sampled_from([4, 16]), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-2, 2**65) | st.sampled_from([0, 64]), max_size=3) | JSON,
    },
)
NAMES = st.sampled_from([NAME, "lm_head.weight", "__metadata__", "x.qweight"]) | st.text(max_size=30)
HEADER = st.dictionaries(NAMES, FIELD | JSON, max_size=4) | JSON
FILES = (
    st.sampled_from([SINGLE, "a.safetensors", "b.safetensors", "../a", "", "."])
    | st.text(max_size=300)
    | JSON
)
WEIGHT_MAP = st.dictionaries(NAMES, FILES, max_size=5) | JSON


def check_header(folder, header, data, length):
    write(folder / SINGLE, header, data, length)
    refused_or_read(folder)


def check_index(folder, index):
    (folder / INDEX).write_text(json.dumps(index))
    refused_or_read(folder)


def refused_or_read(folder):
    """Tensors that lie within their file, or one line."""
    try:
        tensors, text = stored_tensors(folder), ""
    except ModelError as error:
        tensors, text = {}, str(error)
    assert text.isprintable() and len(text) < 1500
    assert all(math.prod(each.shape) <= 8 * each.file.stat().st_size for each in tensors.values())


class TestFuzz:
    @settings(max_examples=200)
    @given(header=HEADER, data=st.binary(max_size=80), length=st.none() | st.integers(0, 2**64 - 1))
    @example(header={NAME: tensor()}, data=bytes(64), length=None)
    def test_headers(self, tmp_path, header, data, length):
        check_header(tmp_path, header, data, length)

    @settings(max_examples=200)
    @given(index=st.fixed_dictionaries({"weight_map": WEIGHT_MAP}) | JSON)
    def test_indices(self, tmp_path, index):
        write(tmp_path / "a.safetensors", {NAME: tensor()}, bytes(64))
        check_index(tmp_path, index)

    @pytest.mark.slow
    @settings(max_examples=5000)
    @given(header=HEADER, data=st.binary(max_size=80), length=st.none() | st.integers(0, 2**64 - 1))
    def test_many_headers(self, tmp_path, header, data, length):
        check_header(tmp_path, header, data, length)

    @pytest.mark.slow
    @settings(max_examples=5000)
    @given(index=st.fixed_dictionaries({"weight_map": WEIGHT_MAP}) | JSON)
    def test_many_indices(self, tmp_path, index):
        write(tmp_path / "a.safetensors", {NAME: tensor()}, bytes(64))
        check_index(tmp_path, index)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox"])
def test_the_first_files_have_masks_and_no_outer_prefix(name, copied, tiny_model):
    folder = copied(name)

    def older(tensors):
        outer = {"gpt2": "transformer.", "gpt-neox": ""}[name]
        masks = {"gpt2": "h.0.attn.bias", "gpt-neox": "gpt_neox.layers.0.attention.bias"}
        bare = {key.removeprefix(outer): tensor for key, tensor in tensors.items()}
        return bare | {masks[name]: torch.ones(1, 1, 64, 64).tril()}

    rewrite(folder, older)
    llm = LLM(folder, "none", dtype="float32", device="cpu", kernels="torch")
    wanted = tiny_model(name).logprobs(TOKENS)[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    torch.testing.assert_close(llm.score(TOKENS), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("older", [False, True])
def test_the_text_model_of_one_that_also_sees(older, tmp_path):
    """Gemma 3 of 4B and more: config, weights and what is exported are those of the text model."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    eyes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}
    text |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    eyes |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).float().eval()
    model.save_pretrained(tmp_path / "model")
    if older:
        rewrite(
            tmp_path / "model",
            lambda tensors: {
                key.replace("model.language_model.", "language_model.model."): each
                for key, each in tensors.items()
            },
        )
    with torch.inference_mode():
        found = model(torch.tensor([TOKENS]), use_cache=False).logits[0].log_softmax(-1)
    wanted = found[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    chain = LayerMap("eyes", None, 3, removed=(Unit(1),))
    llm = LLM(tmp_path / "model", chain, (0, 1), dtype="float32", device="cpu", kernels="torch")
    torch.testing.assert_close(llm.score(TOKENS, depth=0), wanted, atol=1e-4, rtol=0)
    export_model(str(tmp_path / "model"), "hf", tmp_path / "text", layer_map=chain)
    pruned = LLM(tmp_path / "text", "none", dtype="float32", device="cpu", kernels="torch")
    torch.testing.assert_close(llm.score(TOKENS, depth=1), pruned.score(TOKENS), atol=1e-5, rtol=0)
    assert not any("vision" in name for name in load_file(tmp_path / "text" / SINGLE))

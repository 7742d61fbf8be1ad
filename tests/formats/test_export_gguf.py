"""Pruned GGUF files: read with the gguf package, loaded again by sleb, and run by llama.cpp where that can be had."""

from __future__ import annotations

import ctypes
import json
import shutil
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sleb import LLM, LayerMap
from sleb.errors import ConfigError, ModelError
from sleb.formats.exporting import export_model
from sleb.layer_map.layer_map import Patches, Unit
from sleb.models.gguf.convert import convert_gguf

KIND = gguf.GGMLQuantizationType
PROMPT = torch.randint(3, 96, (29,), generator=torch.Generator().manual_seed(7)).tolist()
REMOVED = (3, 1)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SAME_BASE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
NO_WINDOWS = "has sliding windows, which llama.cpp does not have in its architecture"
NOT_WRITTEN = "is not written as GGUF"
REFUSED = {
    "llama-biases": "has the activation gelu_pytorch_tanh, and llama.cpp computes silu",
    "mistral-window": NO_WINDOWS,
    "qwen2-window": NO_WINDOWS,
    "qwen3-window": "biases that llama.cpp does not add",
    "smollm3": "tells by a block's number",
    "smollm3-window": NO_WINDOWS,
    "starcoder2": NO_WINDOWS,
    "gemma2": "would take 16 instead of 10",
    "gemma3": "would take 16 instead of 10",
    "gemma3-uncapped": "would take 16 instead of 10",
    "exaone4": "by how many there are",
    "gpt2-unscaled": "factor on the scores",
    "phi3-window": NO_WINDOWS,
    **dict.fromkeys(
        ("olmo2", "seed-oss", "arcee", "ernie4.5", "falcon"), "biases that llama.cpp does not add"
    ),
    "gpt-neox-sequential": "not all the biases",
    "olmo3": "rotate by another rope_theta",
    "cohere": "has an output head of its own",
    "cohere2": "has an output head of its own",
    "opt-untied": NOT_WRITTEN,
    **dict.fromkeys(("opt", "opt-350m", "opt-no-bias", "opt-no-affine", "opt-no-final-norm"), NOT_WRITTEN),
    **dict.fromkeys(("ministral", "vaultgemma", "hyperclovax", "cwm", "helium", "persimmon"), NOT_WRITTEN),
    **dict.fromkeys(("gptj", "gpt-neo", "biogpt"), NOT_WRITTEN),
}
MORE = {
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "starcoder2": {"sliding_window": None},
    "phi3-window": {"sliding_window": None},
    "olmo2": {"attention_bias": False},
    "olmo3": {"rope_parameters": SAME_BASE},
    "seed-oss": {"attention_out_bias": False},
    "arcee": {"mlp_bias": False},
    "ernie4.5": {"use_bias": False},
    "falcon": {"bias": False},
    "cohere": {"tie_word_embeddings": True},
    "cohere2": {"tie_word_embeddings": True, "attention_bias": False},
    "gpt-neox-sequential": {"attention_bias": True},
    "llama-biases": {"hidden_act": "silu"},
}


@pytest.fixture
def folder_of(tiny_model, tmp_path, byte_tokenizer):
    """A folder of a variant with a tokenizer of its 96 tokens, and its config changed; and the model of both."""

    def make(name, **changes):
        tiny = tiny_model(name)
        path = tmp_path / "model"
        shutil.copytree(tiny.path, path)
        if changes:
            config = json.loads((path / "config.json").read_text()) | changes
            (path / "config.json").write_text(json.dumps(config))
            from transformers import AutoModelForCausalLM

            if changes.get("tie_word_embeddings"):  # transformers would use a head that is there
                tensors = load_file(path / "model.safetensors")
                del tensors["lm_head.weight"]
                save_file(tensors, path / "model.safetensors", {"format": "pt"})
            options = {"dtype": torch.float32, "attn_implementation": "eager"}
            tiny = replace(tiny, model=AutoModelForCausalLM.from_pretrained(path, **options).eval())
            (path / "model.safetensors").unlink()
            tiny.model.save_pretrained(path)
        data = json.loads(byte_tokenizer.to_str())
        data["model"]["vocab"] = {token: id_ for token, id_ in data["model"]["vocab"].items() if id_ < 96}
        data["added_tokens"] = []
        data["pre_tokenizer"]["use_regex"] = True
        (path / "tokenizer.json").write_text(json.dumps(data))
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
        (path / "tokenizer_config.json").write_text(json.dumps(own))
        return replace(tiny, path=path)

    return make


def map_of(path, removed, *patches):
    units = tuple(unit if isinstance(unit, Unit) else Unit(unit) for unit in removed)
    config = json.loads((path / "config.json").read_text())
    num_blocks = next(
        config[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in config
    )
    patches = (replace(each, first_depth=len(units)) for each in patches)
    return LayerMap(path.name, None, num_blocks, removed=units, patches=Patches.of(patches))


def export(model, target, removed=REMOVED, *patches, **options):
    export_model(str(model.path), "gguf", target, layer_map=map_of(model.path, removed, *patches), **options)
    return target


def converted(source, folder):
    folder.mkdir()
    convert_gguf(source, folder, dtype="float32")
    return folder


def check_round_trip(model, tmp_path):
    """Its tensors are some that llama.cpp has for the architecture, and what sleb makes of them is the pruned model."""
    reader = gguf.GGUFReader(export(model, tmp_path / "pruned.gguf"))
    name = reader.fields["general.architecture"].contents()
    assert reader.fields[f"{name}.block_count"].contents() == 3
    arch = next(each for each, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    known = {gguf.TENSOR_NAMES[part].format(bid=bid) for part in gguf.MODEL_TENSORS[arch] for bid in range(3)}
    assert {tensor.name.rpartition(".")[0] for tensor in reader.tensors} <= known
    again = LLM(
        str(converted(tmp_path / "pruned.gguf", tmp_path / "again")),
        dtype="float32",
        device="cpu",
        kernels="torch",
    )
    expected = model.without(REMOVED).logprobs(PROMPT)
    expected = expected[torch.arange(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(again.score(PROMPT), expected, atol=1e-4)


def check(name, folder_of, tmp_path):
    model = folder_of(name)
    if name == "llama3":  # a file has the divisors alone, which sleb knows for the bands of Llama 3 alone
        export(model, tmp_path / "pruned.gguf")
        with pytest.raises(ModelError, match="rope_freqs are not Llama 3's scaling"):
            converted(tmp_path / "pruned.gguf", tmp_path / "again")
        return
    if name not in REFUSED:
        check_round_trip(model, tmp_path)
        return
    with pytest.raises(ConfigError, match=REFUSED[name]):
        export(model, tmp_path / "pruned.gguf")
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


def test_a_pruned_file_is_the_pruned_model(architecture, folder_of, tmp_path):
    check(architecture, folder_of, tmp_path)


def test_a_pruned_file_is_the_pruned_model_of_other_families(variant, folder_of, tmp_path):
    check(variant, folder_of, tmp_path)


@pytest.mark.parametrize("name", MORE)
def test_and_of_what_llama_cpp_computes_of_those(name, folder_of, tmp_path):
    check_round_trip(folder_of(name, **MORE[name]), tmp_path)


# --- in llama.cpp, where the package llama-cpp-python is


def llama_cpp_logits(path, tokens, vocab_size):
    """[len(tokens), vocab_size], with keys and values in float32."""
    llama = pytest.importorskip("llama_cpp")
    llama.llama_backend_init()
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = 64
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama.GGML_TYPE_F32
    params.flash_attn_type = 0
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
    assert llama.llama_decode(context, batch) == 0
    pointer = ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    found = np.ctypeslib.as_array(pointer, (len(tokens), vocab_size)).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return found


def check_llama_cpp(model, tmp_path):
    found = llama_cpp_logits(export(model, tmp_path / "out.gguf"), PROMPT, 96)
    expected = model.without(REMOVED).logits(PROMPT).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow
def test_llama_cpp_computes_the_pruned_model(architecture, folder_of, tmp_path):
    if architecture not in REFUSED:
        check_llama_cpp(folder_of(architecture), tmp_path)


@pytest.mark.slow
def test_llama_cpp_computes_the_pruned_model_of_other_families(variant, folder_of, tmp_path):
    if variant not in REFUSED:
        check_llama_cpp(folder_of(variant), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_llama_cpp_computes_those(name, folder_of, tmp_path):
    check_llama_cpp(folder_of(name, **MORE[name]), tmp_path)

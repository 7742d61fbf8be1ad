"""Pruned GGUF files: read with the gguf package, loaded again by sleb, and run by llama.cpp where that can be had."""

from __future__ import annotations

import ctypes
import json
import shutil
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from sleb import LLM, LayerMap, SamplingParams, cli
from sleb.errors import ConfigError, ModelError
from sleb.fields import Fields
from sleb.formats.exporting import export_model
from sleb.formats.gguf_metadata import tokenizer_keys
from sleb.layer_map.layer_map import Patch, Patches, Unit
from sleb.models.config import family_of, read_config
from sleb.models.gguf.convert import convert_gguf
from sleb.models.gguf.tokenizer import BY_RULE, SPLIT_RULES, build_tokenizer, write_tokenizer
from sleb.models.gguf.vocabulary import read_vocabulary
from sleb.models.gguf.writer import as_key, write_gguf
from sleb.models.resolve import resolve_model

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
REFUSED = {
    "llama-biases": "has the activation gelu_pytorch_tanh, and llama.cpp computes silu",
    "mistral-window": NO_WINDOWS,
    "qwen2-window": NO_WINDOWS,
    "qwen3-window": "biases that llama.cpp does not add",
    "smollm3": "tells by a block's number",
    "smollm3-window": NO_WINDOWS,
    "starcoder2": NO_WINDOWS,
    "gemma2": "would take 16 instead of 10.0 with 3 blocks",
    "gemma3": "would take 16 instead of 10.0 with 3 blocks",
    "gemma3-uncapped": "would take 16 instead of 10.0 with 3 blocks",
    "exaone4": "by how many there are",
    "gpt2-unscaled": "factor on the scores",
    "phi3-window": NO_WINDOWS,
    **dict.fromkeys(
        ("olmo2", "seed-oss", "arcee", "ernie4.5", "falcon"), "biases that llama.cpp does not add"
    ),
    "gpt-neox-sequential": "not all the biases",
    "olmo3": "rotate by another rope_theta",
    "olmoe": "keys and values that queries share",
    "cohere": "has an output head of its own",
    "cohere2": "has an output head of its own",
    "opt": "is not written as GGUF",
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


def check(name, folder_of, tmp_path, tiny_model):
    known = family_of(read_config(tiny_model(name).path)).gguf is not None
    if not known and name != "opt":  # one stands for those that llama.cpp does not have
        return
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


@pytest.mark.slow
def test_a_pruned_file_is_the_pruned_model(architecture, folder_of, tmp_path, tiny_model):
    check(architecture, folder_of, tmp_path, tiny_model)


@pytest.mark.parametrize(
    "name", ["llama-gqa", "llama-linear", "llama-yarn", "qwen3", "smollm3", "phi3-longrope", "opt"]
)
def test_rotations_and_what_llama_cpp_lacks(name, folder_of, tmp_path, tiny_model):
    check(name, folder_of, tmp_path, tiny_model)


def test_a_pruned_file_is_the_pruned_model_of_other_families(variant, folder_of, tmp_path, tiny_model):
    check(variant, folder_of, tmp_path, tiny_model)


@pytest.mark.parametrize("name", MORE)
def test_and_of_what_llama_cpp_computes_of_those(name, folder_of, tmp_path):
    check_round_trip(folder_of(name, **MORE[name]), tmp_path)


def read_back(path):
    """Keys and tensors as the gguf package has them."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def test_of_a_file_every_bit_that_stays_is_copied(folder_of, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    model = folder_of("gemma3", query_pre_attn_scalar=16)
    source = export(model, tmp_path / "all.gguf", (0,), gguf_type="q8_0")
    layer_map = LayerMap("all", None, 4, removed=(Unit(2),))
    export_model(str(source), "gguf", tmp_path / "pruned.gguf", layer_map=layer_map)
    (before, old), (after, new) = read_back(source), read_back(tmp_path / "pruned.gguf")
    assert old["blk.1.attn_q.weight"].tensor_type == KIND.Q8_0
    number = {0: 0, 1: 1, 3: 2}
    for name, tensor in old.items():
        block, rest = name.split(".")[1:2], name.split(".", 2)[-1]
        if name.startswith("blk."):
            name = f"blk.{number.get(int(block[0]), 'gone')}.{rest}"
        if "gone" not in name:
            kept = new.pop(name)
            assert kept.tensor_type == tensor.tensor_type and np.array_equal(kept.data, tensor.data)
    assert not new
    changed = {name for name in before if before[name] != after[name]}
    pattern = "gemma3.attention.sliding_window_pattern"
    own = {f"sleb.{name}" for name in ("source_model", "num_blocks", "removed", "layer_map")}
    assert changed == {"gemma3.block_count", pattern} | own and after["gemma3.block_count"] == 3
    assert before[pattern] == [False, True, False, True] and after[pattern] == [False, True, True]
    assert after["sleb.removed"] == ["2"] and before.keys() == after.keys()
    options = {"dtype": "float32", "device": "cpu", "kernels": "torch"}
    expected = LLM(str(source), layer_map, tiers=[1], **options).score(PROMPT)
    np.testing.assert_allclose(
        LLM(str(tmp_path / "pruned.gguf"), **options).score(PROMPT), expected, atol=1e-4
    )
    with pytest.raises(ConfigError, match=r"all\.gguf is the model that is exported: name another file"):
        export_model(str(source), "gguf", source, layer_map=layer_map, force=True)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_all_matrices_in_one_type(kind, folder_of, tmp_path, monkeypatch):
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    model = folder_of("llama-tied")
    _, exact = read_back(export(model, tmp_path / "f32.gguf"))
    from_file = LayerMap("f32", None, 3, removed=(Unit(2),))
    targets = [export(model, tmp_path / "folder.gguf", gguf_type=kind), tmp_path / "file.gguf"]
    export_model(str(tmp_path / "f32.gguf"), "gguf", targets[1], layer_map=from_file, gguf_type=kind)
    for target in targets:
        keys, tensors = read_back(target)
        assert keys["general.file_type"] == {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}[kind]
        for name, tensor in tensors.items():
            plain = exact[name].data
            wanted = KIND[kind.upper()] if plain.ndim > 1 else KIND.F32
            if wanted == KIND.Q8_0 and plain.shape[-1] % 32:
                wanted = KIND.F16
            assert tensor.tensor_type == wanted
            expected = gguf.quants.dequantize(gguf.quants.quantize(plain, wanted), wanted)
            found = gguf.quants.dequantize(tensor.data, wanted)
            assert np.array_equal(found.reshape(plain.shape), expected.reshape(plain.shape)), name
    with pytest.raises(ConfigError, match="GGUF type 'q4_k' is unknown: choose auto, f32"):
        export(model, tmp_path / "x.gguf", gguf_type="q4_k")


RULE_TEXTS = (
    "Hello World, I'm sure it's THEY'RE 'Tis  we'Ve 1 12 123 1234 12345 3.14",
    "x=[1,2];\n\n\n  def f(x):\n        return x**2  # ok `code`\n",
    "HelloWORLDfoo camelCase a/b//\n c\\d ... !!!??? ----==== $5 #tag @me _under_score",
    "naïve café 你好世界 2024年 Привет мир ١٢٣ 😀 <|im_start|>user\n",
    " \n \n  7 \t\ttab   \n   end  ",
)
SPECIAL = ["<|begin|>", "<|end|>", "<|tool|>"]


def byte_level(name):
    """A folder's metadata as a file would have it, of a small byte-level vocabulary."""
    alphabet = sorted(ByteLevel.alphabet())
    joined = ["th", "the", "12", "he"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*SPECIAL, *alphabet, *joined],
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(alphabet) + len(joined)),
        "tokenizer.ggml.merges": ["t h", "th e", "1 2", "h e"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


@pytest.mark.parametrize("names", BY_RULE.values())
def test_the_tokenizer_of_a_folder_is_written_as_it_was_read(names, tmp_path):
    """For every way of splitting that llama.cpp has a name for, and that sleb reads."""
    metadata = byte_level(names[-1])
    write_tokenizer(read_vocabulary(Fields(metadata, "x.gguf")), tmp_path, 64)
    again = tokenizer_keys(tmp_path, len(metadata["tokenizer.ggml.tokens"]) + 2)
    padded = [f"[PAD{len(metadata['tokenizer.ggml.tokens']) + i}]" for i in range(2)]
    assert again.pop("tokenizer.ggml.tokens") == metadata["tokenizer.ggml.tokens"] + padded
    assert again.pop("tokenizer.ggml.token_type") == metadata["tokenizer.ggml.token_type"] + [5, 5]
    written, read = (SPLIT_RULES[name] for name in (again.pop("tokenizer.ggml.pre"), names[0]))
    assert replace(written, add_bos=False) == replace(read, add_bos=False)  # which the file says itself
    assert again == {name: value for name, value in metadata.items() if name in again}


def test_a_sentencepiece_vocabulary_is_written_too(tmp_path):
    pieces = ["\u2581the", "the", "th", "he", "\u2581t", "t", "h", "e", "\u2581", "a", ".", "\n"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *pieces],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))],
        "tokenizer.ggml.add_space_prefix": False,
    }
    write_tokenizer(read_vocabulary(Fields(metadata, "x.gguf")), tmp_path, 64)
    again = tokenizer_keys(tmp_path, 259 + len(pieces))
    for name in ("tokens", "token_type", "add_space_prefix", "model"):
        assert again[f"tokenizer.ggml.{name}"] == metadata[f"tokenizer.ggml.{name}"], name
    assert again["tokenizer.ggml.add_bos_token"] and not again["tokenizer.ggml.add_eos_token"]
    tokenizer, other = (
        build_tokenizer(read_vocabulary(Fields(each, "x"))) for each in (metadata, metadata | again)
    )
    for text in ("the the", "  the hat\n.", "theatre \u00e9", "tthhee"):
        assert tokenizer.encode(text).ids == other.encode(text).ids


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused(tmp_path):
    write_tokenizer(read_vocabulary(Fields(byte_level("gpt-2"), "x.gguf")), tmp_path, 64)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "."}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"none of the ways that are known by llama\.cpp's names.*smollm"):
        tokenizer_keys(tmp_path, 300)
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {"model": words, "added_tokens": []}))
    with pytest.raises(ConfigError, match="a WordLevel tokenizer is not written as GGUF"):
        tokenizer_keys(tmp_path, 300)


# --- a part of a block alone, and patches


def a_patch(first, last, form="full"):
    draw = np.random.default_rng([*first[:1], *last[:1]]).normal
    shapes = {"full": {"weight": (32, 32)}, "low-rank": {"down": (3, 32), "up": (32, 3)}}
    tensors = {name: draw(0, 0.3, shape) for name, shape in (shapes[form] | {"bias": (32,)}).items()}
    return Patch(first, last, 1, None, form, True, {name: np.float16(each) for name, each in tensors.items()})


PARTS = {
    "an attention": ((Unit(2, "attention"),), ()),
    "an mlp": ((Unit(2, "mlp"), Unit(3)), ()),
    "a patch": ((Unit(1), Unit(2)), (a_patch((1, "attention"), (2, "mlp")),)),
    "both": ((Unit(1), Unit(3, "mlp")), (a_patch((1, "attention"), (1, "mlp"), "low-rank"),)),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_blocks_and_patches_are_deci(case, folder_of, tmp_path):
    units, patches = PARTS[case]
    model = folder_of("llama-tied")
    keys, tensors = read_back(export(model, tmp_path / "out.gguf", units, *patches))
    heads, kv, widths = (
        keys[f"deci.{name}"]
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    expected = {
        "an attention": ([4, 4, 0, 4, 4], [1, 1, 0, 1, 1], [48] * 5),
        "an mlp": (
            [4] * 4,
            [1] * 4,
            [48, 48, 32, 48],
        ),  # one of zeros: without any llama.cpp leaves the attention out
        "a patch": ([4, 0, 4, 4], [1, 0, 1, 1], [48, 256, 48, 48]),
        "both": ([4, 0, 4, 4, 4], [1, 0, 1, 1, 1], [48, 256, 48, 32, 48]),
    }[case]
    assert (heads, kv, widths) == expected and keys["general.architecture"] == "deci"
    for block, count in enumerate(kv):
        assert (f"blk.{block}.attn_q.weight" in tensors) == bool(count)
    if case == "an mlp":
        assert not tensors["blk.2.ffn_down.weight"].data.any()
    assert "tokenizer.ggml.tokens" in keys and not any(name.startswith("llama.") for name in keys)


def test_parts_of_blocks_of_another_family_are_refused(folder_of, tmp_path):
    for unit, patch in ((Unit(2, "mlp"), ()), (Unit(2), (a_patch((2, "attention"), (2, "mlp")),))):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        with pytest.raises(
            ConfigError, match="of Qwen2ForCausalLM only whole blocks can be left out in a GGUF"
        ):
            export(folder_of("qwen2"), tmp_path / "x.gguf", (unit,), *patch)


def test_merged_patches(folder_of, tmp_path):
    """In the output projections before them, with biases, which all MLPs of a Llama have then."""
    model = folder_of("llama-tied")
    layer_map = map_of(
        model.path, (1, 3), a_patch((1, "attention"), (1, "mlp")), a_patch((3, "attention"), (3, "mlp"))
    )
    draw = np.random.default_rng(5).normal
    merged = {
        block: {
            "mlp.down_proj.weight": np.float32(draw(0, 0.3, (32, 48))),
            "mlp.down_proj.bias": np.float32(draw(0, 0.3, 32)),
        }
        for block in (0, 2)
    }

    def merge(removal):
        return replace(removal.mending, merged=merged, losses=(2.0, 2.1))

    target = tmp_path / "out.gguf"
    export_model(str(model.path), "gguf", target, layer_map=layer_map, patches="merge", merge=merge)
    pruned = model.without((1, 3))
    for index, block in enumerate((0, 2)):
        down = pruned.model.model.layers[index].mlp.down_proj
        down.weight.data = torch.from_numpy(merged[block]["mlp.down_proj.weight"])
        down.bias = torch.nn.Parameter(torch.from_numpy(merged[block]["mlp.down_proj.bias"]))
    again = LLM(str(converted(target, tmp_path / "again")), dtype="float32", device="cpu", kernels="torch")
    expected = pruned.logprobs(PROMPT)[torch.arange(len(PROMPT) - 1), PROMPT[1:]]
    np.testing.assert_allclose(again.score(PROMPT), expected.detach(), atol=1e-4)
    _, tensors = read_back(target)
    assert not tensors["blk.2.ffn_gate.bias"].data.any() and tensors["blk.0.ffn_down.bias"].data.any()


def test_through_the_command(folder_of, tmp_path, capsys, monkeypatch):
    model = folder_of("qwen3")
    map_of(model.path, REMOVED).save(tmp_path / "map.json")

    def run(*arguments):
        chosen = ["--layer-map", str(tmp_path / "map.json"), "--format", "gguf", *arguments]
        monkeypatch.setattr(sys, "argv", ["sleb", "export", str(model.path), *chosen])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), capsys.readouterr().err

    assert "format gguf writes a file that is no text: name one with --output" in run()[1]
    target = tmp_path / "out.gguf"
    code, told = run("-o", str(target), "--gguf-type", "f16", "--depth", "1")
    assert code == 0 and "depth 1, 4 of 5 blocks" in told
    assert read_back(target)[1]["blk.3.attn_q.weight"].tensor_type == KIND.F16
    assert "exists: replace it with --force" in run("-o", str(target))[1]


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
    if family_of(read_config(model.path)).gguf is None:
        return
    found = llama_cpp_logits(export(model, tmp_path / "out.gguf"), PROMPT, 96)
    expected = model.without(REMOVED).logits(PROMPT).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)


def check_transformers(model, tmp_path):
    """The folder that a file becomes is one of transformers' own."""
    from transformers import AutoModelForCausalLM

    if family_of(read_config(model.path)).gguf is None:
        return
    folder = converted(export(model, tmp_path / "pruned.gguf"), tmp_path / "again")
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    found, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.inference_mode():
        logits = found(torch.tensor([PROMPT]), use_cache=False).logits[0]
    torch.testing.assert_close(logits, model.without(REMOVED).logits(PROMPT), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_transformers_loads_what_is_read(variant, folder_of, tmp_path):
    if variant not in REFUSED:
        check_transformers(folder_of(variant), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_transformers_loads_what_is_read_of_those(name, folder_of, tmp_path):
    check_transformers(folder_of(name, **MORE[name]), tmp_path)


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


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTS)
def test_llama_cpp_computes_parts_of_blocks_and_patches(case, folder_of, tmp_path):
    units, patches = PARTS[case]
    model = folder_of("llama-tied")
    found = llama_cpp_logits(export(model, tmp_path / "out.gguf", units, *patches), PROMPT, 96)
    expected = model.patched(units, patches).logits(PROMPT).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max(), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("patches", ["keep", "drop"])
def test_llama_cpp_writes_the_text_of_the_engine(patches, tmp_path):
    """SmolLM2 at depth 3 of its own map, in float32: as many tokens as the engine's, the same ones."""
    llama = pytest.importorskip("llama_cpp")
    target = tmp_path / "small.gguf"
    export_model("smollm2", "gguf", target, depth=3, patches=patches, gguf_type="f32")
    layer_map = LayerMap.load(resolve_model("smollm2").layer_map)
    layer_map = layer_map if patches == "keep" else replace(layer_map, patches=None)
    engine = LLM("smollm2", layer_map, dtype="float32", device="cpu", tiers=[3])
    other = llama.Llama(str(target), n_ctx=256, verbose=False, n_threads=1, type_k=0, type_v=0)
    for prompt in ("The capital of France is", "Once upon a time", "def fibonacci(n):"):
        tokens = other.tokenize(prompt.encode(), add_bos=False)
        written = other.create_completion(tokens, max_tokens=32, temperature=0.0)["choices"][0]["text"]
        [output] = engine.generate([prompt], SamplingParams(max_tokens=32, temperature=0.0), depth=3)
        assert written == output.text


@pytest.mark.slow
def test_llama_cpp_splits_text_by_the_same_rules(tmp_path):
    """Every rule, on SmolLM2's vocabulary: the ids are llama.cpp's."""
    llama = pytest.importorskip("llama_cpp")
    keys = {"general.architecture": "llama", **tokenizer_keys(resolve_model("smollm2").path, 49152)}
    del keys["tokenizer.ggml.add_bos_token"]
    for name in SPLIT_RULES:
        keys["tokenizer.ggml.pre"] = name
        with (tmp_path / "vocabulary.gguf").open("wb") as file:
            write_gguf(file, {key: as_key(key, value) for key, value in keys.items()}, [])
        other = llama.Llama(str(tmp_path / "vocabulary.gguf"), vocab_only=True, verbose=False)
        tokenizer = build_tokenizer(read_vocabulary(Fields(keys, "x.gguf")))
        for text in RULE_TEXTS:
            expected = other.tokenize(text.encode(), add_bos=False, special=True)
            assert tokenizer.encode(text, add_special_tokens=False).ids == expected, (name, text)

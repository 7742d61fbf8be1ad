"""Names of tensors and Hugging Face configuration files from a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sleb.errors import ModelError
from sleb.models.families import FAMILIES, Family

Floats = npt.NDArray[np.float32]

ARCHITECTURES = {family.gguf.name: family for family in FAMILIES.values() if family.gguf}
# Tokens that end a turn of a chat although the file may name another as the end of the text.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def architecture_of(metadata: Mapping[str, Any], source: Path) -> Family:
    """The family that `metadata` names. Raises ModelError when there is none, or for mixtures of experts."""
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{source}: architecture {name!r} is not supported; supported: {', '.join(ARCHITECTURES)} "
            "(Mistral and SmolLM2 files say llama)"
        )
    if metadata.get("split.count", 1) > 1:
        raise ModelError(
            f"{source} is one part of several: join them with llama.cpp's llama-gguf-split --merge"
        )
    if metadata.get(f"{name}.expert_count"):
        raise ModelError(f"{source}: a mixture of experts is not supported; only dense models are")
    return ARCHITECTURES[name]


def outer_tensors(family: Family) -> dict[str, str]:
    """Names of the tensors outside the blocks, in the file and in the checkpoint."""
    names = family.names
    return {"token_embd": names.embed, "output_norm": names.final_norm, "output": names.head}


def block_tensors(family: Family) -> dict[str, str]:
    """Names of a block's tensors, in the file and in the checkpoint."""
    names = family.names
    norms = {"attn_norm": names.attention_norm, "ffn_norm": names.mlp_norm}
    if family.qk_norm:
        norms |= {"attn_q_norm": names.query_norm, "attn_k_norm": names.key_norm}
    inputs = [*zip(_qkv(family), names.qkv, strict=True), *zip(_up(family), names.up, strict=True)]
    return {**norms, **dict(inputs), "attn_output": names.attention_out, "ffn_down": names.down}


def bias_flags(family: Family) -> dict[str, bool | str]:
    """For each of a block's matrices in the file whether it has a bias, or the config's field that says so."""
    attention = {**dict.fromkeys(_qkv(family), family.qkv_bias), "attn_output": family.out_bias}
    return attention | dict.fromkeys((*_up(family), "ffn_down"), family.mlp_bias)


def _qkv(family: Family) -> tuple[str, ...]:
    return ("attn_qkv",) if len(family.names.qkv) == 1 else ("attn_q", "attn_k", "attn_v")


def _up(family: Family) -> tuple[str, ...]:
    return ("ffn_up",) if len(family.names.up) == 1 else ("ffn_gate", "ffn_up")


def model_config(
    metadata: Mapping[str, Any],
    vocabulary_size: int,
    names: frozenset[str],
    rope_factors: Mapping[str, Floats],
    source: Path,
    dtype: str,
) -> dict[str, Any]:
    """The contents of config.json.

    `names`: the file's tensors. `rope_factors`: its tensors that scale rotation frequencies, by name. Raises
    ModelError for a missing key or a shape that the architecture's Hugging Face class cannot express.
    """
    family = architecture_of(metadata, source)
    read = _Reader(metadata, source)
    num_heads = int(read("attention.head_count"))
    hidden_size = int(read("embedding_length"))
    head_dim = int(read("attention.key_length", hidden_size // num_heads))
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary_size,
        "hidden_size": hidden_size,
        "intermediate_size": int(read("feed_forward_length")),
        "num_hidden_layers": int(read("block_count")),
        "num_attention_heads": num_heads,
        "num_key_value_heads": int(read("attention.head_count_kv", num_heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(read("context_length")),
        "rms_norm_eps": _shortest(read("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(read("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": dtype,
    }
    biases = bias_flags(family)
    for switch in dict.fromkeys(flag for flag in biases.values() if isinstance(flag, str)):
        config[switch] = any(f"blk.0.{each}.bias" in names for each, flag in biases.items() if flag == switch)
    config |= _rotation(read, head_dim, rope_factors)
    window = int(read("attention.sliding_window", 0))
    if family.model_type == "phi3":  # the other classes want a switch of their own and do without here
        config["sliding_window"] = window if 0 < window < config["max_position_embeddings"] else None
    return config | _token_ids(metadata)


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of generation_config.json: the special ids, and sampling values only if the file states any."""
    sampling = {
        name: _shortest(metadata[f"general.sampling.{key}"])
        for key, name in _SAMPLING.items()
        if f"general.sampling.{key}" in metadata
    }
    if "top_k" in sampling:
        sampling["top_k"] = int(sampling["top_k"])
    if sampling.get("temperature", 0.0) > 0.0:
        sampling["do_sample"] = True
    return _token_ids(metadata) | sampling


class _Reader:
    """Reads `<architecture>.<key>`; a list of equal values counts as its one value."""

    def __init__(self, metadata: Mapping[str, Any], source: Path) -> None:
        self._metadata, self.source = metadata, source
        self.architecture = str(metadata["general.architecture"])

    def __call__(self, key: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if value is None or isinstance(value, list):
            problem = "is missing" if value is None else "differs from block to block, which is not supported"
            raise ModelError(f"{self.source}: {self.architecture}.{key} {problem}")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    ends = [
        found["eos_token_id"],
        *(metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")),
    ]
    template = metadata.get("tokenizer.chat_template") or ""
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    ends += [tokens.index(token) for token in _TURN_ENDS if token in template and token in tokens]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return {name: value for name, value in found.items() if value is not None}


def _rotation(read: _Reader, head_dim: int, factors: Mapping[str, Floats]) -> dict[str, Any]:
    """The fields of config.json that say how positions rotate, where they differ from the plain case."""
    rotated = int(read("rope.dimension_count", head_dim))
    context = int(read("context_length"))
    fields: dict[str, Any] = {}
    if rotated != head_dim:
        if read.architecture != "phi3":
            raise ModelError(f"{read.source}: rotating {rotated} of {head_dim} dimensions is not supported")
        fields["partial_rotary_factor"] = rotated / head_dim
    kind = str(read("rope.scaling.type", "none"))
    original = int(read("rope.scaling.original_context_length", context))
    if read.architecture == "phi3":
        fields["original_max_position_embeddings"] = original
    if "rope_factors_long.weight" in factors:
        fields["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": [_shortest(x) for x in factors["rope_factors_short.weight"]],
            "long_factor": [_shortest(x) for x in factors["rope_factors_long.weight"]],
        }
    elif "rope_freqs.weight" in factors:
        theta = float(read("rope.freq_base", 10000.0))
        fields["rope_scaling"] = _llama3_scaling(factors["rope_freqs.weight"], rotated, theta, read.source)
    elif kind in ("linear", "yarn"):
        fields["rope_scaling"] = {"rope_type": kind, "factor": _shortest(read("rope.scaling.factor"))}
        if kind == "yarn":
            fields["rope_scaling"] |= {"original_max_position_embeddings": original} | _yarn_extras(read)
    elif kind != "none":
        raise ModelError(f"{read.source}: rope scaling {kind!r} is not supported; none, linear, yarn are")
    return fields


def _yarn_extras(read: _Reader) -> dict[str, float]:
    names = {
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "yarn_attn_factor",
    }
    values = {ours: read(f"rope.scaling.{theirs}", math.nan) for ours, theirs in names.items()}
    return {name: _shortest(value) for name, value in values.items() if not math.isnan(value)}


def _llama3_scaling(stored: Floats, rotated: int, theta: float, source: Path) -> dict[str, Any] | None:
    """The parameters of Llama 3's frequency scaling, of which a file only keeps the resulting divisors.

    stored: [rotated / 2]. Every Llama 3 release uses the same bands and original context and differs in the
    factor alone, which is the largest divisor; that they reproduce what is stored is checked, not assumed.
    """
    factor, low, high, original = round(float(stored.max()), 4), 1.0, 4.0, 8192
    if factor == 1.0:
        return None
    frequencies = theta ** -(np.arange(0, rotated, 2, dtype=np.float64) / rotated)
    smooth = np.clip((original * frequencies / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if expected.shape != stored.shape or not np.allclose(expected, stored, rtol=1e-3):
        raise ModelError(f"{source}: its rope_freqs are not Llama 3's scaling, the only kind supported here")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }

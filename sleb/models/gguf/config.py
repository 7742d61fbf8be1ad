"""Names of tensors and Hugging Face configuration files from a GGUF file's metadata.

What a key means and what stands for an absent one is as in llama.cpp (src/llama-model.cpp, load_hparams), except where
a line says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from sleb.errors import ModelError
from sleb.fields import Fields, shown, shown_path
from sleb.models.families import FAMILIES, Family
from sleb.models.gguf.vocabulary import Vocabulary

Floats = npt.NDArray[np.float32]

ARCHITECTURES = tuple(dict.fromkeys(family.gguf.name for family in FAMILIES.values() if family.gguf))
_MAX_EXPERTS = 1 << 10
_MAX_WIDTH, _MAX_HEAD_DIM, _MAX_POSITIONS, _MAX_FACTOR = 1 << 20, 1 << 12, (1 << 31) - 1, 1e6
# general.sampling.*: the name in generation_config.json, the least and the largest value.
_SAMPLING = {
    "temp": ("temperature", 0.0, 100.0),
    "top_p": ("top_p", 0.0, 1.0),
    "min_p": ("min_p", 0.0, 1.0),
    "penalty_repeat": ("repetition_penalty", 0.01, 100.0),
}


def architecture_of(fields: Fields) -> Family:
    """The family that the metadata names. Raises ModelError when there is none, or for mixtures of experts."""
    source, name = shown_path(fields.source), fields.string("general.architecture")
    named = [family for family in FAMILIES.values() if family.gguf and family.gguf.name == name]
    if not named:
        raise ModelError(
            f"{source}: architecture {shown(name)} is not supported; supported: {', '.join(ARCHITECTURES)} "
            "(Mistral and SmolLM2 files say llama)"
        )
    if fields.integer("split.count", 0, 1 << 16, 1) > 1:
        raise ModelError(
            f"{source} is one part of several: join them with llama.cpp's llama-gguf-split --merge"
        )
    has_experts = fields.integer(f"{name}.expert_count", 0, _MAX_EXPERTS, 0) > 0
    telling = (
        each for each in named if each.gguf and each.gguf.needs and f"{name}.{each.gguf.needs}" in fields
    )
    family = next(telling, next(each for each in named if each.gguf and not each.gguf.needs))
    if has_experts and family.experts is None:
        raise ModelError(f"{source}: mixtures of experts are not supported in architecture {name}")
    return family


def model_config(
    fields: Fields,
    vocabulary_size: int,
    names: frozenset[str],
    rope_factors: Mapping[str, Floats],
    dtype: str,
) -> dict[str, Any]:
    """The fields of config.json, by the table's names for them.

    `names`: the file's tensors. `rope_factors`: its tensors that scale rotation frequencies, by name. Raises
    ModelError for a missing or wrong key, or a shape that the architecture's Hugging Face class cannot express.
    """
    family = architecture_of(fields)
    a = fields.string("general.architecture")
    blocks = fields.integer(f"{a}.block_count", 1, len(names))  # a block has tensors
    hidden_size = fields.integer(f"{a}.embedding_length", 1, _MAX_WIDTH)
    num_heads = _uniform(fields, f"{a}.attention.head_count", blocks, hidden_size)
    num_key_value_heads = _uniform(fields, f"{a}.attention.head_count_kv", blocks, num_heads, num_heads)
    shared = num_heads % num_key_value_heads == 0 and family.qkv_layout == "stacked"
    if num_key_value_heads != num_heads and not shared:
        wanted = "a divisor of head_count" if family.qkv_layout == "stacked" else "head_count"
        raise fields.wrong(f"{a}.attention.head_count_kv", f"{wanted}, {num_heads}")
    head_dim = fields.integer(f"{a}.attention.key_length", 2, _MAX_HEAD_DIM, hidden_size // num_heads)
    if fields.integer(f"{a}.attention.value_length", 2, _MAX_HEAD_DIM, head_dim) != head_dim:
        raise fields.wrong(f"{a}.attention.value_length", f"that of a key, {head_dim}")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocabulary_size,
        "hidden_size": hidden_size,
        "intermediate_size": _uniform(fields, f"{a}.feed_forward_length", blocks, _MAX_WIDTH),
        "num_hidden_layers": blocks,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "hidden_act": family.fields["hidden_act"],  # no key says it
        "max_position_embeddings": fields.integer(f"{a}.context_length", 1, _MAX_POSITIONS),
        "tie_word_embeddings": "output.weight" not in names,
        "torch_dtype": dtype,
    }
    epsilon = f"{a}.attention.layer_norm_{'rms_' if family.norm == 'rms' else ''}epsilon"
    if isinstance(family.norm_eps, str):
        config[family.norm_eps] = _shortest(fields.number(epsilon, 0, 1))
    elif _shortest(fields.number(epsilon, 0, 1, family.norm_eps)) != family.norm_eps:
        raise fields.wrong(epsilon, f"{family.norm_eps:g}, which {family.architecture} computes with")
    switches = (family.qkv_bias, family.out_bias, family.mlp_bias)
    parts = (("attn_q", "attn_qkv"), ("attn_output",), ("ffn_up", "ffn_down"))
    for switch in dict.fromkeys(switch for switch in switches if isinstance(switch, str)):
        config[switch] = any(
            f"blk.0.{part}.bias" in names
            for each, some in zip(switches, parts, strict=True)
            for part in some
            if each == switch
        )
    if family.position == "rope":
        config["rope_theta"] = _shortest(fields.number(f"{a}.rope.freq_base", 0, 1e12, 10000.0, above=True))
        config["rope_scaling"] = None
        config |= _Rotation(fields, a, config, family).fields(rope_factors)
    _add_stated(fields, a, family, config)
    if isinstance(family.local_rope_theta, float):  # no field says it: an object for each kind of layer does
        scaling = {
            "rope_theta": config["rope_theta"],
            **(config.pop("rope_scaling") or {"rope_type": "default"}),
        }
        sliding = {"rope_type": "default", "rope_theta": config["rope_theta"]}
        config["rope_parameters"] = {"full_attention": scaling, "sliding_attention": sliding}
    _add_windows(fields, a, family, config)
    return config


def _add_stated(fields: Fields, architecture: str, family: Family, config: dict[str, Any]) -> None:
    """What the family's own keys say."""
    assert family.gguf is not None
    for name, (short, absent) in family.gguf.keys.items():
        key, stated = f"{architecture}.{short}", None
        if absent is ...:
            stated = fields.integer(key, 1, _MAX_WIDTH)
        elif isinstance(absent, bool):
            stated = fields.boolean(key, None)
        elif short is not None and isinstance(fields.values.get(key), int):
            stated = fields.integer(key, 0, _MAX_WIDTH) or None  # 0: there is none
        elif short is not None:
            stated = fields.number(key, -_MAX_FACTOR, 1e12, None) or None
        if stated is None:
            stated = absent(config) if callable(absent) else absent
        config[name] = _shortest(stated) if isinstance(stated, float) else stated


def _add_windows(fields: Fields, architecture: str, family: Family, config: dict[str, Any]) -> None:
    """As `load_swa_pattern`: blocks are listed, or every so manieth attends to all of the context."""
    assert family.gguf is not None
    every, blocks = family.gguf.full_every, config["num_hidden_layers"]
    if every is None:
        return
    key = f"{architecture}.attention.sliding_window"
    window = fields.integer(key, 0, _MAX_POSITIONS, config.get("sliding_window") or 0)
    config["sliding_window"] = window or None
    if "layer_types" not in family.fields:
        if window >= config["max_position_embeddings"]:
            config["sliding_window"] = None
        return
    key += "_pattern"
    if isinstance(stated := fields.values.get(key), list):
        if len(stated) != blocks:
            raise fields.wrong(key, f"a list with a value for each of the {blocks} blocks")
        slides = [bool(each) for each in stated]
    else:
        every = fields.integer(key, 0, _MAX_POSITIONS, every)
        slides = [not every or (block + 1) % every != 0 for block in range(blocks)]
    kinds = ["sliding_attention" if window and each else "full_attention" for each in slides]
    config["layer_types"] = kinds


def generation_config(fields: Fields, vocabulary: Vocabulary) -> dict[str, Any]:
    """The contents of generation_config.json: the special ids, and sampling values only if the file states any."""
    sampling: dict[str, Any] = {}
    for key, (name, least, most) in _SAMPLING.items():
        value = fields.number(f"general.sampling.{key}", least, most, None)
        if value is not None:
            sampling[name] = _shortest(value)
    top_k = fields.integer("general.sampling.top_k", 0, (1 << 31) - 1, None)
    if top_k is not None:
        sampling["top_k"] = top_k
    if sampling.get("temperature", 0.0) > 0.0:
        sampling["do_sample"] = True
    return token_ids(vocabulary) | sampling


def token_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """The special ids as config.json and generation_config.json have them."""
    ends = vocabulary.ends()
    found = {
        "bos_token_id": vocabulary.ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.ids.get("padding"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _uniform(fields: Fields, key: str, blocks: int, most: int, default: int | None = None) -> int:
    """An integer from 1 to `most`, which may be given once for each block if it is the same for all."""
    value = fields.values.get(key, default)
    if isinstance(value, list):
        if len(value) != blocks or value != value[:1] * blocks:
            raise fields.wrong(key, f"one number, or the same for each of the {blocks} blocks")
        value = value[0]
    return Fields({key: value}, fields.source).integer(key, 1, most)  # type: ignore[no-any-return]


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Rotation:
    """The fields of config.json that say how positions rotate, where they differ from the plain case."""

    def __init__(self, fields: Fields, architecture: str, config: Mapping[str, Any], family: Family) -> None:
        self._fields, self._prefix = fields, f"{architecture}.rope."
        self._is_phi3 = architecture == "phi3"
        self._share: float | None = family.fields.get("partial_rotary_factor")  # of a head; None: all of it
        self._head_dim, self._theta = config["head_dim"], config["rope_theta"]
        self._rotated = fields.integer(f"{self._prefix}dimension_count", 2, self._head_dim, self._head_dim)
        positions, key = config["max_position_embeddings"], "scaling.original_context_length"
        self._original = fields.integer(f"{self._prefix}{key}", 1, _MAX_POSITIONS, positions)

    def fields(self, factors: Mapping[str, Floats]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        partial = self._share is not None
        if self._rotated % 2 or (self._rotated != self._head_dim and not partial):
            wanted = "an even number" if partial else f"the head's size, {self._head_dim}, and even"
            raise self._fields.wrong(f"{self._prefix}dimension_count", wanted)
        if partial and (self._rotated != self._head_dim or self._share != 1.0):
            fields["partial_rotary_factor"] = self._rotated / self._head_dim
        if self._is_phi3:
            fields["original_max_position_embeddings"] = self._original
        scaling = self._scaling(factors)
        return fields | ({"rope_scaling": scaling} if scaling else {})

    def _scaling(self, factors: Mapping[str, Floats]) -> dict[str, Any] | None:
        kinds = ("none", "linear", "yarn", "longrope")
        kind = self._fields.string(f"{self._prefix}scaling.type", kinds, "linear")
        factor = 1.0 if kind == "none" else self._factor()
        magnitude = self._number("scaling.attn_factor", 1.0)
        if "rope_factors_long.weight" in factors or "rope_factors_short.weight" in factors:
            self._refuse_factor(factor)
            both = {name: self._checked(factors, f"rope_factors_{name}.weight") for name in ("short", "long")}
            return {
                "rope_type": "longrope",
                **{f"{name}_factor": [_shortest(value) for value in each] for name, each in both.items()},
                "original_max_position_embeddings": self._original,
                "attention_factor": _shortest(magnitude),  # transformers would derive it; llama.cpp takes 1
            }
        if "rope_freqs.weight" in factors:
            stored = self._checked(factors, "rope_freqs.weight")
            if scaling := _llama3_scaling(stored, self._rotated, self._theta, self._fields.source):
                self._refuse_factor(factor)
                self._refuse_magnitude(magnitude)
                return scaling
        if kind == "yarn" and factor != 1.0:
            return self._yarn(factor, magnitude)
        self._refuse_magnitude(magnitude)
        if kind == "longrope":
            raise self._fields.wrong(
                f"{self._prefix}scaling.type", "none, linear or yarn in a file without rope_factors_long"
            )
        return {"rope_type": "linear", "factor": _shortest(factor)} if factor != 1.0 else None

    def _factor(self) -> float:
        """By what positions are divided; 0 stands for 1. `scale_linear` is the key's name of before November 2023."""
        values = (
            self._fields.number(f"{self._prefix}{key}", 0, _MAX_FACTOR, None)
            for key in ("scaling.factor", "scale_linear")
        )
        return next((float(value) for value in values if value is not None), 0.0) or 1.0

    def _refuse_factor(self, factor: float) -> None:
        if factor != 1.0:
            key = "scaling.factor" if f"{self._prefix}scaling.factor" in self._fields else "scale_linear"
            raise self._fields.wrong(f"{self._prefix}{key}", "1 beside tensors that scale frequencies")

    def _refuse_magnitude(self, magnitude: float) -> None:
        if magnitude != 1.0:
            raise self._fields.wrong(f"{self._prefix}scaling.attn_factor", "1, but for yarn and longrope")

    def _number(self, key: str, default: float | None) -> Any:
        return self._fields.number(f"{self._prefix}{key}", 0, _MAX_FACTOR, default, above=True)

    def _checked(self, factors: Mapping[str, Floats], name: str) -> Floats:
        half = self._rotated // 2
        found = factors.get(name)
        if found is None or found.shape != (half,) or not (np.isfinite(found) & (found > 0)).all():
            raise ModelError(
                f"{shown_path(self._fields.source)}: {name} must be {half} numbers above 0, one for each frequency"
            )
        return found

    def _yarn(self, factor: float, magnitude: float) -> dict[str, Any]:
        """`yarn_attn_factor` is what writers copy from transformers' attention_factor: all of it, where llama.cpp's own
        `attn_factor` multiplies what the scaling gives, 0.1 ln factor + 1.
        """
        refused = {"yarn_ext_factor": (-1.0, 1.0), "yarn_log_multiplier": (0.0,)}
        for key, allowed in refused.items():
            if self._fields.number(f"{self._prefix}scaling.{key}", -1e6, 1e6, allowed[0]) not in allowed:
                raise self._fields.wrong(f"{self._prefix}scaling.{key}", f"{allowed[-1]:g}, or absent")
        scaling = {"rope_type": "yarn", "factor": _shortest(factor)}
        scaling["original_max_position_embeddings"] = self._original
        for key in ("beta_fast", "beta_slow"):
            if (value := self._number(f"scaling.yarn_{key}", None)) is not None:
                scaling[key] = _shortest(value)
        stated = self._number("scaling.yarn_attn_factor", None)
        if stated is not None or magnitude != 1.0:
            whole = 0.1 * math.log(max(factor, 1.0)) + 1.0 if stated is None else stated
            scaling["attention_factor"] = _shortest(whole * magnitude)
        return scaling


def _llama3_scaling(stored: Floats, rotated: int, theta: float, source: object) -> dict[str, Any] | None:
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
    if not np.allclose(expected, stored, rtol=1e-3):
        raise ModelError(
            f"{shown_path(source)}: its rope_freqs are not Llama 3's scaling, the only kind supported here"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }

"""Families of models as data: one entry says what a decoder computes, how its tensors are named, in a checkpoint and in
a GGUF file, and which fields of its config.json are read.

A family that computes what another one does is one more entry of `FAMILIES`, and a line of `tests/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sleb.layer_map.fingerprint import shape_fingerprint

_HEADS = ("num_key_value_heads", "head_dim")


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint names of an architecture's modules; `.weight` and `.bias` are appended.

    `qkv` and `up` list the modules that are stacked, in order, into one fused matrix; a checkpoint that stores
    them fused lists one module.
    """

    embed: str = "model.embed_tokens"
    block: str = "model.layers.{block}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    position_embed: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Gguf:
    """The name of a family in GGUF files; `interleaved`: the rows of q and k are stored in the order of llama.cpp's
    rotation, pair by pair.
    """

    name: str
    interleaved: bool = False


@dataclass(frozen=True)
class Family:
    """What every checkpoint of an architecture shares.

    Attributes:
        architecture: the name of its class in transformers. model_type: as its config.json has it.
        shape_defaults: what transformers' configuration class fills in for a shape that config.json leaves out, in the
            order of `sleb.layer_map.fingerprint.FIELDS`; None: derived from the others.
        norm_eps: a number, or the config's field. activation, intermediate_size: the config's fields.
        position_offset: added to positions before the learned table is read.
        qkv_bias, out_bias, mlp_bias: whether there are biases, or the config's field that says so.
        reads: further fields of the config that are read, where it has them; no other one is.
        gguf: None where its GGUF files are not read, or say that they are of another family.
    """

    architecture: str
    model_type: str
    shape_defaults: tuple[int | None, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | str = "rms_norm_eps"
    position: Literal["rope", "learned"] = "rope"
    position_offset: int = 0
    activation: str = "hidden_act"
    intermediate_size: str = "intermediate_size"
    gated: bool = True
    qk_norm: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    reads: tuple[str, ...] = _HEADS
    names: TensorNames = field(default_factory=TensorNames)
    gguf: Gguf | None = None


_WINDOWS = (*_HEADS, "sliding_window", "use_sliding_window", "layer_types")

_ALL = (
    Family(
        "LlamaForCausalLM",
        "llama",
        (32, 4096, 11008, 32, None, None, 32000),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        gguf=Gguf("llama", interleaved=True),
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        (32, 4096, 14336, 32, 8, None, 32000),
        reads=(*_HEADS, "sliding_window"),
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        (32, 4096, 22016, 32, 32, None, 151936),
        qkv_bias=True,
        reads=_WINDOWS,
        gguf=Gguf("qwen2"),
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        (32, 4096, 22016, 32, 32, 128, 151936),
        qk_norm=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        reads=_WINDOWS,
        gguf=Gguf("qwen3"),
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        (36, 2048, 11008, 16, 4, None, 128256),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        reads=(*_WINDOWS, "no_rope_layers"),
        gguf=Gguf("smollm3", interleaved=True),
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        (32, 3072, 8192, 32, None, None, 32064),
        reads=(*_HEADS, "sliding_window"),
        names=TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
        gguf=Gguf("phi3"),
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        (12, 768, 3072, 12, None, None, 50272),
        norm="layer",
        norm_eps=1e-5,
        position="learned",
        position_offset=2,
        activation="activation_function",
        intermediate_size="ffn_dim",
        gated=False,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
        reads=(
            *("word_embed_proj_dim", "do_layer_norm_before", "layer_norm_elementwise_affine"),
            "_remove_final_layer_norm",
        ),
        names=TensorNames(
            embed="model.decoder.embed_tokens",
            block="model.decoder.layers.{block}",
            final_norm="model.decoder.final_layer_norm",
            position_embed="model.decoder.embed_positions",
            project_in="model.decoder.project_in",
            project_out="model.decoder.project_out",
            attention_norm="self_attn_layer_norm",
            attention_out="self_attn.out_proj",
            mlp_norm="final_layer_norm",
            up=("fc1",),
            down="fc2",
        ),
    ),
)
FAMILIES: dict[str, Family] = {family.architecture: family for family in _ALL}


def model_fingerprint(config: Mapping[str, Any]) -> str:
    """The fingerprint of the shape in a config.json, with what its family fills in: see `shape_fingerprint`."""
    model_type = str(config.get("model_type", "unknown"))
    defaults = [family.shape_defaults for family in _ALL if family.model_type == model_type]
    return shape_fingerprint(model_type, config, defaults[0] if defaults else None)

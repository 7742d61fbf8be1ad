"""Families of models as data: one entry says what a decoder computes, how its tensors are named, in a checkpoint and in
a GGUF file, and which fields of its config.json are read.

A family that computes what another one does is one more entry of `FAMILIES`, and a line of `tests/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# A number, the config's field that holds it, or a function of the fields' values. None: there is none.
Formula = float | str | Callable[[Mapping[str, Any]], float | None] | None


@dataclass(frozen=True)
class TensorNames:
    """Checkpoint names of an architecture's modules; `.weight` and `.bias` are appended.

    `qkv` and `up` list the modules that are stacked, in order, into one fused matrix; a checkpoint that stores
    them fused lists one module. A norm that is None is not there; where the MLP has none in a parallel block, the
    attention's serves both. The post norms are of a sublayer's update, before it is added.
    """

    embed: str = "model.embed_tokens"
    block: str = "model.layers.{block}"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    position_embed: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_out: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


@dataclass(frozen=True)
class Gguf:
    """A family in GGUF files.

    Attributes:
        name: its general.architecture. needs: a key without which a file of that name is of another family.
        interleaved: the rows of q and k are stored in the order of llama.cpp's rotation, pair by pair.
        mlp_norm: what the norm before the MLP is called.
        keys: for fields of config.json, the key (None: there is none) and what an absent one or 0 stands for: a value,
            or a function of the fields so far. Those that all families have are not listed.
        full_every: where a file does not list the blocks that attend to a window only, every so manieth does not: 0:
            all do. None: windows are not known.
    """

    name: str
    interleaved: bool = False
    needs: str | None = None
    mlp_norm: str = "ffn_norm"
    keys: Mapping[str, tuple[str | None, Any]] = field(default_factory=dict)
    full_every: int | None = None


@dataclass(frozen=True)
class Family:
    """What every checkpoint of an architecture shares.

    Attributes:
        architecture: the name of its class in transformers. model_type: as its config.json has it.
        fields: those of config.json that are read, and no other one is; each with what transformers' configuration
            class fills in where it is absent. Their types and bounds: `sleb.models.config`.
        norm_eps: a number, or the config's field. activation, intermediate_size: the config's fields.
        norm_affine, norm_bias: whether norms have weights, and layer norms biases, or the field that says so.
        norm_shift: what is added to the norms' weights as they are stored.
        position_offset: added to positions before the learned table is read.
        rope_layers: "sliding" where blocks that attend to all of the context do not rotate.
        interleaved: rotation pairs neighbouring features, (2i, 2i + 1), rather than (i, i + R / 2).
        full_every: where the config does not list kinds of layers, every so manieth block attends to all of the
            context and the others to a window: a number, or the config's field.
        parallel: whether attention and MLP of a block read the same residual, or the config's field that says so.
        qk_norm: of each head alone, weight [D], or of all heads together, weight [H · D]; of the kind of the norms.
        qk_norm_after_rotation: or before it. clip_qkv: what queries, keys and values are clamped to, ± this.
        embed_scale, residual_scale, logit_scale: factors on the embedding, on each sublayer's update, on the logits.
        attention_scale: factor on the scores; None: 1 / sqrt(D).
        attention_softcap, logit_softcap: c of c · tanh(x / c), on scores and logits.
        sinks: each head has a logit of its own in the softmax's denominator.
        qkv_bias, out_bias, mlp_bias, head_bias: whether there are biases, or the config's field that says so.
        qkv_layout: rows of the one fused module: all queries, keys and values, or those of each head in turn.
        transposed: matrices in attention and MLP are stored [in, out].
        gguf: None where its GGUF files are not read, or say that they are of another family.
    """

    architecture: str
    model_type: str
    fields: Mapping[str, Any]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | str = "rms_norm_eps"
    norm_affine: bool | str = True
    norm_bias: bool | str = True
    norm_shift: float = 0.0
    position: Literal["rope", "learned"] = "rope"
    position_offset: int = 0
    rope_layers: Literal["all", "sliding"] = "all"
    interleaved: bool = False
    full_every: int | str | None = None
    parallel: bool | str = False
    activation: str = "hidden_act"
    intermediate_size: str = "intermediate_size"
    gated: bool = True
    qk_norm: Literal["head", "whole"] | None = None
    qk_norm_after_rotation: bool = False
    clip_qkv: str | None = None
    embed_scale: Formula = 1.0
    attention_scale: Formula = None
    residual_scale: Formula = 1.0
    logit_scale: Formula = 1.0
    attention_softcap: Formula = None
    logit_softcap: Formula = None
    sinks: bool = False
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    qkv_layout: Literal["stacked", "heads"] = "stacked"
    transposed: bool = False
    names: TensorNames = field(default_factory=TensorNames)
    gguf: Gguf | None = None


def _rotary_fields(*shape: int | None, positions: int, **own: Any) -> dict[str, Any]:
    """What all families with rotary embedding read; `shape` in the order of its names, `own` beside or instead."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    heads = ("num_key_value_heads", "head_dim", "vocab_size")
    return {
        **dict(zip(names + heads, shape, strict=True)),
        "max_position_embeddings": positions,
        "original_max_position_embeddings": None,  # rotary scaling takes it before the one in its own object
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **own,
    }


_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}

_ALL = (
    Family(
        "LlamaForCausalLM",
        "llama",
        _rotary_fields(
            *(32, 4096, 11008, 32, None, None, 32000),
            positions=2048,
            attention_bias=False,
            mlp_bias=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        gguf=Gguf("llama", interleaved=True),
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        _rotary_fields(
            *(32, 4096, 14336, 32, 8, None, 32000),
            positions=131072,
            sliding_window=4096,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        _rotary_fields(*(32, 4096, 22016, 32, 32, None, 151936), positions=32768, **_WINDOWS),
        qkv_bias=True,
        gguf=Gguf("qwen2"),
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        _rotary_fields(
            *(32, 4096, 22016, 32, 32, 128, 151936), positions=32768, attention_bias=False, **_WINDOWS
        ),
        qk_norm="head",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        gguf=Gguf("qwen3"),
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        _rotary_fields(
            *(36, 2048, 11008, 16, 4, None, 128256),
            positions=32768,
            rope_theta=2e6,
            attention_bias=False,
            mlp_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            layer_types=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
        ),
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        gguf=Gguf("smollm3", interleaved=True),
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        _rotary_fields(
            *(32, 3072, 8192, 32, None, None, 32064),
            positions=4096,
            original_max_position_embeddings=4096,
            partial_rotary_factor=1.0,
            rms_norm_eps=1e-5,
            sliding_window=None,
            bos_token_id=1,
            eos_token_id=32000,
            pad_token_id=32000,
        ),
        names=TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
        gguf=Gguf("phi3", full_every=0),
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        {
            "num_hidden_layers": 12,
            "hidden_size": 768,
            "ffn_dim": 3072,
            "num_attention_heads": 12,
            "vocab_size": 50272,
            "max_position_embeddings": 2048,
            "word_embed_proj_dim": None,
            "activation_function": "relu",
            "enable_bias": True,
            "do_layer_norm_before": True,
            "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        norm="layer",
        norm_eps=1e-5,
        norm_affine="layer_norm_elementwise_affine",
        position="learned",
        position_offset=2,
        activation="activation_function",
        intermediate_size="ffn_dim",
        gated=False,
        qkv_bias="enable_bias",
        out_bias="enable_bias",
        mlp_bias="enable_bias",
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

"""Architectures as data: what a decoder computes and how its checkpoint names the tensors.

A `Family` holds what all checkpoints of an architecture share; `resolve_spec` joins it with the numbers of one
checkpoint's config into a `DecoderSpec`, which is all that the decoder and the weight loader look at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sleb.errors import ModelError
from sleb.kernels.reference.ops import ACTIVATIONS
from sleb.layer_map.layer_map import model_fingerprint

Flag = bool | Callable[[Any], bool]


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
class Family:
    """What every checkpoint of an architecture shares. A callable flag is decided by the checkpoint's config."""

    model_types: tuple[str, ...]
    norm: Literal["rms", "layer"] = "rms"
    position: Literal["rope", "learned"] = "rope"
    gated: bool = True
    qk_norm: bool = False
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    names: TensorNames = field(default_factory=TensorNames)


def _attention_bias(config: Any) -> bool:
    return bool(getattr(config, "attention_bias", False))


def _mlp_bias(config: Any) -> bool:
    return bool(getattr(config, "mlp_bias", False))


def _enable_bias(config: Any) -> bool:
    return bool(config.enable_bias)


_PHI3_NAMES = TensorNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
_OPT_NAMES = TensorNames(
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
)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        ("llama",), qkv_bias=_attention_bias, out_bias=_attention_bias, mlp_bias=_mlp_bias
    ),
    "MistralForCausalLM": Family(("mistral",)),
    "Qwen2ForCausalLM": Family(("qwen2",), qkv_bias=True),
    "Qwen3ForCausalLM": Family(("qwen3",), qk_norm=True, qkv_bias=_attention_bias, out_bias=_attention_bias),
    "SmolLM3ForCausalLM": Family(
        ("smollm3",), qkv_bias=_attention_bias, out_bias=_attention_bias, mlp_bias=_mlp_bias
    ),
    "Phi3ForCausalLM": Family(("phi3",), names=_PHI3_NAMES),
    "OPTForCausalLM": Family(
        ("opt",),
        norm="layer",
        position="learned",
        gated=False,
        qkv_bias=_enable_bias,
        out_bias=_enable_bias,
        mlp_bias=_enable_bias,
        names=_OPT_NAMES,
    ),
}


@dataclass(frozen=True)
class DecoderSpec:
    """One checkpoint's decoder as data. Sizes are counts of features, heads, blocks or tokens.

    Attributes:
        embed_size: width of the token embedding; differs from hidden_size where the checkpoint projects it.
        norm_first: norms stand before attention and MLP; otherwise after the residual add (OPT-350M).
        final_norm: whether a norm stands before the head.
        position_offset: added to positions before the learned table is read (2 in OPT).
        rotary_blocks: for each block, whether its queries and keys are rotated (SmolLM3 leaves some out).
        windows: for each block, the sliding window in tokens, or None.
        config: the parsed Hugging Face config; read for rotary frequencies only.
        fingerprint: of the shape, as layer maps record it.
    """

    architecture: str
    num_blocks: int
    hidden_size: int
    embed_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_affine: bool
    norm_first: bool
    final_norm: bool
    activation: str
    gated: bool
    position: Literal["rope", "learned"]
    position_offset: int
    rotary_blocks: tuple[bool, ...]
    windows: tuple[int | None, ...]
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    names: TensorNames
    fingerprint: str
    checkpoint_dtype: str | None
    config: Any = field(repr=False, compare=False)

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def read_config(path: Path) -> dict[str, Any]:
    """The dictionary in `path`/config.json. Raises ModelError when it is absent or not a JSON object."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} has no config.json; MODEL must be a Hugging Face model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error}); download the model again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file} holds no JSON object; download the model again")
    return config


def resolve_spec(path: Path) -> DecoderSpec:
    """The DecoderSpec of the checkpoint folder `path`.

    Raises ModelError for an architecture or a variant of one that sleb does not run, naming what it does.
    """
    raw = read_config(path)
    architecture = _architecture(raw, path)
    family = FAMILIES[architecture]
    config = _parse_config(path, architecture)
    num_heads, num_blocks = int(config.num_attention_heads), int(config.num_hidden_layers)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{path}: {num_heads} heads cannot share {num_kv_heads} key-value heads evenly")
    learned = family.position == "learned"
    activation = config.activation_function if learned else config.hidden_act
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"{path}: activation '{activation}' is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    norm_first = bool(getattr(config, "do_layer_norm_before", True))
    return DecoderSpec(
        architecture=architecture,
        num_blocks=num_blocks,
        hidden_size=int(config.hidden_size),
        embed_size=int(getattr(config, "word_embed_proj_dim", config.hidden_size)),
        intermediate_size=int(config.ffn_dim if learned else config.intermediate_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        norm=family.norm,
        norm_eps=1e-5 if learned else float(config.rms_norm_eps),
        norm_affine=bool(getattr(config, "layer_norm_elementwise_affine", True)),
        norm_first=norm_first,
        final_norm=norm_first and not getattr(config, "_remove_final_layer_norm", False),
        activation=activation,
        gated=family.gated,
        position=family.position,
        position_offset=2 if learned else 0,
        rotary_blocks=_rotary_blocks(config, family, num_blocks),
        windows=_windows(config, num_blocks),
        qk_norm=family.qk_norm,
        qkv_bias=_decide(family.qkv_bias, config),
        out_bias=_decide(family.out_bias, config),
        mlp_bias=_decide(family.mlp_bias, config),
        tied_embeddings=bool(config.tie_word_embeddings),
        names=family.names,
        fingerprint=model_fingerprint(raw),
        checkpoint_dtype=raw.get("dtype") or raw.get("torch_dtype"),
        config=config,
    )


def _architecture(raw: Mapping[str, Any], path: Path) -> str:
    named = raw.get("architectures") or []
    for architecture in named:
        if architecture in FAMILIES:
            return str(architecture)
    if not named:
        for architecture, family in FAMILIES.items():
            if raw.get("model_type") in family.model_types:
                return architecture
    found = ", ".join(map(str, named)) or raw.get("model_type") or "none named"
    raise ModelError(f"{path}: architecture {found} is not supported; sleb runs {', '.join(FAMILIES)}")


def _parse_config(path: Path, architecture: str) -> Any:
    """The typed config, with the architecture's defaults filled in; never runs code of the checkpoint."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{path}/config.json is not a valid {architecture} config: {error}") from error
    if config.model_type not in FAMILIES[architecture].model_types:
        raise ModelError(f"{path}/config.json names {architecture} but model_type {config.model_type}")
    return config


def _decide(flag: Flag, config: Any) -> bool:
    return flag(config) if callable(flag) else flag


def _rotary_blocks(config: Any, family: Family, num_blocks: int) -> tuple[bool, ...]:
    if family.position != "rope":
        return (False,) * num_blocks
    pattern = getattr(config, "no_rope_layers", None)  # named for its zeros: 1 means "rotate"
    return tuple(bool(value) for value in pattern) if pattern else (True,) * num_blocks


def _windows(config: Any, num_blocks: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * num_blocks
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * num_blocks
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)

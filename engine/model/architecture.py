"""A checkpoint's decoder as data: `resolve_spec` joins its family (`sleb.models.families`) with the numbers of its
config into a `DecoderSpec`, which is all that the decoder and the weight loader look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sleb.engine.model.rotary import Rotary, read_rotary
from sleb.fields import Fields
from sleb.kernels.reference.ops import ACTIVATIONS
from sleb.models.config import (
    checkpoint_dtype,
    family_of,
    model_fingerprint,
    read_config,
    read_fields,
)
from sleb.models.families import TensorNames


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
        rotary: how queries and keys are rotated; None with learned positions.
        fingerprint: of the shape, as layer maps record it.
        special_token_ids: what config.json names as "bos", "eos" and "pad"; the vocabulary need not have them.
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
    rotary: Rotary | None
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
    special_token_ids: Mapping[str, tuple[int, ...]]

    @property
    def longest_context(self) -> int:
        """What --max-model-len may ask for: more than `max_positions` where rotation is stretched past them."""
        return max(self.max_positions, 0 if self.rotary is None else self.rotary.longest)

    @property
    def short_context(self) -> int | None:
        """The length past which all of a sequence is rotated by other frequencies; None: one set serves all."""
        return self.rotary.original if self.rotary is not None and self.rotary.long_frequencies else None

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def resolve_spec(path: Path) -> DecoderSpec:
    """The DecoderSpec of the checkpoint folder `path`.

    Raises ModelError for an architecture or a variant of one that sleb does not run, naming what it does, and for a
    field of config.json that is not what it may be.
    """
    config = read_config(path)
    family = family_of(config)
    values = read_fields(config, family)
    read = values.get
    num_heads, num_blocks = values["num_attention_heads"], values["num_hidden_layers"]
    num_kv_heads = read("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    head_dim = read("head_dim") or values["hidden_size"] // num_heads
    if head_dim < 1:
        raise config.wrong("hidden_size", f"num_attention_heads, {num_heads}, or more")
    if values[family.activation] not in ACTIVATIONS:
        raise config.wrong(family.activation, f"one of {', '.join(ACTIVATIONS)}")
    norm_first = read("do_layer_norm_before", True)
    rotary_blocks = (
        _rotary_blocks(config, values, num_blocks) if family.position == "rope" else (False,) * num_blocks
    )
    return DecoderSpec(
        architecture=family.architecture,
        num_blocks=num_blocks,
        hidden_size=values["hidden_size"],
        embed_size=read("word_embed_proj_dim") or values["hidden_size"],
        intermediate_size=values[family.intermediate_size],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        norm=family.norm,
        norm_eps=_value(family.norm_eps, values),
        norm_affine=read("layer_norm_elementwise_affine", True),
        norm_first=norm_first,
        final_norm=norm_first and not read("_remove_final_layer_norm", False),
        activation=values[family.activation],
        gated=family.gated,
        position=family.position,
        position_offset=family.position_offset,
        rotary=read_rotary(config, values, head_dim) if family.position == "rope" else None,
        rotary_blocks=rotary_blocks,
        windows=_windows(config, values, num_blocks, rotary_blocks),
        qk_norm=family.qk_norm,
        qkv_bias=_value(family.qkv_bias, values),
        out_bias=_value(family.out_bias, values),
        mlp_bias=_value(family.mlp_bias, values),
        tied_embeddings=values["tie_word_embeddings"],
        names=family.names,
        fingerprint=model_fingerprint(config),
        checkpoint_dtype=checkpoint_dtype(config),
        special_token_ids={name: values[f"{name}_token_id"] for name in ("bos", "eos", "pad")},
    )


def _value(value: Any, values: Mapping[str, Any]) -> Any:
    """What a family says itself, or leaves to a field of the config."""
    return values[value] if isinstance(value, str) else value


def _rotary_blocks(config: Fields, values: Mapping[str, Any], num_blocks: int) -> tuple[bool, ...]:
    if "no_rope_layers" not in values:
        return (True,) * num_blocks
    pattern = values["no_rope_layers"]  # named for its zeros: 1 means "rotate"
    if pattern is None:
        interval = values["no_rope_layer_interval"]
        pattern = [(block + 1) % interval for block in range(num_blocks)]
    return _a_block_each(config, "no_rope_layers", [bool(value) for value in pattern], num_blocks)


def _windows(
    config: Fields, values: Mapping[str, Any], num_blocks: int, rotary_blocks: Sequence[bool]
) -> tuple[int | None, ...]:
    """As transformers' configuration classes derive them where `layer_types` does not list them."""
    window = values.get("sliding_window")
    if window is None or not values.get("use_sliding_window", True):
        return (None,) * num_blocks
    if window == 0:
        raise config.wrong("sliding_window", "1 or more, or null for none")
    kinds = values.get("layer_types")
    if kinds is not None:
        slides = [kind == "sliding_attention" for kind in kinds]
    elif "max_window_layers" in values:
        slides = [block >= values["max_window_layers"] for block in range(num_blocks)]
    elif "no_rope_layers" in values:
        slides = [not rotates for rotates in rotary_blocks]
    else:
        slides = [True] * num_blocks
    return tuple(
        window if each else None for each in _a_block_each(config, "layer_types", slides, num_blocks)
    )


def _a_block_each(config: Fields, name: str, values: Sequence[bool], num_blocks: int) -> tuple[bool, ...]:
    if len(values) < num_blocks:
        raise config.wrong(name, f"a list with a value for each of {num_blocks} blocks; it has {len(values)}")
    return tuple(values[:num_blocks])

"""A checkpoint's decoder as data: `resolve_spec` joins its family (`sleb.models.families`) with the numbers of its
config into a `DecoderSpec`, which is all that the decoder and the weight loader look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sleb.engine.model.rotary import Rotary, read_rotaries
from sleb.errors import ModelError
from sleb.fields import Fields, shown_path
from sleb.kernels.reference.ops import ACTIVATIONS
from sleb.models.config import (
    checkpoint_dtype,
    family_of,
    model_fingerprint,
    read_config,
    read_fields,
)
from sleb.models.families import Experts, Family, Formula, TensorNames

_MAX_EXPERTS = 1 << 16  # in all blocks: Kimi K2 has 23,040


@dataclass(frozen=True)
class ExpertsSpec:
    """The experts of a decoder's MLPs, as data.

    Attributes:
        number, top_k: how many a block has, and how many of them a token gets.
        intermediate_size, shared_size: features inside one, and inside the one that every token gets; 0: there is none.
        normalised: whether a token's shares add up to 1.
        activation: inside them.
        blocks: for each block, whether it has them.
        names: of tensors, and how those are stored.
    """

    number: int
    top_k: int
    intermediate_size: int
    shared_size: int
    normalised: bool
    activation: str
    blocks: tuple[bool, ...]
    names: Experts


@dataclass(frozen=True)
class DecoderSpec:
    """One checkpoint's decoder as data. Sizes are counts of features, heads, blocks or tokens.

    Attributes:
        embed_size: width of the token embedding; differs from hidden_size where the checkpoint projects it.
        norm_first: norms stand before attention and MLP; otherwise after the residual add (OPT-350M).
        norm_shift: what is added to the norms' weights as they are stored.
        parallel: attention and MLP of a block read the same residual.
        final_norm: whether a norm stands before the head.
        position_offset: added to positions before the learned table is read (2 in OPT).
        rotaries: the ways in which queries and keys are rotated; none with learned positions.
        block_rotary: for each block, which of them is its own, or None: SmolLM3 leaves some out.
        interleaved: the checkpoint's rows of queries and keys are in pairs; loaded ones never are.
        windows: for each block, the sliding window in tokens, or None.
        qk_norm: of each head alone, or of all together; before the rotation, or after it.
        clip_qkv, attention_softcap, logit_softcap: bounds, or None.
        wide_range: the residual stream leaves float16's range.
        experts: what stands in the place of MLPs in some blocks, or all; None: nothing does.
        logit_scale: is part of the final norm's weight once that is loaded.
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
    norm_bias: bool
    norm_shift: float
    norm_first: bool
    final_norm: bool
    activation: str
    gated: bool
    position: Literal["rope", "learned"]
    position_offset: int
    rotaries: tuple[Rotary, ...]
    block_rotary: tuple[int | None, ...]
    interleaved: bool
    windows: tuple[int | None, ...]
    parallel: bool
    qk_norm: Literal["head", "whole"] | None
    qk_norm_after_rotation: bool
    clip_qkv: float | None
    embed_scale: float
    attention_scale: float
    residual_scale: float
    logit_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    sinks: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_bias: bool
    qkv_layout: Literal["stacked", "heads"]
    transposed: bool
    wide_range: bool
    experts: ExpertsSpec | None
    tied_embeddings: bool
    names: TensorNames
    fingerprint: str
    checkpoint_dtype: str | None
    special_token_ids: Mapping[str, tuple[int, ...]]

    @property
    def longest_context(self) -> int:
        """What --max-model-len may ask for: more than `max_positions` where rotation is stretched past them."""
        return max([self.max_positions, *(rotary.longest for rotary in self.rotaries)])

    @property
    def short_context(self) -> int | None:
        """The length past which all of a sequence is rotated by other frequencies; None: one set serves all."""
        return next((rotary.original for rotary in self.rotaries if rotary.long_frequencies), None)

    @property
    def pre_norm(self) -> bool:
        """Whether norms stand before attention and MLP."""
        return self.norm_first and self.names.attention_norm is not None

    @property
    def post_norm(self) -> bool:
        """Whether norms stand after attention and MLP, on what they add."""
        return self.names.attention_post_norm is not None

    @property
    def shared_norm(self) -> bool:
        """Whether one norm stands before both."""
        return self.parallel and self.names.mlp_norm is None

    def has_experts(self, block: int) -> bool:
        """Whether the MLP of `block` is a mixture of experts."""
        return self.experts is not None and self.experts.blocks[block]

    def neurons_of_token(self, block: int) -> int:
        """Features inside the MLP of `block` that are computed for a token."""
        if self.experts is None or not self.experts.blocks[block]:
            return self.intermediate_size
        return self.experts.top_k * self.experts.intermediate_size + self.experts.shared_size

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
    num_kv_heads = read("num_key_value_heads") or family.num_kv_heads or num_heads
    if num_heads % num_kv_heads:
        raise config.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {num_heads}")
    head_dim = read("head_dim") or values["hidden_size"] // num_heads
    if head_dim < 1:
        raise config.wrong(family.own("hidden_size"), f"num_attention_heads, {num_heads}, or more")
    activation = _value(family.activation, values)
    if activation not in ACTIVATIONS:
        raise config.wrong(family.own("hidden_act"), f"one of {', '.join(ACTIVATIONS)}")
    norm_first = read("do_layer_norm_before", True)
    rotates = _rotates(config, values, num_blocks) if family.position == "rope" else (False,) * num_blocks
    windows = _windows(config, family, values, num_blocks, rotates)
    if family.rope_layers == "sliding" or (family.rope_layers != "all" and values["sliding_window"]):
        rotates = tuple(window is not None for window in windows)
    rotaries, kinds = (
        read_rotaries(config, family, values, head_dim) if family.position == "rope" else ((), {})
    )
    return DecoderSpec(
        architecture=family.architecture,
        num_blocks=num_blocks,
        hidden_size=values["hidden_size"],
        embed_size=read("word_embed_proj_dim") or values["hidden_size"],
        intermediate_size=values["intermediate_size"] or 4 * values["hidden_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        norm=family.norm,
        norm_eps=_value(family.norm_eps, values),
        norm_affine=_value(family.norm_affine, values),
        norm_bias=family.norm == "layer" and _value(family.norm_bias, values),
        norm_shift=family.norm_shift,
        norm_first=norm_first,
        final_norm=norm_first and not read("_remove_final_layer_norm", False),
        activation=activation,
        gated=family.gated,
        position=family.position,
        position_offset=family.position_offset,
        rotaries=rotaries,
        block_rotary=tuple(
            kinds["full_attention" if window is None else "sliding_attention"] if turns else None
            for window, turns in zip(windows, rotates, strict=True)
        ),
        interleaved=family.interleaved,
        windows=windows,
        parallel=_value(family.parallel, values),
        qk_norm=family.qk_norm,
        qk_norm_after_rotation=family.qk_norm_after_rotation,
        clip_qkv=_value(family.clip_qkv, values),
        embed_scale=_number(family.embed_scale, values, 1.0),
        attention_scale=_number(family.attention_scale, values, head_dim**-0.5),
        residual_scale=_number(family.residual_scale, values, 1.0),
        logit_scale=_number(family.logit_scale, values, 1.0),
        attention_softcap=_value(family.attention_softcap, values),
        logit_softcap=_value(family.logit_softcap, values),
        sinks=family.sinks,
        qkv_bias=_value(family.qkv_bias, values),
        out_bias=_value(family.out_bias, values),
        mlp_bias=_value(family.mlp_bias, values),
        head_bias=family.head_bias,
        qkv_layout=family.qkv_layout,
        transposed=family.transposed,
        wide_range=family.wide_range,
        experts=_experts(config, family, values, num_blocks),
        tied_embeddings=values["tie_word_embeddings"],
        names=family.names,
        fingerprint=model_fingerprint(config),
        checkpoint_dtype=checkpoint_dtype(config),
        special_token_ids={name: values[f"{name}_token_id"] for name in ("bos", "eos", "pad")},
    )


def _value(value: Any, values: Mapping[str, Any]) -> Any:
    """What a family says itself, or leaves to a field of the config, or to a function of the fields."""
    if callable(value):
        return value(values)
    return values[value] if isinstance(value, str) else value


def _number(formula: Formula, values: Mapping[str, Any], otherwise: float) -> float:
    value = _value(formula, values)
    return otherwise if value is None else float(value)


def _experts(
    config: Fields, family: Family, values: Mapping[str, Any], num_blocks: int
) -> ExpertsSpec | None:
    names = family.experts
    if names is None:
        return None
    number, top_k, size, shared_size = (
        int(_number(each, values, 0))
        for each in (names.number, names.top_k, names.intermediate_size, names.shared_size)
    )
    if not 1 <= top_k <= number:
        raise ModelError(
            f"{shown_path(config.source)}: a token gets {top_k} of {number} experts; it must be 1 or more of them"
        )
    if number * num_blocks > _MAX_EXPERTS:
        raise ModelError(
            f"{shown_path(config.source)}: {num_blocks} blocks of {number} experts are more than {_MAX_EXPERTS}, "
            "several times what the largest models have"
        )
    has_experts = names.has_experts or (lambda block, values: True)
    return ExpertsSpec(
        number=number,
        top_k=top_k,
        intermediate_size=size,
        shared_size=shared_size,
        normalised=_value(names.normalised, values),
        activation=names.activation or _value(family.activation, values),
        blocks=tuple(has_experts(block, values) for block in range(num_blocks)),
        names=names,
    )


def _rotates(config: Fields, values: Mapping[str, Any], num_blocks: int) -> tuple[bool, ...]:
    if "no_rope_layers" not in values:
        return (True,) * num_blocks
    pattern = values["no_rope_layers"]  # named for its zeros: 1 means "rotate"
    if pattern is None:
        interval = values["no_rope_layer_interval"]
        pattern = [(block + 1) % interval for block in range(num_blocks)]
    return _a_block_each(config, "no_rope_layers", [bool(value) for value in pattern], num_blocks)


def _windows(
    config: Fields, family: Family, values: Mapping[str, Any], num_blocks: int, rotates: Sequence[bool]
) -> tuple[int | None, ...]:
    """As transformers' configuration classes derive them where `layer_types` does not list them."""
    window = values.get("sliding_window")
    if window is None or not values.get("use_sliding_window", True):
        return (None,) * num_blocks
    if window == 0:
        raise config.wrong(family.own("sliding_window"), "1 or more, or null for none")
    name = "layer_types" if "layer_types" in values else "attention_layers"
    kinds = values.get(name)
    if kinds is not None:
        slides = [kind in ("sliding_attention", "local") for kind in kinds]
    elif "max_window_layers" in values:
        slides = [block >= values["max_window_layers"] for block in range(num_blocks)]
    elif "no_rope_layers" in values:
        slides = [not each for each in rotates]
    elif family.full_every is not None:
        if not (every := _value(family.full_every, values)):
            raise config.wrong(name, "a list of full_attention and sliding_attention")
        slides = [
            (block + 1) % every != (1 % every if family.full_first else 0) for block in range(num_blocks)
        ]
    else:
        slides = [True] * num_blocks
    return tuple(window if each else None for each in _a_block_each(config, name, slides, num_blocks))


def _a_block_each(config: Fields, name: str, values: Sequence[bool], num_blocks: int) -> tuple[bool, ...]:
    if len(values) < num_blocks:
        raise config.wrong(name, f"a list with a value for each of {num_blocks} blocks; it has {len(values)}")
    return tuple(values[:num_blocks])

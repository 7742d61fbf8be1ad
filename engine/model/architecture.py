"""A checkpoint's decoder as data: `resolve_spec` joins its family (`sleb.models.families`) with the numbers of its
config into a `DecoderSpec`, which is all that the decoder and the weight loader look at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sleb.errors import ModelError
from sleb.kernels.reference.ops import ACTIVATIONS
from sleb.models.families import FAMILIES, Family, TensorNames, model_fingerprint


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
    num_kv_heads = int(_read(config, family, "num_key_value_heads") or num_heads)
    head_dim = int(_read(config, family, "head_dim") or config.hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"{path}: {num_heads} heads cannot share {num_kv_heads} key-value heads evenly")
    activation = getattr(config, family.activation)
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"{path}: activation '{activation}' is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    norm_first = bool(_read(config, family, "do_layer_norm_before", True))
    return DecoderSpec(
        architecture=architecture,
        num_blocks=num_blocks,
        hidden_size=int(config.hidden_size),
        embed_size=int(_read(config, family, "word_embed_proj_dim", config.hidden_size)),
        intermediate_size=int(getattr(config, family.intermediate_size)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=int(config.vocab_size),
        max_positions=int(config.max_position_embeddings),
        norm=family.norm,
        norm_eps=float(_value(family.norm_eps, config)),
        norm_affine=bool(_read(config, family, "layer_norm_elementwise_affine", True)),
        norm_first=norm_first,
        final_norm=norm_first and not _read(config, family, "_remove_final_layer_norm", False),
        activation=activation,
        gated=family.gated,
        position=family.position,
        position_offset=family.position_offset,
        rotary_blocks=_rotary_blocks(config, family, num_blocks),
        windows=_windows(config, family, num_blocks),
        qk_norm=family.qk_norm,
        qkv_bias=bool(_value(family.qkv_bias, config)),
        out_bias=bool(_value(family.out_bias, config)),
        mlp_bias=bool(_value(family.mlp_bias, config)),
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
            if raw.get("model_type") == family.model_type:
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
    if config.model_type != FAMILIES[architecture].model_type:
        raise ModelError(f"{path}/config.json names {architecture} but model_type {config.model_type}")
    return config


def _read(config: Any, family: Family, name: str, default: Any = None) -> Any:
    """A field that not every config has; one that the family does not name counts as absent."""
    return getattr(config, name, default) if name in family.reads else default


def _value(value: float | str, config: Any) -> Any:
    """What a family says itself, or leaves to a field of the config."""
    return getattr(config, value, False) if isinstance(value, str) else value


def _rotary_blocks(config: Any, family: Family, num_blocks: int) -> tuple[bool, ...]:
    if family.position != "rope":
        return (False,) * num_blocks
    pattern = _read(config, family, "no_rope_layers")  # named for its zeros: 1 means "rotate"
    return tuple(bool(value) for value in pattern) if pattern else (True,) * num_blocks


def _windows(config: Any, family: Family, num_blocks: int) -> tuple[int | None, ...]:
    window = _read(config, family, "sliding_window")
    if window is None or _read(config, family, "use_sliding_window", True) is False:
        return (None,) * num_blocks
    kinds = _read(config, family, "layer_types") or ["sliding_attention"] * num_blocks
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)

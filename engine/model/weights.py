"""Decoder weights as records: the tensors of the kept sublayers, of the patches, and of what stands around them.

`sleb.engine.model.allocation` makes them, `sleb.engine.model.loader` fills them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb.kernels.quantization import Weight


@dataclass(frozen=True)
class Linear:
    """weight [out, in], quantised or not, and bias [out] or None."""

    weight: Weight
    bias: Tensor | None


@dataclass(frozen=True)
class Norm:
    """weight and bias, each [features] or None."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class AttentionWeights:
    norm: Norm | None
    qkv: Linear  # rows: queries, then keys, then values
    out: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    post_norm: Norm | None = None
    sinks: Tensor | None = None  # [H]


@dataclass(frozen=True)
class ExpertsWeights:
    """What an MLP of N experts has beside them: its router [N, E], in float32 whatever the others are, since a choice
    is not to hang on rounding; what is added to its scores for the choice [N]; and the expert that every token gets,
    with its gate [1, E] in float32."""

    router: Linear
    correction: Tensor | None
    shared_up: Linear | None
    shared_down: Linear | None
    shared_gate: Tensor | None


@dataclass(frozen=True)
class MLPWeights:
    """With experts, `up` and `down` hold all of them, expert by expert: [N · 2I, E] and [N · E, I]."""

    norm: Norm | None
    up: Linear  # rows: gate, then up, where the architecture is gated
    down: Linear
    post_norm: Norm | None = None
    experts: ExpertsWeights | None = None


@dataclass(frozen=True)
class PatchWeights:
    """What stands for a run of removed sublayers, E wide; see `sleb.layer_map.patches.Patch`.

    A full patch is `second` [E, E], a low-rank one `first` [r, E] and `second` [E, r], either with its bias in
    `second`; a scale is `scale` and `bias`, each [E].
    """

    normed: bool
    first: Linear | None
    second: Linear | None
    scale: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class DecoderWeights:
    """All tensors of a decoder; `attention` and `mlp` are keyed by original block and hold the kept ones only.

    `dtype` is that of activations and of whatever is not quantised. A tied head is the same object as `embed`.
    """

    dtype: torch.dtype
    embed: Weight
    position_embed: Tensor | None
    project_in: Linear | None
    project_out: Linear | None
    final_norm: Norm | None
    head: Linear
    attention: dict[int, AttentionWeights]
    mlp: dict[int, MLPWeights]
    patches: tuple[PatchWeights, ...] = ()


def _walk(node: object) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, Mapping):
        for value in node.values():
            yield from _walk(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _walk(value)
    elif hasattr(node, "__dataclass_fields__"):
        for name in node.__dataclass_fields__:
            yield from _walk(getattr(node, name))


def num_bytes(node: object) -> int:
    """Bytes of all tensors in a record of weights, or in a sequence of records; a shared tensor counts once."""
    distinct = {id(tensor): tensor for tensor in _walk(node)}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def formats_of(weights: DecoderWeights) -> list[str]:
    """The formats of the matrices, in words: that of the most numbers first."""
    linears = [linear for part in weights.attention.values() for linear in (part.qkv, part.out)]
    linears += [linear for mlp in weights.mlp.values() for linear in (mlp.up, mlp.down)]
    sizes: dict[str, int] = {}
    for weight in (weights.head.weight, *(linear.weight for linear in linears)):
        name = str(weight.dtype)[6:] if isinstance(weight, Tensor) else weight.name
        sizes[name] = sizes.get(name, 0) + math.prod(weight.shape)
    return sorted(sizes, key=lambda name: -sizes[name])

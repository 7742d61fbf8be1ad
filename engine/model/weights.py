"""Decoder weights: which tensors a set of sublayers needs, and how they get from the checkpoint into place.

`allocate` makes the fused matrices and says, for every checkpoint tensor, which slice of them it fills. Loading
is then one copy a tensor, so memory peaks near the size of what is kept; tensors of sublayers that no served
tier runs are never read. Quantised matrices are filled in the same way, each checkpoint tensor into its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb.engine.model.architecture import DecoderSpec
from sleb.kernels.quantization import Quantized, Weight, WeightFormat
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer, Unit

Targets = dict[str, Weight]


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
    norm: Norm
    qkv: Linear  # rows: queries, then keys, then values
    out: Linear
    query_norm: Norm | None
    key_norm: Norm | None


@dataclass(frozen=True)
class MLPWeights:
    norm: Norm
    up: Linear  # rows: gate, then up, where the architecture is gated
    down: Linear


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


def num_parameters(spec: DecoderSpec, unit: Unit) -> int:
    """Of a unit, whatever the format of its weights."""
    weights, _ = allocate(spec, set(unit.sublayers), torch.float32, torch.device("meta"))
    return num_bytes([weights.attention, weights.mlp]) // torch.float32.itemsize


def all_sublayers(spec: DecoderSpec) -> set[Sublayer]:
    """Every (block, part) of the dense model."""
    return {sublayer for block in range(spec.num_blocks) for sublayer in Unit(block).sublayers}


def allocate(
    spec: DecoderSpec,
    keep: set[Sublayer],
    dtype: torch.dtype,
    device: torch.device,
    weight_format: WeightFormat | None = None,
) -> tuple[DecoderWeights, Targets]:
    """Uninitialised weights for the sublayers in `keep`, and where each checkpoint tensor belongs in them.

    Returns the weights and a dictionary from checkpoint name to the view that its tensor fills; the views cover
    every allocated element exactly once. On the meta device it costs nothing and states names and shapes.
    """
    return _Allocator(spec, dtype, device, weight_format).build(keep)


def patch_weights(
    patch: Patch, dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None = None
) -> PatchWeights:
    """The tensors of a patch: matrices as `weight_format` says, what else there is in `dtype`."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(patch.tensors[name]).to(device, dtype)

    def linear(name: str, bias: Tensor | None) -> Linear:
        if weight_format is None:
            return Linear(tensor(name), bias)
        num_rows, num_columns = patch.tensors[name].shape
        weight = weight_format.patch.empty(num_rows, num_columns, device)
        weight.fill(torch.from_numpy(patch.tensors[name]))
        return Linear(weight, bias)

    if patch.form == "scale":
        return PatchWeights(False, None, None, tensor("scale"), tensor("bias"))
    if patch.form == "full":
        return PatchWeights(patch.normed, None, linear("weight", tensor("bias")), None, None)
    return PatchWeights(patch.normed, linear("down", None), linear("up", tensor("bias")), None, None)


class _Allocator:
    def __init__(
        self, spec: DecoderSpec, dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None
    ) -> None:
        self.spec = spec
        self.targets: Targets = {}
        self._dtype = dtype
        self._device = device
        self._linear_kind = weight_format.linear if weight_format else None
        self._head_kind = weight_format.head if weight_format else None

    def build(self, keep: set[Sublayer]) -> tuple[DecoderWeights, Targets]:
        spec, names = self.spec, self.spec.names
        embed, head = self._embed_and_head()
        projected = spec.embed_size != spec.hidden_size
        positions = spec.max_positions + spec.position_offset
        weights = DecoderWeights(
            dtype=self._dtype,
            embed=embed,
            position_embed=self._tensor(f"{names.position_embed}.weight", positions, spec.hidden_size)
            if spec.position == "learned"
            else None,
            project_in=self._linear([str(names.project_in)], [spec.hidden_size], spec.embed_size)
            if projected
            else None,
            project_out=self._linear([str(names.project_out)], [spec.embed_size], spec.hidden_size)
            if projected
            else None,
            final_norm=self._norm(names.final_norm, spec.hidden_size) if spec.final_norm else None,
            head=head,
            attention={block: self._attention(block) for block, part in sorted(keep) if part == "attention"},
            mlp={block: self._mlp(block) for block, part in sorted(keep) if part == "mlp"},
        )
        return weights, self.targets

    def _embed_and_head(self) -> tuple[Weight, Linear]:
        spec, name = self.spec, f"{self.spec.names.embed}.weight"
        if not spec.tied_embeddings:
            embed = self._tensor(name, spec.vocab_size, spec.embed_size)
            head = self._linear([spec.names.head], [spec.vocab_size], spec.embed_size, kind=self._head_kind)
            return embed, head
        shared = self._matrix(spec.vocab_size, spec.embed_size, self._head_kind)
        self.targets[name] = shared
        return shared, Linear(shared, None)

    def _attention(self, block: int) -> AttentionWeights:
        spec, names = self.spec, self.spec.names
        prefix = names.block.format(block=block)
        sizes = [spec.query_size, spec.kv_size, spec.kv_size]
        return AttentionWeights(
            norm=self._norm(f"{prefix}.{names.attention_norm}", spec.hidden_size),
            qkv=self._fused(prefix, names.qkv, sizes, spec.hidden_size, spec.qkv_bias),
            out=self._linear(
                [f"{prefix}.{names.attention_out}"],
                [spec.hidden_size],
                spec.query_size,
                spec.out_bias,
                self._linear_kind,
            ),
            query_norm=self._norm(f"{prefix}.{names.query_norm}", spec.head_dim) if spec.qk_norm else None,
            key_norm=self._norm(f"{prefix}.{names.key_norm}", spec.head_dim) if spec.qk_norm else None,
        )

    def _mlp(self, block: int) -> MLPWeights:
        spec, names = self.spec, self.spec.names
        prefix = names.block.format(block=block)
        sizes = [spec.intermediate_size] * (2 if spec.gated else 1)
        return MLPWeights(
            norm=self._norm(f"{prefix}.{names.mlp_norm}", spec.hidden_size),
            up=self._fused(prefix, names.up, sizes, spec.hidden_size, spec.mlp_bias),
            down=self._linear(
                [f"{prefix}.{names.down}"],
                [spec.hidden_size],
                spec.intermediate_size,
                spec.mlp_bias,
                self._linear_kind,
            ),
        )

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _matrix(self, num_rows: int, num_columns: int, kind: Quantized | None) -> Weight:
        if kind is None:
            return self._empty(num_rows, num_columns)
        return kind.empty(num_rows, num_columns, self._device)

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._empty(*shape)
        self.targets[name] = tensor
        return tensor

    def _norm(self, name: str, size: int) -> Norm:
        if not self.spec.norm_affine:
            return Norm(None, None)
        bias = self._tensor(f"{name}.bias", size) if self.spec.norm == "layer" else None
        return Norm(self._tensor(f"{name}.weight", size), bias)

    def _fused(
        self, prefix: str, modules: tuple[str, ...], sizes: list[int], width: int, bias: bool
    ) -> Linear:
        if len(modules) == 1:  # the checkpoint holds them fused
            sizes = [sum(sizes)]
        return self._linear(
            [f"{prefix}.{module}" for module in modules], sizes, width, bias, self._linear_kind
        )

    def _linear(
        self,
        modules: list[str],
        sizes: list[int],
        width: int,
        bias: bool = False,
        kind: Quantized | None = None,
    ) -> Linear:
        weight = self._matrix(sum(sizes), width, kind)
        vector = self._empty(sum(sizes)) if bias else None
        start = 0
        for module, size in zip(modules, sizes, strict=True):
            self.targets[f"{module}.weight"] = _rows(weight, start, start + size)
            if vector is not None:
                self.targets[f"{module}.bias"] = vector[start : start + size]
            start += size
        return Linear(weight, vector)


def _rows(weight: Weight, start: int, stop: int) -> Weight:
    return weight[start:stop] if isinstance(weight, Tensor) else weight.row_slice(start, stop)

"""Which tensors a set of sublayers needs, and how they get from the checkpoint into place.

`allocate` makes the fused matrices and says, for every checkpoint tensor, which slice of them it fills. Loading
is then one copy a tensor, so memory peaks near the size of what is kept; tensors of sublayers that no served
tier runs are never read. Quantised matrices are filled in the same way, each checkpoint tensor into its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sleb.engine.model.architecture import DecoderSpec, ExpertsSpec
from sleb.engine.model.weights import (
    AttentionWeights,
    DecoderWeights,
    ExpertsWeights,
    Linear,
    MLPWeights,
    Norm,
    PatchWeights,
    num_bytes,
)
from sleb.kernels.quantization import (
    GroupedWeight,
    Int4Weight,
    Int8Weight,
    Quantized,
    Weight,
    WeightFormat,
    common_kind,
    rows_of,
)
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer, Unit

Targets = dict[str, "Target"]


@dataclass(frozen=True)
class Target:
    """Where a checkpoint tensor belongs, and what is done to it on its way.

    Attributes:
        weight: the view that it fills, [N, K] or [N].
        rows: [N] int64, which stored row each row of the view takes; None: its own.
        transposed: it is stored [K, N].
        stacked: it is stored with one dimension more, as so many matrices, or vectors, that lie one under another in
            the view; rows and transposed are of each. 0: it is not.
        shift, factor: the view gets (stored + shift) · factor.
    """

    weight: Weight
    rows: Tensor | None = None
    transposed: bool = False
    stacked: int = 0
    shift: float = 0.0
    factor: float = 1.0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        shape = tuple(self.weight.shape)
        if self.stacked:
            shape = (shape[0] // self.stacked, *shape[1:])
        shape = shape[::-1] if self.transposed else shape
        return (self.stacked, *shape) if self.stacked else shape

    def fill(self, stored: Tensor) -> None:
        """Raises ValueError for values that cannot be quantised."""
        if self.stacked:
            size = self.weight.shape[0] // self.stacked
            for index, part in enumerate(stored):
                view = rows_of(self.weight, index * size, (index + 1) * size)
                replace(self, weight=view, stacked=0).fill(part)
            return
        if self.transposed:
            stored = stored.t()
        if self.rows is not None:
            stored = stored[self.rows]
        if self.shift or self.factor != 1.0:
            stored = (stored.float() + self.shift) * self.factor
        if isinstance(self.weight, Tensor):
            self.weight.copy_(stored)
        else:
            assert isinstance(self.weight, Int8Weight | Int4Weight), "a file's own bits are taken"
            self.weight.fill(stored)

    def take(self, stored: Weight) -> None:
        """Fills the view with a matrix of a quantised checkpoint, in its own bits if the view is of bits."""
        if isinstance(stored, Tensor) or isinstance(self.weight, Tensor):
            self.fill(stored if isinstance(stored, Tensor) else stored.dequantize(torch.float32))
            return
        stored = stored if self.rows is None else stored.take_rows(self.rows)
        if isinstance(self.weight, Int8Weight):
            assert isinstance(stored, Int8Weight)
            self.weight.take(stored)
        else:
            assert isinstance(stored, GroupedWeight)
            self.weight.take(stored)


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
    held: Mapping[str, Quantized | None] | None = None,
) -> tuple[DecoderWeights, Targets]:
    """Uninitialised weights for the sublayers in `keep`, and where each checkpoint tensor belongs in them.

    Returns the weights and a dictionary from checkpoint name to what its tensor fills; the views cover every
    allocated element exactly once. On the meta device it costs nothing and states names and shapes.

    held: in place of `weight_format`, what each matrix of a quantised checkpoint is held in.
    """
    return _Allocator(spec, dtype, device, weight_format, held or {}).build(keep)


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
        self,
        spec: DecoderSpec,
        dtype: torch.dtype,
        device: torch.device,
        weight_format: WeightFormat | None,
        held: Mapping[str, Quantized | None],
    ) -> None:
        self.spec = spec
        self.targets: Targets = {}
        self._dtype = dtype
        self._device = device
        self._linear_kind = weight_format.linear if weight_format else None
        self._head_kind = weight_format.head if weight_format else None
        self._held = held

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
            final_norm=self._norm(names.final_norm, spec.hidden_size, spec.logit_scale)
            if spec.final_norm
            else None,
            head=head,
            attention={block: self._attention(block) for block, part in sorted(keep) if part == "attention"},
            mlp={},
        )
        for block in (block for block, part in sorted(keep) if part == "mlp"):
            beside = weights.attention.get(block)
            weights.mlp[block] = self._mlp(block, beside.norm if beside and spec.shared_norm else None)
        return weights, self.targets

    def _embed_and_head(self) -> tuple[Weight, Linear]:
        spec, name = self.spec, f"{self.spec.names.embed}.weight"
        if not spec.tied_embeddings:
            embed = self._tensor(name, spec.vocab_size, spec.embed_size)
            head = self._linear(
                [spec.names.head], [spec.vocab_size], spec.embed_size, spec.head_bias, self._head_kind
            )
            return embed, head
        shared = self._matrix(spec.vocab_size, spec.embed_size, self._kind([name], self._head_kind))
        self.targets[name] = Target(shared)
        bias = self._tensor(f"{spec.names.head}.bias", spec.vocab_size) if spec.head_bias else None
        return shared, Linear(shared, bias)

    def _attention(self, block: int) -> AttentionWeights:
        spec, names = self.spec, self.spec.names
        prefix = names.block.format(block=block)
        sizes = [spec.query_size, spec.kv_size, spec.kv_size]
        whole = spec.qk_norm == "whole"
        sinks = self._tensor(f"{prefix}.{names.sinks}", spec.num_heads) if spec.sinks else None
        return AttentionWeights(
            norm=self._norm_of(prefix, names.attention_norm),
            post_norm=self._norm_of(prefix, names.attention_post_norm),
            qkv=self._fused(prefix, names.qkv, sizes, spec.hidden_size, spec.qkv_bias, _stored_rows(spec)),
            out=self._linear(
                [f"{prefix}.{names.attention_out}"],
                [spec.hidden_size],
                spec.query_size,
                spec.out_bias,
                self._linear_kind,
                transposed=spec.transposed,
            ),
            query_norm=self._head_norm(f"{prefix}.{names.query_norm}", spec.num_heads if whole else 1),
            key_norm=self._head_norm(f"{prefix}.{names.key_norm}", spec.num_kv_heads if whole else 1),
            sinks=sinks,
        )

    def _mlp(self, block: int, shared_norm: Norm | None) -> MLPWeights:
        spec, names = self.spec, self.spec.names
        prefix = names.block.format(block=block)
        norm = shared_norm or self._norm_of(
            prefix, names.attention_norm if spec.shared_norm else names.mlp_norm
        )
        post_norm = self._norm_of(prefix, names.mlp_post_norm)
        if spec.experts is not None and spec.experts.blocks[block]:
            return self._mixture(prefix, spec.experts, norm, post_norm)
        sizes = [spec.intermediate_size] * (2 if spec.gated else 1)
        return MLPWeights(
            norm=norm,
            post_norm=post_norm,
            up=self._fused(prefix, names.up, sizes, spec.hidden_size, spec.mlp_bias),
            down=self._linear(
                [f"{prefix}.{names.down}"],
                [spec.hidden_size],
                spec.intermediate_size,
                spec.mlp_bias,
                self._linear_kind,
                transposed=spec.transposed,
            ),
        )

    def _mixture(
        self, prefix: str, experts: ExpertsSpec, norm: Norm | None, post_norm: Norm | None
    ) -> MLPWeights:
        names, width, size = experts.names, self.spec.hidden_size, experts.intermediate_size
        inner = size * (2 if self.spec.gated else 1)
        rows = torch.arange(inner).view(-1, 2).t().flatten() if names.alternating else None
        return MLPWeights(
            norm=norm,
            post_norm=post_norm,
            up=self._of_experts(prefix, experts, names.up, names.up_bias, inner, width, rows),
            down=self._of_experts(prefix, experts, (names.down,), names.down_bias, width, size),
            experts=self._beside_experts(prefix, experts),
        )

    def _of_experts(
        self,
        prefix: str,
        experts: ExpertsSpec,
        modules: tuple[str, ...],
        bias: str | None,
        size: int,
        width: int,
        rows: Tensor | None = None,
    ) -> Linear:
        """A matrix [size, width] of each expert, under one another."""
        number = experts.number
        if "{expert}" in modules[0]:
            names = [f"{prefix}.{name.format(expert=each)}" for each in range(number) for name in modules]
            weight = self._matrix(number * size, width, self._kind(names, self._linear_kind))
            part = size // len(modules)
            for index, name in enumerate(names):
                self.targets[name] = Target(rows_of(weight, index * part, (index + 1) * part))
        else:
            weight = self._matrix(number * size, width, None if self._held else self._linear_kind)
            target = Target(weight, rows, experts.names.transposed, stacked=number)
            self.targets[f"{prefix}.{modules[0]}"] = target
        vector = None if bias is None else self._empty(number * size)
        if vector is not None:
            self.targets[f"{prefix}.{bias}"] = Target(vector, rows, stacked=number)
        return Linear(weight, vector)

    def _beside_experts(self, prefix: str, experts: ExpertsSpec) -> ExpertsWeights:
        spec, names = self.spec, experts.names
        gate = (
            self._exact(f"{prefix}.{names.shared_gate}.weight", 1, spec.hidden_size)
            if names.shared_gate
            else None
        )
        shared: list[Linear] = []
        if experts.shared_size:
            module, sizes = f"{prefix}.{names.shared}", [experts.shared_size] * (2 if spec.gated else 1)
            *up, down = (each.rpartition(".")[2] for each in (*spec.names.up, spec.names.down))
            shared = [
                self._fused(module, tuple(up), sizes, spec.hidden_size, spec.mlp_bias),
                self._fused(module, (down,), [spec.hidden_size], experts.shared_size, spec.mlp_bias),
            ]
        return ExpertsWeights(
            router=Linear(
                self._exact(f"{prefix}.{names.router}.weight", experts.number, spec.hidden_size),
                self._exact(f"{prefix}.{names.router}.bias", experts.number) if names.router_bias else None,
            ),
            correction=self._exact(f"{prefix}.{names.correction}", 1, experts.number)
            if names.correction
            else None,
            shared_up=shared[0] if shared else None,
            shared_down=shared[1] if shared else None,
            shared_gate=gate if shared else None,
        )

    def _exact(self, name: str, *shape: int) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.float32, device=self._device)
        self.targets[name] = Target(tensor)
        return tensor

    def _norm_of(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{prefix}.{name}", self.spec.hidden_size)

    def _head_norm(self, name: str, num_heads: int) -> Norm | None:
        spec = self.spec
        if spec.qk_norm is None:
            return None
        norm = self._norm(name, num_heads * spec.head_dim)
        if (rows := _paired_rows(spec, num_heads)) is not None:
            for each in ("weight", "bias"):
                if target := self.targets.get(f"{name}.{each}"):
                    self.targets[f"{name}.{each}"] = replace(target, rows=rows)
        return norm

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _kind(self, names: list[str], chosen: Quantized | None) -> Quantized | None:
        """What a matrix of the checkpoint's tensors `names` is held in."""
        return common_kind([self._held.get(name) for name in names]) if self._held else chosen

    def _matrix(self, num_rows: int, num_columns: int, kind: Quantized | None) -> Weight:
        if kind is None:
            return self._empty(num_rows, num_columns)
        return kind.empty(num_rows, num_columns, self._device)

    def _tensor(self, name: str, *shape: int) -> Tensor:
        tensor = self._empty(*shape)
        self.targets[name] = Target(tensor)
        return tensor

    def _norm(self, name: str, size: int, factor: float = 1.0) -> Norm:
        """Weights that are not what is stored are kept in float32: others would round them once more."""
        spec, changed = self.spec, bool(self.spec.norm_shift) or factor != 1.0
        if not spec.norm_affine:
            if factor == 1.0:
                return Norm(None, None)
            return Norm(torch.full((size,), factor, device=self._device), None)
        dtype = torch.float32 if changed else self._dtype
        weight = torch.empty(size, dtype=dtype, device=self._device)
        self.targets[f"{name}.weight"] = Target(weight, shift=spec.norm_shift, factor=factor)
        bias = torch.empty(size, dtype=dtype, device=self._device) if spec.norm_bias else None
        if bias is not None:
            self.targets[f"{name}.bias"] = Target(bias, factor=factor)
        return Norm(weight, bias)

    def _fused(
        self,
        prefix: str,
        modules: tuple[str, ...],
        sizes: list[int],
        width: int,
        bias: bool,
        rows: Tensor | None = None,
    ) -> Linear:
        if len(modules) == 1:  # the checkpoint holds them fused
            sizes = [sum(sizes)]
        names = [f"{prefix}.{module}" for module in modules]
        return self._linear(
            names, sizes, width, bias, self._linear_kind, rows=rows, transposed=self.spec.transposed
        )

    def _linear(
        self,
        modules: list[str],
        sizes: list[int],
        width: int,
        bias: bool = False,
        kind: Quantized | None = None,
        *,
        rows: Tensor | None = None,
        transposed: bool = False,
    ) -> Linear:
        """`rows` [sum of sizes]: which of all the stored rows, those of the modules one after another, each takes."""
        kind = (
            None
            if transposed and self._held
            else self._kind([f"{module}.weight" for module in modules], kind)
        )
        weight = self._matrix(sum(sizes), width, kind)
        vector = self._empty(sum(sizes)) if bias else None
        start = 0
        for module, size in zip(modules, sizes, strict=True):
            stop = start + size
            own = None if rows is None else rows[start:stop] - start
            self.targets[f"{module}.weight"] = Target(rows_of(weight, start, stop), own, transposed)
            if vector is not None:
                self.targets[f"{module}.bias"] = Target(vector[start:stop], own)
            start = stop
        return Linear(weight, vector)


def _stored_rows(spec: DecoderSpec) -> Tensor | None:
    """For each row of queries, keys and values, [H + 2K, D] flat, which stored one it is; None: the same."""
    heads, dim = spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim
    rows = torch.arange(heads * dim)
    if spec.qkv_layout == "heads":  # of each head its query, key and value
        rows = rows.view(spec.num_heads, 3, dim).transpose(0, 1).flatten()
    if (paired := _paired_rows(spec, spec.num_heads + spec.num_kv_heads)) is not None:
        rows = torch.cat((rows[: len(paired)][paired], rows[len(paired) :]))
    return None if bool((rows == torch.arange(len(rows))).all()) else rows


def _paired_rows(spec: DecoderSpec, num_heads: int) -> Tensor | None:
    """Rows of heads stored in pairs that rotate together, (2i, 2i + 1), in half-split order, (i, i + R / 2)."""
    if not spec.interleaved:
        return None
    rotated = 2 * len(spec.rotaries[0].frequencies)
    order = torch.arange(spec.head_dim)
    order[:rotated] = order[:rotated].view(-1, 2).t().flatten()
    return (torch.arange(num_heads)[:, None] * spec.head_dim + order).flatten()

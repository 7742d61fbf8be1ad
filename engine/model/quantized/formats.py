"""Quantised checkpoints of other tools, an entry a format: how tensors are named, and what they stand for.

A *module* is what a tool makes of one matrix: several tensors whose names begin alike and end as the format says. Its
plan tells from headers, and from the config's words, which shape the matrix has and whether `sleb.kernels.quantization`
holds its numbers; `decode` makes it of the tensors' values. Activations, which some tools quantise too, stay as they
are.

AWQ             github.com/casper-hansen/AutoAWQ (gemm layout), arXiv 2306.00978
GPTQ            github.com/AutoGPTQ/AutoGPTQ, github.com/ModelCloud/GPTQModel (gptq_v2), arXiv 2210.17323
compressed      github.com/neuralmagic/compressed-tensors
FP8             arXiv 2209.05433; in blocks as DeepSeek-V3, arXiv 2412.19437
bitsandbytes    arXiv 2305.14314 (nf4 and scales of scales), 2208.07339 (int8)
MLX             ml-explore.github.io/mlx, mlx.core.quantize
MXFP4           OCP Microscaling Formats 1.0; gpt-oss
NVFP4           docs.nvidia.com, Transformer Engine and ModelOpt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sleb.errors import ModelError
from sleb.fields import Fields, parse_json, shown_path, shown_text
from sleb.kernels.quantization import GROUP, Base, GroupedWeight, Groups, Int8Weight, Quantized
from sleb.models.weight_files import StoredTensor

Decoded = GroupedWeight | Int8Weight | Tensor
Parts = Mapping[str, Tensor]

_AWQ_COLUMNS = (
    0,
    4,
    1,
    5,
    2,
    6,
    3,
    7,
)  # the nibble of a word, from the lowest, that holds each of its eight columns
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_FLOATS = ("F32", "F16", "BF16")
_F8 = ("F8_E4M3", "F8_E5M2")
_MAX_STATE_BYTES = 1 << 16
_LEAST_GROUP = 16


@dataclass(frozen=True)
class Plan:
    """The matrix of a module: its shape, what holds its numbers (None, and `why`: wider ones), how it is made."""

    shape: tuple[int, ...]
    kind: Quantized | None
    decode: Callable[[Parts], Decoded]
    why: str = ""


@dataclass(frozen=True)
class Module:
    """The tensors of a module by the ends of their names, and what the config says of the quantisation."""

    parts: Mapping[str, StoredTensor]
    settings: Fields

    def shape(self, end: str, *dims: int | None, dtypes: tuple[str, ...] = _FLOATS) -> tuple[int, ...]:
        """The shape of the tensor with that end. Raises ModelError if it is absent, of another dtype, or not of `dims`
        (None: any size).
        """
        part = self.parts.get(end)
        if part is None:
            some = next(iter(self.parts.values()))
            lacking = shown_text(some.name[:200])
            raise ModelError(f"{shown_path(some.file)}: {lacking} is there without its {end.strip('._')}")
        wanted = len(part.shape) == len(dims) and all(
            size in (None, found) for size, found in zip(dims, part.shape, strict=True)
        )
        if not wanted or part.dtype not in dtypes or 0 in part.shape:
            sizes = ", ".join("any" if size is None else str(size) for size in dims)
            raise self.wrong(end, f"of {' or '.join(dtypes)} and shape ({sizes})")
        return part.shape

    def wrong(self, end: str, wanted: str) -> ModelError:
        part = self.parts[end]
        return ModelError(
            f"{shown_path(part.file)}: {shown_text(part.name[:200])} is {part.dtype} of shape {part.shape}; it must be "
            f"{wanted}"
        )

    def small(self, end: str, most: int) -> Tensor:
        """The values of a tensor that the plan itself needs, of at most that many."""
        part = self.parts[end]
        if part.dtype not in ("I64", "I32", "U8") or len(part.shape) != 1 or part.shape[0] > most:
            raise self.wrong(end, f"a vector of at most {most} integers")
        return part.read()

    def choice(self, names: tuple[str, ...], allowed: tuple[int, ...]) -> int:
        """The number that the config calls by one of `names`. Raises ModelError unless it is allowed."""
        name = next((each for each in names if each in self.settings), names[0])
        value = self.settings.integer(name, -1, 1 << 20)
        if allowed and value not in allowed:
            raise self.settings.wrong(name, " or ".join(map(str, allowed)))
        return int(value)


@dataclass(frozen=True)
class Format:
    """One entry. `mark`: the end of a name that tells a module; `ends`: those of its other tensors; `result`: the end
    of the matrix's name. `told`: words of a config that name the format, its `quant_method` first.
    """

    name: str
    mark: str
    ends: tuple[str, ...]
    plan: Callable[[Module], Plan]
    result: str = ".weight"


def words(packed: Tensor, bits: int) -> Tensor:
    """Words [R, C] of 32 bits or bytes, the lowest bits first, as unsigned numbers [R, C · 32 / bits] or 8 / bits."""
    octets = packed.contiguous().view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _groups(
    module: Module, end: str, bits: int, num_columns: int, num_groups: int, size: int, base: Base
) -> Groups:
    """The format of `num_columns` inputs in groups of `size`. Raises ModelError if they are not `num_groups`."""
    if num_groups == 1 and size >= num_columns:
        size = -(-num_columns // GROUP) * GROUP
    if size < 1 or size % GROUP or -(-num_columns // size) != num_groups:
        told = f"groups of {size} of {num_columns} inputs"
        raise module.wrong(end, f"a scale a group, and {told} must be whole and a multiple of {GROUP}")
    return Groups(bits, size, base)


def _awq(module: Module) -> Plan:
    """w[k, n] = scales[k // g, n] · (q[k, n] − z[k // g, n]); q in words [K, N / 8], z in [G, N / 8]."""
    settings = module.settings
    bits = module.choice(("bits", "w_bit"), (4,))
    version = settings.string("version", default="gemm")
    if version.lower() != "gemm":
        raise settings.wrong("version", "gemm")
    num_columns, num_words = module.shape(".qweight", None, None, dtypes=("I32",))
    num_groups, num_rows = module.shape(".scales", None, 8 * num_words)
    module.shape(".qzeros", num_groups, num_words, dtypes=("I32",))
    size = module.choice(("group_size", "q_group_size"), ())
    groups = _groups(
        module, ".scales", bits, num_columns, num_groups, size if size > 0 else num_columns, "zero"
    )

    def columns(packed: Tensor) -> Tensor:
        nibbles = words(packed, 4)
        return nibbles.view(len(nibbles), -1, 8)[..., _AWQ_COLUMNS].flatten(1).t().contiguous()

    def decode(parts: Parts) -> Decoded:
        zero = columns(parts[".qzeros"]).float()
        return GroupedWeight.of(columns(parts[".qweight"]), parts[".scales"].t().contiguous(), zero, groups)

    return Plan((num_rows, num_columns), groups, decode)


def _gptq(module: Module) -> Plan:
    """w[k, n] = scales[g, n] · (q[k, n] − z[g, n]), g = g_idx[k]; z is stored less one unless the format is gptq_v2."""
    settings = module.settings
    bits = module.choice(("bits",), (4, 8))
    one = 0 if settings.string("checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq_v2" else 1
    num_words, num_rows = module.shape(".qweight", None, None, dtypes=("I32",))
    num_columns = num_words * 32 // bits
    num_groups = module.shape(".scales", None, num_rows)[0]
    if num_rows * bits % 32:
        raise module.wrong(".qweight", f"of a multiple of {32 // bits} columns")
    module.shape(".qzeros", num_groups, num_rows * bits // 32, dtypes=("I32",))
    size = module.choice(("group_size",), ())
    groups = _groups(
        module, ".scales", bits, num_columns, num_groups, size if size > 0 else num_columns, "zero"
    )
    by_activation = settings.boolean("desc_act", True)
    if ".g_idx" in module.parts:
        module.shape(".g_idx", num_columns, dtypes=("I32", "I64"))
    order = _order(module, ".g_idx", num_columns, groups.size) if by_activation else None

    def decode(parts: Parts) -> Decoded:
        q = words(parts[".qweight"].t(), bits)
        zero = ((words(parts[".qzeros"], bits).int() + one) & ((1 << bits) - 1)).t().float()
        scale = parts[".scales"].t().contiguous()
        if order is not None:
            return _ordered(q, scale, zero, order)
        if ".g_idx" in parts and not _in_order(parts[".g_idx"], groups.size):
            raise module.wrong(".g_idx", "in order, as desc_act of the config says")
        return GroupedWeight.of(q, scale, zero.contiguous(), groups)

    return Plan((num_rows, num_columns), groups if order is None else None, decode, _ACT_ORDER)


_ACT_ORDER = "its columns are quantised in the order of activations"


def _in_order(order: Tensor, size: int) -> bool:
    return bool((order == torch.arange(len(order)) // size).all())


def _order(module: Module, end: str, num_columns: int, size: int) -> Tensor | None:
    """The group of each column where they are not in order."""
    if end not in module.parts:
        return None
    module.shape(end, num_columns, dtypes=("I32", "I64"))
    order = module.small(end, num_columns).long()
    if bool((order == -1).all()) or _in_order(order, size):  # not set, which compressed-tensors writes as −1
        return None
    if int(order.min()) < 0 or int(order.max()) * size >= num_columns:
        raise module.wrong(end, f"of groups from 0 to {-(-num_columns // size) - 1}")
    return order


def _ordered(q: Tensor, scale: Tensor, zero: Tensor | float, order: Tensor) -> Tensor:
    each = zero[:, order] if isinstance(zero, Tensor) else zero
    return (q.float() - each) * scale.float()[:, order]


def _compressed(module: Module) -> Plan:
    """compressed-tensors: packed integers, or bytes with scales."""
    if ".weight_global_scale" in module.parts:
        return _nvfp4(module)
    if ".weight_packed" in module.parts:
        return _packed(module)
    return _scaled(module)


def _packed(module: Module) -> Plan:
    """w = weight_scale · (q − z), q and z + 2^(bits − 1) in words: q along the inputs, z along the outputs."""
    shape = module.small(".weight_shape", 2).tolist() if ".weight_shape" in module.parts else []
    num_rows, num_words = module.shape(".weight_packed", None, None, dtypes=("I32",))
    if len(shape) != 2 or shape[0] != num_rows or shape[1] < 1:
        raise module.wrong(".weight_packed", "of as many rows as weight_shape says")
    num_columns = int(shape[1])
    bits = next((bits for bits in (4, 8) if -(-num_columns * bits // 32) == num_words), None)
    if bits is None:
        raise module.wrong(
            ".weight_packed", f"of {num_columns} columns, the second of weight_shape, in 4 or 8 bits"
        )
    num_groups = module.shape(".weight_scale", num_rows, None)[1]
    zero_end = ".weight_zero_point"
    base: Base = "zero" if zero_end in module.parts else "middle"
    if base == "zero":
        module.shape(zero_end, -(-num_rows * bits // 32), num_groups, dtypes=("I32",))
    size = -(-num_columns // num_groups)
    groups = _groups(module, ".weight_scale", bits, num_columns, num_groups, size, base)
    order = _order(module, ".weight_g_idx", num_columns, groups.size)

    def decode(parts: Parts) -> Decoded:
        q = words(parts[".weight_packed"], bits)[:, :num_columns].contiguous()
        zero = words(parts[zero_end].t(), bits)[:, :num_rows].t().float() if base == "zero" else None
        if order is not None:
            return _ordered(q, parts[".weight_scale"], 1 << bits - 1 if zero is None else zero, order)
        return GroupedWeight.of(q, parts[".weight_scale"], zero, groups)

    return Plan((num_rows, num_columns), groups if order is None else None, decode, _ACT_ORDER)


def _scaled(module: Module) -> Plan:
    """w = scale · weight, of bytes or FP8: a scale for all, an output, a group of inputs, or a block of both."""
    num_rows, num_columns = module.shape(".weight", None, None, dtypes=("I8", *_F8))
    end = ".weight_scale_inv" if ".weight_scale_inv" in module.parts else ".weight_scale"
    stored = module.parts.get(end)
    dims = (1,) * (2 - len(stored.shape)) + stored.shape if stored and len(stored.shape) < 3 else (0, 0)
    if stored and stored.shape == (num_rows,):
        dims = (num_rows, 1)
    rows, columns = _block(module, dims, num_rows, num_columns)
    if dims[1] > 1 and columns < _LEAST_GROUP:
        raise module.wrong(end, f"a scale for {_LEAST_GROUP} inputs or more")
    if (
        stored is None
        or dims != (-(-num_rows // rows), -(-num_columns // columns))
        or stored.dtype not in _FLOATS
    ):
        module.shape(end, -(-num_rows // rows), -(-num_columns // columns))
    is_byte, zero_end = module.parts[".weight"].dtype == "I8", ".weight_zero_point"
    if zero_end in module.parts:
        module.shape(zero_end, *dims, dtypes=("I8",))
    by_row = is_byte and columns >= num_columns and zero_end not in module.parts

    def decode(parts: Parts) -> Decoded:
        scale = parts[end].float().reshape(dims)
        if by_row:
            return Int8Weight(parts[".weight"], scale.repeat_interleave(rows, 0)[:num_rows, 0])
        values = parts[".weight"].float()
        for each, sign in ((parts.get(zero_end), -1), (scale, 0)):
            if each is None:
                continue
            whole = (
                each.float()
                .repeat_interleave(rows, 0)[:num_rows]
                .repeat_interleave(columns, 1)[:, :num_columns]
            )
            values = values - whole if sign else values.mul_(whole)
        return values

    why = "bytes with groups or zero points" if is_byte else "FP8"
    return Plan((num_rows, num_columns), Int8Weight if by_row else None, decode, why)


def _block(module: Module, dims: tuple[int, ...], num_rows: int, num_columns: int) -> tuple[int, int]:
    """Outputs and inputs that share a scale: as the config says of blocks, else as many as the scales divide into."""
    if ".weight_scale_inv" in module.parts:
        sizes = module.settings.items("weight_block_size", 2)
        if len(sizes) != 2 or not all(type(size) is int and 1 <= size <= 1 << 16 for size in sizes):
            raise module.settings.wrong("weight_block_size", "two sizes from 1 to 65536")
        return sizes[0], sizes[1]
    return -(-num_rows // max(1, dims[0])), -(-num_columns // max(1, dims[1]))


def _nvfp4(module: Module) -> Plan:
    """w = weight · weight_scale · weight_scale_2, E2M1 by 16 inputs; compressed-tensors has the last one's inverse."""
    compressed = ".weight_global_scale" in module.parts
    end, last = (".weight_packed", ".weight_global_scale") if compressed else (".weight", ".weight_scale_2")
    if end in module.parts and module.parts[end].dtype in _F8:
        return _scaled(module)
    num_rows, num_bytes = module.shape(end, None, None, dtypes=("U8",))
    num_groups = module.shape(".weight_scale", num_rows, num_bytes // 8, dtypes=("F8_E4M3",))[1]
    module.shape(last, *(1,) * (last in module.parts and len(module.parts[last].shape) > 0))
    if num_bytes % 8:
        raise module.wrong(end, "of groups of 8 bytes")

    def decode(parts: Parts) -> Decoded:
        whole = parts[last].float().reshape(())
        scale = parts[".weight_scale"].float() * (1 / whole if compressed else whole)
        return (_e2m1(parts[end], torch.float32).view(num_rows, num_groups, 16) * scale[..., None]).flatten(1)

    return Plan((num_rows, 2 * num_bytes), None, decode, "NVFP4")


def _e2m1(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.tensor(_E2M1, dtype=dtype)[words(packed, 4).long()]


def _mxfp4(module: Module) -> Plan:
    """w[e, n, k] = 2^(scales[e, n, k // 32] − 127) · blocks; the matrices of experts, each transposed to [K, N]."""
    num_experts, num_rows, num_groups, _ = module.shape("_blocks", None, None, None, 16, dtypes=("U8",))
    module.shape("_scales", num_experts, num_rows, num_groups, dtypes=("U8",))

    def decode(parts: Parts) -> Decoded:
        power = parts["_scales"].int()[..., None] - 127
        values = torch.ldexp(_e2m1(parts["_blocks"], torch.bfloat16), power).to(torch.bfloat16)
        return values.flatten(2).transpose(1, 2)

    return Plan((num_experts, num_groups * 32, num_rows), None, decode, "MXFP4")


_STATE = ".weight.quant_state.bitsandbytes__"


def _bitsandbytes(module: Module) -> Plan:
    """Four bits: values of a table in blocks of the flat matrix, each times its scale; eight: a scale an output."""
    if ".SCB" in module.parts:
        num_rows, num_columns = module.shape(".weight", None, None, dtypes=("I8",))
        module.shape(".SCB", num_rows, dtypes=("F32",))
        return Plan(
            (num_rows, num_columns),
            Int8Weight,
            lambda parts: Int8Weight(parts[".weight"], parts[".SCB"] / 127),
        )
    end = next((end for end in (f"{_STATE}nf4", f"{_STATE}fp4") if end in module.parts), f"{_STATE}nf4")
    module.shape(end, None, dtypes=("U8",))
    state = parse_json(bytes(module.small(end, _MAX_STATE_BYTES).tolist()), module.parts[end].file)
    shape = state.items("shape", 2)
    if len(shape) != 2 or not all(type(size) is int and 1 <= size < 1 << 31 for size in shape):
        raise state.wrong("shape", "two sizes")
    block = state.integer("blocksize", 1, 1 << 20)
    num_values = shape[0] * shape[1]
    num_blocks = -(-num_values // block)
    module.shape(".weight", -(-num_values // 2), 1, dtypes=("U8",))
    module.shape(".weight.quant_map", 16, dtypes=("F32",))
    nested = ".weight.nested_absmax" in module.parts
    module.shape(".weight.absmax", num_blocks, dtypes=("U8" if nested else "F32",))
    outer = state.integer("nested_blocksize", 1, 1 << 20) if nested else 1
    offset = state.number("nested_offset", -1e9, 1e9) if nested else 0.0
    if nested:
        module.shape(".weight.nested_absmax", -(-num_blocks // outer), dtypes=("F32",))
        module.shape(".weight.nested_quant_map", 256, dtypes=("F32",))

    def decode(parts: Parts) -> Decoded:
        scale = parts[".weight.absmax"]
        if nested:
            inner = parts[".weight.nested_quant_map"][scale.long()]
            scale = inner * parts[".weight.nested_absmax"].repeat_interleave(outer)[:num_blocks] + offset
        octets = parts[".weight"].flatten()
        q = torch.stack((octets >> 4, octets & 15), dim=-1).flatten()[:num_values].long()
        values = parts[".weight.quant_map"][q] * scale.repeat_interleave(block)[:num_values]
        return values.view(shape[0], shape[1])

    return Plan((shape[0], shape[1]), None, decode, f"bitsandbytes {end[-3:]}")


def _mlx(module: Module) -> Plan:
    """w = scales · q + biases, q in words along the inputs."""
    num_rows, num_words = module.shape(".weight", None, None, dtypes=("U32",))
    num_groups = module.shape(".scales", num_rows, None)[1]
    module.shape(".biases", num_rows, num_groups)
    settings = module.settings
    if settings.string("mode", default="affine") != "affine":
        raise settings.wrong("mode", "affine")
    own = settings.values.get(module.parts[".weight"].name.removesuffix(".weight"))
    if isinstance(own, dict):
        settings = settings.beside(own)
    size = settings.integer("group_size", GROUP, 1 << 20)
    bits = Module(module.parts, settings).choice(("bits",), (4, 8))
    num_columns = num_words * 32 // bits
    groups = _groups(module, ".scales", bits, num_columns, num_groups, size, "minimum")

    def decode(parts: Parts) -> Decoded:
        q = words(parts[".weight"].view(torch.int32), bits)
        return GroupedWeight.of(q, parts[".scales"], parts[".biases"], groups)

    return Plan((num_rows, num_columns), groups, decode)


_SCALES = (".weight", ".weight_scale", ".input_scale", ".input_zero_point", ".output_scale")
_BITSANDBYTES = (".weight", f"{_STATE}nf4", f"{_STATE}fp4", ".weight.quant_map", ".weight.nested_absmax")

# By the config's quant_method; of several entries each module takes the first whose mark it has.
FORMATS: dict[str, tuple[Format, ...]] = {
    "awq": (Format("AWQ", ".qweight", (".qzeros", ".scales"), _awq),),
    "gptq": (Format("GPTQ", ".qweight", (".qzeros", ".scales", ".g_idx"), _gptq),),
    "compressed-tensors": (
        Format(
            "compressed-tensors",
            ".weight_scale",
            (
                *_SCALES,
                *(".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
                *(".weight_global_scale", ".input_global_scale"),
            ),
            _compressed,
        ),
    ),
    "fp8": (
        Format("FP8 in blocks", ".weight_scale_inv", (*_SCALES, ".activation_scale"), _scaled),
        Format("FP8", ".weight_scale", _SCALES, _scaled),
    ),
    "fbgemm_fp8": (Format("FP8", ".weight_scale", (*_SCALES, ".input_scale_ub"), _scaled),),
    "modelopt": (Format("NVFP4", ".weight_scale", (*_SCALES, ".weight_scale_2"), _nvfp4),),
    "bitsandbytes": (
        Format("bitsandbytes", ".SCB", (".weight", ".weight_format"), _bitsandbytes),
        Format("bitsandbytes", ".weight.absmax", (*_BITSANDBYTES, ".weight.nested_quant_map"), _bitsandbytes),
    ),
    "mlx": (Format("MLX", ".scales", (".weight", ".biases"), _mlx),),
    "mxfp4": (Format("MXFP4", "_blocks", ("_scales",), _mxfp4, ""),),
}

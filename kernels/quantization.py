"""Weight formats of eight and four bits: what is stored, how it is made, and what it stands for.

A matrix [N, K] (N outputs, K inputs) is kept row by row, so any range of rows can be made, read or copied alone.
Nothing here belongs to a device or to a kernel: kernels pack these tensors into layouts of their own.

| format | w[n, k] ≈ | a weight takes |
|---|---|---|
| `Int8Weight` | scale[n] · values[n, k] | 8 bits |
| `Int4Weight` | scale[n, k // 32] · q[n, k] + minimum[n, k // 32] | 5 bits |
| `GroupedWeight` | the same of 4 or 8 bits by groups of any size, or scale · (q − zero) | as its `Groups` say |

The first two are made here from other numbers; the third holds what a quantised checkpoint says.

Activations are not quantised here; a kernel may do so, and then says how far it may deviate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

GROUP = 32  # inputs that share a scale and a minimum in Int4Weight
VERSION = 1  # raise it when the same weights give other tensors: what was kept on a disk is then made anew
_HALF_MAX = 65504.0  # the largest float16
# Elements quantised at once: their float32 copies (2 MiB) stay in a processor's caches.
_SLICE = 1 << 19


@dataclass(frozen=True)
class Int8Weight:
    """Symmetric, one scale an output (row).

    Attributes:
        values: [N, K] int8; as they are made here from −127 to 127.
        scale: [N] float32; as it is made here max|w| / 127 of the row, 0 for a row of zeros.
    """

    values: Tensor
    scale: Tensor
    kind: ClassVar[str] = "int8"

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, device: torch.device | None = None) -> Int8Weight:
        """An uninitialised weight [num_rows, num_columns], to be filled."""
        return cls(
            torch.empty(num_rows, num_columns, dtype=torch.int8, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def name(self) -> str:
        """In words."""
        return self.kind

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return self.values.nbytes + self.scale.nbytes

    def row_slice(self, start: int, stop: int) -> Int8Weight:
        """Rows start to stop, as views."""
        return Int8Weight(self.values[start:stop], self.scale[start:stop])

    def fill(self, weight: Tensor) -> None:
        """Quantises weight [N, K], of any float dtype and on any device, into this one's tensors.

        Raises ValueError if a value is not finite.
        """
        for rows in _row_slices(*self.shape):
            part = weight[rows].to(self.values.device, torch.float32)
            largest = part.abs().amax(dim=1)
            _check_finite(largest)
            scale = largest / 127
            divisor = torch.where(scale > 0, scale, 1.0)
            self.scale[rows] = scale
            self.values[rows] = (part / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8)

    def take_rows(self, rows: Tensor) -> Int8Weight:
        """Rows `rows` [T] int64, copied."""
        return Int8Weight(self.values[rows], self.scale[rows])

    def take(self, other: Int8Weight) -> None:
        """Fills this one with the numbers of `other`, of the same shape."""
        self.values.copy_(other.values)
        self.scale.copy_(other.scale)

    def fill_random(self, deviation: float, generator: torch.Generator) -> None:
        """Random weights, uniform, of mean 0 and that standard deviation."""
        self.values.random_(-127, 128, generator=generator)
        self.scale.fill_(deviation / _uniform_deviation(255))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix that this stands for, [N, K]; computed in float32."""
        return (self.values.float() * self.scale[:, None]).to(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `indices` [T] int64 of the matrix, [T, K]: an embedding lookup."""
        return self.take_rows(indices).dequantize(dtype)


Base = Literal["minimum", "zero", "middle"]


@dataclass(frozen=True)
class Groups:
    """How a quantised checkpoint's matrix is held: `bits` a weight, 4 or 8, and inputs by `size` that share a scale.

    size: a multiple of 32, or 16 where bits is 8. base: what a group's values are counted from.

    minimum   w = scale · q + minimum
    zero      w = scale · (q − zero), a zero point a group
    middle    w = scale · (q − 2^(bits − 1))
    """

    bits: int
    size: int
    base: Base

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.bits}-bit (groups of {self.size})"

    def empty(self, num_rows: int, num_columns: int, device: torch.device | None = None) -> GroupedWeight:
        """An uninitialised weight [num_rows, num_columns], to be filled."""
        return GroupedWeight(*self._tensors(num_rows, num_columns, device), num_columns, self)

    def _tensors(
        self, num_rows: int, num_columns: int, device: torch.device | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        num_padded = -(-num_columns // GROUP) * GROUP
        shape = num_rows, -(-num_padded // self.size)
        values = torch.empty(num_rows, num_padded * self.bits // 8, dtype=torch.uint8, device=device)
        scale = torch.empty(shape, dtype=torch.float16, device=device)
        return values, scale, None if self.base == "middle" else torch.empty_like(scale)


_Self = TypeVar("_Self", bound="GroupedWeight")


@dataclass(frozen=True)
class GroupedWeight:
    """Groups of a row's inputs with a scale each, as `groups` says.

    K is padded to Kp, a multiple of 32. What the padding stands for is finite: a kernel that runs over it must multiply
    it by activations of 0.

    Attributes:
        values: [N, Kp · bits / 8] uint8; of four bits the low half of a byte is q of even k, the high one of k + 1.
        scale: [N, G] float16, G groups.
        minimum: [N, G] float16: minima, or zero points where the base is "zero"; None where it is the middle.
        num_columns: K.
    """

    values: Tensor
    scale: Tensor
    minimum: Tensor | None
    num_columns: int
    groups: Groups

    @classmethod
    def of(cls, q: Tensor, scale: Tensor, minimum: Tensor | None, groups: Groups) -> GroupedWeight:
        """Of q [N, K] uint8, scale and minima or zero points [N, G] of any float dtype, which they keep."""
        return GroupedWeight(_pack(q, groups.bits), scale, minimum, q.shape[1], groups)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.values.shape[0], self.num_columns

    @property
    def name(self) -> str:
        """In words."""
        return self.groups.name

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, padding included."""
        return self.values.nbytes + self.scale.nbytes + (0 if self.minimum is None else self.minimum.nbytes)

    def row_slice(self: _Self, start: int, stop: int) -> _Self:
        """Rows start to stop, as views."""
        return self._pick(slice(start, stop))

    def take_rows(self: _Self, rows: Tensor) -> _Self:
        """Rows `rows` [T] int64, copied."""
        return self._pick(rows)

    def q(self) -> Tensor:
        """[N, Kp] uint8."""
        if self.groups.bits == 8:
            return self.values
        return torch.stack((self.values & 15, self.values >> 4), dim=-1).flatten(1)

    def take(self, other: GroupedWeight) -> None:
        """Fills this one with the numbers of `other`, of the same shape and of a format that `common_kind` joins."""
        to, groups = self.groups, other.groups
        q, repeats = other.q(), groups.size // to.size
        scale, base = other.scale.float(), other.minimum
        if base is None and to.base == "middle":
            q = q if groups.bits == to.bits else q + (128 - 8)
        elif base is None:
            middle = float(1 << groups.bits - 1)
            base = torch.full_like(scale, middle) if to.base == "zero" else -middle * scale
        self.values.copy_(_pack(q, to.bits))
        for own, theirs in ((self.scale, scale), (self.minimum, base)):
            if own is not None:
                assert theirs is not None
                own.copy_(theirs.repeat_interleave(repeats, 1)[:, : own.shape[1]])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix that this stands for, [N, K]; computed in float32."""
        q, scale, base = self.q().float(), self._spread(self.scale), self.minimum
        if self.groups.base == "minimum":
            assert base is not None
            matrix = q.mul_(scale).add_(self._spread(base))
        else:
            zero = float(1 << self.groups.bits - 1) if base is None else self._spread(base)
            matrix = q.sub_(zero).mul_(scale)
        return matrix[:, : self.num_columns].to(dtype)

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `indices` [T] int64 of the matrix, [T, K]: an embedding lookup."""
        return self._pick(indices).dequantize(dtype)

    def _spread(self, values: Tensor) -> Tensor:
        """[N, G] to [N, Kp] float32."""
        num_padded = self.values.shape[1] * 8 // self.groups.bits
        return values.float().repeat_interleave(self.groups.size, 1)[:, :num_padded]

    def _pick(self: _Self, rows: slice | Tensor) -> _Self:
        minimum = None if self.minimum is None else self.minimum[rows]
        return replace(self, values=self.values[rows], scale=self.scale[rows], minimum=minimum)


class Int4Weight(GroupedWeight):
    """One scale and one minimum for every 32 inputs of a row, as in llama.cpp's Q4_1.

    The scale is never negative. The padding's nibbles are 0, so it stands for `minimum`.
    """

    kind: ClassVar[str] = "int4"
    minimum: Tensor

    @classmethod
    def empty(cls, num_rows: int, num_columns: int, device: torch.device | None = None) -> Int4Weight:
        """An uninitialised weight [num_rows, num_columns], to be filled."""
        groups = Groups(4, GROUP, "minimum")
        return cls(*groups._tensors(num_rows, num_columns, device), num_columns, groups)

    def fill(self, weight: Tensor) -> None:
        """Quantises weight [N, K], of any float dtype and on any device, into this one's tensors.

        Raises ValueError if a value is not finite.
        """
        num_rows, num_columns = self.shape
        num_groups = self.scale.shape[1]
        num_padding = num_groups * GROUP - num_columns
        for rows in _row_slices(num_rows, num_groups * GROUP):
            part = weight[rows].to(self.values.device, torch.float32)
            if num_padding:  # the last column once more, which leaves the range of its group as it is
                part = torch.cat((part, part[:, -1:].expand(-1, num_padding)), dim=1)
            scale, minimum, q = _fit(part.reshape(-1, GROUP).t().contiguous())
            nibbles = q.to(torch.uint8)
            if num_padding:
                nibbles.view(GROUP, -1, num_groups)[GROUP - num_padding :, :, -1] = 0
            packed = nibbles[0::2] | nibbles[1::2] << 4
            self.values[rows] = packed.t().reshape(part.shape[0], -1)
            self.scale[rows] = scale.view(-1, num_groups)
            self.minimum[rows] = minimum.view(-1, num_groups)

    def fill_random(self, deviation: float, generator: torch.Generator) -> None:
        """Random weights, uniform, of mean 0 and that standard deviation."""
        step = deviation / _uniform_deviation(16)
        self.values.random_(0, 256, generator=generator)
        self.scale.fill_(step)
        self.minimum.fill_(-7.5 * step)


Made = Int8Weight | Int4Weight  # of other numbers, here
QuantizedWeight = Int8Weight | GroupedWeight
Weight = Tensor | Int8Weight | GroupedWeight
Quantized = type[Int8Weight] | type[Int4Weight] | Groups


def common_kind(kinds: Sequence[Quantized | None]) -> Quantized | None:
    """The format that holds the numbers of all `kinds`, which may be those of parts of one matrix; None: none does.

    A zero point's minimum, −scale · zero, is no float16; that of the middle is, scale times a power of two.
    """
    first = kinds[0]
    if all(kind == first for kind in kinds):
        return first
    groups = [kind for kind in kinds if isinstance(kind, Groups)]
    bases = {each.base for each in groups}
    size = min((each.size for each in groups), default=0)
    if len(groups) < len(kinds) or bases >= {"zero", "minimum"} or any(each.size % size for each in groups):
        return None
    base: Base = "minimum" if "minimum" in bases else "zero" if "zero" in bases else "middle"
    return Groups(max(each.bits for each in groups), size, base)


@dataclass(frozen=True)
class WeightFormat:
    """How matrices are quantised: `linear` those of attention and MLP, `head` the head and an embedding tied to it,
    `patch` those of patches.

    Norms, biases, position tables, projections of the embedding and an untied embedding, which is only looked into,
    are not quantised.
    """

    linear: type[Made]
    head: type[Made]
    patch: type[Made]


# The head stays at eight bits: its errors go straight into the logits, and it is read once a step. So do patches, which
# are small: four bits cost SmolLM2 at depth 10 0.025 nats of log-loss, eight none.
WEIGHT_FORMATS = {
    "int8": WeightFormat(linear=Int8Weight, head=Int8Weight, patch=Int8Weight),
    "int4": WeightFormat(linear=Int4Weight, head=Int8Weight, patch=Int8Weight),
}


def rows_of(weight: Weight, start: int, stop: int) -> Weight:
    """Rows start to stop of a weight, quantised or not, as views."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.row_slice(start, stop)


def quantize_int8(weight: Tensor) -> Int8Weight:
    """weight [N, K] in eight bits, on its device. Raises ValueError if a value is not finite."""
    quantized = Int8Weight.empty(weight.shape[0], weight.shape[1], weight.device)
    quantized.fill(weight)
    return quantized


def quantize_int4(weight: Tensor) -> Int4Weight:
    """weight [N, K] in four bits, on its device. Raises ValueError if a value is not finite."""
    quantized = Int4Weight.empty(weight.shape[0], weight.shape[1], weight.device)
    quantized.fill(weight)
    return quantized


def _row_slices(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, _SLICE // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _uniform_deviation(count: int) -> float:
    """Standard deviation of the integers from 1 to `count`, all equally likely."""
    return float(((count * count - 1) / 12) ** 0.5)


def _check_finite(*extremes: Tensor) -> None:
    if not all(bool(extreme.isfinite().all()) for extreme in extremes):
        raise ValueError("a weight is not finite")


def _fit(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scale [G] and minimum [G] in float16 and q [32, G] of groups [32, G], all float32: one group a column.

    The first try spans the group's range with 16 values. A least-squares fit of scale and minimum to its q is the
    second, kept for those groups whose squared error falls: over normal weights the error is 4 % less, and weights
    that were of this format before get their scales back. More tries gain 1 or 2 % for three times the work.
    """
    low, high = groups.aminmax(dim=0)
    _check_finite(low, high)
    minimum = _to_half(low, -_HALF_MAX)
    scale = _to_half((high - minimum.float()) / 15)
    q, error = _nearest(groups, scale, minimum)
    other_scale, other_minimum = _least_squares(groups, q)
    other_q, other_error = _nearest(groups, other_scale, other_minimum)
    better = other_error < error
    return (
        torch.where(better, other_scale, scale),
        torch.where(better, other_minimum, minimum),
        torch.where(better, other_q, q),
    )


def _to_half(values: Tensor, low: float = 0.0) -> Tensor:
    return values.clamp(low, _HALF_MAX).to(torch.float16)


def _nearest(groups: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """q [32, G], the nearest of the 16 values for every weight, and the squared error [G] of each group."""
    step, offset = scale.float(), minimum.float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    q = ((groups - offset) * inverse).round_().clamp_(0, 15)
    error = (q * step).add_(offset).sub_(groups).square_().sum(dim=0)
    return q, error


def _least_squares(groups: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """scale [G] and minimum [G] that bring scale · q + minimum nearest to groups [32, G], in float16."""
    mean, mean_q = groups.mean(dim=0), q.mean(dim=0)
    centred_q = q - mean_q
    variance = centred_q.square().sum(dim=0)
    slope = ((groups - mean) * centred_q).sum(dim=0) / variance.clamp(min=1e-6)
    scale = _to_half(slope)
    return scale, _to_half(mean - scale.float() * mean_q, -_HALF_MAX)


def _pack(q: Tensor, bits: int) -> Tensor:
    """q [N, K] uint8 as `GroupedWeight.values` has it, zeros in the padding."""
    q = torch.nn.functional.pad(q, (0, -q.shape[1] % GROUP))
    return q if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4

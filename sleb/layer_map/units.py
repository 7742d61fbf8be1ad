"""The nouns that a layer map is written in: units, and texts with what they lose at every depth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, cast, get_args

from sleb.errors import LayerMapError

Part = Literal["block", "attention", "mlp"]
Sublayer = tuple[int, Literal["attention", "mlp"]]

MAX_BLOCKS = 1 << 10  # that a model may have: the deepest published has 126 (Llama 3.1 405B)


def place_of(sublayer: Sublayer) -> int:
    """Where a sublayer stands among all, from 0."""
    return 2 * sublayer[0] + (sublayer[1] == "mlp")


def sublayer_at(place: int) -> Sublayer:
    """The inverse of `place_of`."""
    return (place // 2, "mlp" if place % 2 else "attention")


def is_int(value: Any) -> TypeGuard[int]:
    """An integer that is not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, order=True)
class Unit:
    """What one round of the search may remove: a block, or only its attention or its MLP."""

    block: int
    part: Part = "block"

    def __post_init__(self) -> None:
        if not is_int(self.block) or self.block < 0:
            raise LayerMapError(f"block {self.block!r} of a unit must be an integer of 0 or more")
        if self.part not in get_args(Part):
            raise LayerMapError(f"part {self.part!r} of a unit must be one of {', '.join(get_args(Part))}")

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """The (block, "attention" | "mlp") pairs that it covers, in the order in which they run."""
        whole: tuple[Sublayer, Sublayer] = ((self.block, "attention"), (self.block, "mlp"))
        return whole if self.part == "block" else tuple(each for each in whole if each[1] == self.part)

    @classmethod
    def parse(cls, text: str) -> Unit:
        """The inverse of `str`: "14", "14.attention" or "14.mlp"; LayerMapError for anything else."""
        number, dot, part = text.partition(".")
        is_number = number.isascii() and number.isdigit() and len(number) < 10 and str(int(number)) == number
        if not is_number or (dot and part not in ("attention", "mlp")):
            raise LayerMapError(f'unit {text!r} must be written like "14", "14.attention" or "14.mlp"')
        return cls(int(number), cast(Part, part or "block"))

    def __str__(self) -> str:
        return str(self.block) if self.part == "block" else f"{self.block}.{self.part}"


@dataclass(frozen=True)
class SearchRecord:
    """How an order was found. Every field may be unknown (None).

    `units` is "blocks", "sublayers" or "attention"; `mode` "exact", "race" or "gradient" (`sleb.pruning.search`);
    `cost` what a removal's added loss was weighed by, if by anything; `objective` "loss" or "kl", what candidates were
    judged by; `patch` what stood where they were removed, "none", "scale", "low-rank=64" or "full". Earlier versions
    knew "loss" and "none" alone, and say nothing of them.
    """

    units: str | None = None
    mode: str | None = None
    cost: str | None = None
    objective: str | None = None
    patch: str | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """The tokens that a search ran over. Every field may be unknown (None).

    `token_hash` is "sha256:" and the hex digest of the [windows, seqlen] token ids as little-endian int64;
    `seed` is None for consecutive windows; `special_tokens` says whether the tokenizer added its own.
    """

    source: str | None = None
    sampler: str | None = None
    seed: int | None = None
    seqlen: int | None = None
    windows: int | None = None
    token_hash: str | None = None
    dtype: str | None = None
    special_tokens: bool | None = None

    @property
    def sources(self) -> frozenset[str]:
        """The names of what `source` is made of: of "wiki.txt=0.7,self=0.3" wiki.txt and self."""
        parts = (self.source or "").split(",")
        return frozenset(part.strip().rpartition("=")[0] or part.strip() for part in parts) - {""}


@dataclass(frozen=True)
class TextLosses:
    """A text, and the loss of each depth on it.

    `losses[k]` is that with the first k units removed: the sum over the windows of mean cross-entropy × window length.
    Empty where they are not known.
    """

    record: CalibrationRecord
    losses: tuple[float, ...] = ()

    def up_to(self, depth: int) -> TextLosses:
        """Those of the depths up to `depth`."""
        return replace(self, losses=self.losses[: depth + 1])

    def token_loss(self, depth: int) -> float | None:
        """Mean cross-entropy in nats a token at `depth`, which must be of the order; None where that is not known."""
        num_tokens = (self.record.windows or 0) * (self.record.seqlen or 0)
        return self.losses[depth] / num_tokens if self.losses and num_tokens else None

    def perplexity(self, depth: int) -> float | None:
        """exp of `token_loss`; None where that is not known."""
        loss = self.token_loss(depth)
        try:
            return None if loss is None else math.exp(loss)
        except OverflowError:
            return math.inf

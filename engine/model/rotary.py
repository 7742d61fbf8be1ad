"""Rotary embedding: what a config says of it, as frequencies, and the tables of angles that come of them.

The formulas are those of transformers' `modeling_rope_utils.py`, whose fields these are; frequencies are computed in
float32, as there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sleb.fields import Fields
from sleb.models.config import MAX_POSITIONS
from sleb.models.families import Family

_RULES = ("default", "linear", "llama3", "yarn", "longrope")
_MAX_THETA = 1e15  # the largest in use are near 1e8
_MAX_FACTOR = 1e6


@dataclass(frozen=True)
class Rotary:
    """How queries and keys are rotated by their positions.

    Attributes:
        frequencies: [R / 2], radians a position, scaled as the checkpoint asks.
        scaling: what cos and sin are multiplied by.
        longest: the positions that it is scaled for.
        original: the context that it was trained in. long_frequencies: those of longer ones, where they differ.
    """

    frequencies: tuple[float, ...]
    scaling: float
    longest: int
    original: int
    long_frequencies: tuple[float, ...] | None = None


class RotaryTables:
    """cos and sin, each [max_model_len, R / 2] float32: of contexts up to the original one, or of longer ones.

    longrope has frequencies for both, and rotates all of a sequence by those of the length that it has reached, as
    transformers does: what `select` has chosen counts for a whole step.
    """

    def __init__(self, rotary: Rotary, max_model_len: int, device: torch.device) -> None:
        self._sets = [_tables(rotary.frequencies, rotary.scaling, max_model_len, device)]
        if rotary.long_frequencies is not None and max_model_len > rotary.original:
            self._sets.append(_tables(rotary.long_frequencies, rotary.scaling, max_model_len, device))
        self._long = False
        self.cos, self.sin = (table.clone() for table in self._sets[0]) if self._sets[1:] else self._sets[0]

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin

    def select(self, long: bool) -> None:
        """Fills the tables, in place: kernels and graphs hold their addresses."""
        if long != self._long and len(self._sets) > 1:
            for table, values in zip((self.cos, self.sin), self._sets[long], strict=True):
                table.copy_(values)
            self._long = long


def _tables(
    frequencies: Sequence[float], scaling: float, max_model_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    positions = torch.arange(max_model_len, dtype=torch.float32)
    angles = torch.outer(positions, torch.tensor(frequencies, dtype=torch.float32))
    return (angles.cos() * scaling).to(device), (angles.sin() * scaling).to(device)


_KINDS = ("full_attention", "sliding_attention")


def read_rotaries(
    config: Fields, family: Family, values: Mapping[str, Any], head_dim: int
) -> tuple[tuple[Rotary, ...], Mapping[str, int]]:
    """The Rotary objects of a config.json, of which `values` are its family's fields; and for each kind of layer,
    "full_attention" and "sliding_attention", which of them is its own.

    Older files have rope_theta and rope_scaling at the top, newer ones all of it in rope_parameters, or an object a
    kind of layer in that. What is at the top is of the kind "full_attention" where the kinds differ. Raises ModelError.
    """
    rope = next(
        (
            each
            for name in ("rope_scaling", "rope_parameters")
            if "rope_theta" in values and (each := config.object(name, None)) and each.values
        ),
        Fields(family.rope, f"{config.source}: rope_parameters"),
    )
    named = [name for name, value in rope.values.items() if isinstance(value, dict)]
    local = family.local_rope_theta
    for name in named:
        if local is None:  # other families' classes have one object a kind of layer
            raise rope.wrong(name, "a value: this family's rotation does not differ from layer to layer")
        if name not in _KINDS:
            raise rope.wrong(name, f"the rotation of one of {', '.join(_KINDS)}")
    full = rope.object("full_attention", Fields({}, rope.source)) if named else rope
    rotary = _read_rotary(config, family, full, values, head_dim)
    if local is None:
        return (rotary,), dict.fromkeys(_KINDS, 0)
    sliding = rope.object("sliding_attention", Fields({}, rope.source)) if named else Fields({}, rope.source)
    theta = values[local] if isinstance(local, str) else local
    other = _read_rotary(config, family, sliding, {**values, "rope_theta": theta}, head_dim)
    if other == rotary:
        return (rotary,), dict.fromkeys(_KINDS, 0)
    return (rotary, other), {"full_attention": 0, "sliding_attention": 1}


def _read_rotary(
    config: Fields, family: Family, rope: Fields, values: Mapping[str, Any], head_dim: int
) -> Rotary:
    """Of one object."""
    theta = rope.number("rope_theta", 1.0, _MAX_THETA, values.get("rope_theta", 10000.0), above=True)
    rotated = values.get("rotary_dim") or int(head_dim * _partial(rope, values))
    num_frequencies = -(-rotated // 2)
    if rotated < 1 or 2 * num_frequencies > head_dim:
        raise config.wrong(
            "head_dim", f"even, and at least 2, to be rotated; it makes {rotated} of {head_dim} features"
        )
    rule = _rule(rope, family)
    if rule == "dynamic":
        theta *= rope.number("alpha", 0.0, _MAX_FACTOR, above=True) ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
    plain = 1.0 / theta**exponents
    positions = values["max_position_embeddings"]
    if rule in ("default", "dynamic"):
        return _rotary(plain, 1.0, positions)
    original = values.get("original_max_position_embeddings") or rope.integer(
        "original_max_position_embeddings", 2, MAX_POSITIONS, positions
    )
    match rule:
        case "linear":
            factor = _factor(rope)
            return _rotary(plain / factor, 1.0, original, factor * original)
        case "llama3":
            return _rotary(_llama3(rope, plain, original), 1.0, original)
        case "yarn":
            factor = _factor(rope, positions / original)
            frequencies = _yarn(rope, plain, theta, rotated, factor, original)
            return _rotary(frequencies, _yarn_scaling(rope, factor), original, factor * original)
        case _:
            short, long = (
                plain / _divisors(rope, name, num_frequencies) for name in ("short_factor", "long_factor")
            )
            factor = _factor(rope, positions / original)
            scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            scaling = _attention_factor(rope, scaling)
            return replace(_rotary(short, scaling, original), long_frequencies=tuple(long.tolist()))


def _rotary(frequencies: Tensor, scaling: float, original: int, longest: float = 0) -> Rotary:
    return Rotary(tuple(frequencies.tolist()), scaling, min(int(longest), MAX_POSITIONS), original)


def _rule(rope: Fields, family: Family) -> str:
    name = "rope_type" if "rope_type" in rope else "type"
    stretched = ("dynamic",) if family.ntk_alpha else ()
    rule: str = rope.string(name, (*_RULES, *stretched, *family.longrope_names), "default")
    return "longrope" if rule in family.longrope_names else rule


def _partial(rope: Fields, values: Mapping[str, Any]) -> float:
    if "partial_rotary_factor" not in values:
        return 1.0
    share: float = rope.number("partial_rotary_factor", 0.0, 1.0, values["partial_rotary_factor"], above=True)
    return share


def _factor(rope: Fields, *default: float) -> float:
    factor: float = rope.number("factor", 0.0, _MAX_FACTOR, *default, above=True)
    return factor


def _attention_factor(rope: Fields, default: float) -> float:
    factor: float = rope.number("attention_factor", 0.0, _MAX_FACTOR, default, above=True)
    return factor


def _divisors(rope: Fields, name: str, count: int) -> Tensor:
    found = rope.items(name, count)
    divisors = [rope.beside({name: each}).number(name, 0.0, _MAX_FACTOR, above=True) for each in found]
    if len(divisors) != count:
        raise rope.wrong(name, f"a list of {count} numbers, one a pair of rotated features")
    return torch.tensor(divisors, dtype=torch.float32)


def _llama3(rope: Fields, plain: Tensor, original: int) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, and what lies between is interpolated."""
    factor = _factor(rope)
    low: float = rope.number("low_freq_factor", 0.0, _MAX_FACTOR, above=True)
    high: float = rope.number("high_freq_factor", low, _MAX_FACTOR, above=True)
    turns = original * plain / (2 * math.pi)  # of each frequency in the original context
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(rope: Fields, plain: Tensor, theta: float, rotated: int, factor: float, original: int) -> Tensor:
    """YaRN (arXiv 2309.00071): what turns often enough in the original context is kept, the rest interpolated."""
    fast = rope.number("beta_fast", 0.0, _MAX_FACTOR, 32.0, above=True)
    slow = rope.number("beta_slow", 0.0, _MAX_FACTOR, 1.0, above=True)

    def place(num_turns: float) -> float:
        return rotated * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = place(fast), place(slow)
    if rope.boolean("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = (torch.arange(len(plain), dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    frequencies: Tensor = plain / factor * (1 - kept) + plain * kept
    return frequencies


def _yarn_scaling(rope: Fields, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    own, of_all = (rope.number(name, 0.0, _MAX_FACTOR, 0.0) for name in ("mscale", "mscale_all_dim"))
    return _attention_factor(rope, scale(own) / scale(of_all) if own and of_all else scale(1.0))

"""What goes out, a layer map at one depth, and what comes in, the units that a foreign file removes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sleb.errors import ConfigError, LayerMapError
from sleb.fields import shown_path
from sleb.layer_map.layer_map import LayerMap
from sleb.layer_map.patches import Array, Patch
from sleb.layer_map.units import CalibrationRecord, Sublayer, Unit, is_int

PATCH_WAYS = ("keep", "merge", "drop")
_HOLD_PATCHES = ("decilm", "zeroed", "gguf")
_MERGE_PATCHES = ("hf", "gguf")


@dataclass(frozen=True)
class Mending:
    """What becomes of the patches of a depth in an export.

    Attributes:
        way: "keep": they are written as they are; "merge": into the output projection of the MLP before each; "drop".
        merged: for each block whose output projection has taken a patch in, its new tensors, by names in the block.
        calibration: the text on which that was fitted. losses: a token, there, in nats: with the patches, and merged.
    """

    way: str = "keep"
    patches: tuple[Patch, ...] = ()
    merged: Mapping[int, Mapping[str, Array]] = field(default_factory=dict)
    calibration: CalibrationRecord | None = None
    losses: tuple[float, float] | None = None

    @property
    def kept(self) -> tuple[Patch, ...]:
        return self.patches if self.way == "keep" else ()


@dataclass(frozen=True)
class Removal:
    """A layer map at one depth. Raises ConfigError for a depth that it lacks, or that leaves all or nothing."""

    layer_map: LayerMap
    depth: int
    mending: Mending = Mending()

    def __post_init__(self) -> None:
        if not is_int(self.depth) or not 1 <= self.depth <= self.layer_map.max_depth:
            what = "removes nothing" if self.depth == 0 else "is not in the layer map"
            model = shown_path(self.layer_map.model)
            raise ConfigError(f"depth {self.depth} {what} of {model}: choose 1 to {self.layer_map.max_depth}")
        if not self.kept_blocks:
            raise ConfigError(f"depth {self.depth} removes every block: choose a smaller one")

    @property
    def units(self) -> tuple[Unit, ...]:
        """In the order of the map."""
        return self.layer_map.removed[: self.depth]

    @cached_property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Every removed attention and MLP, in the order of the map."""
        return tuple(sublayer for unit in self.units for sublayer in unit.sublayers)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks of which nothing is left, in the order in which their last part goes."""
        seen: set[int] = set()
        whole = []
        for block, _ in self.sublayers:
            if block in seen:
                whole.append(block)
            seen.add(block)
        return tuple(whole)

    @cached_property
    def parts(self) -> tuple[Sublayer, ...]:
        """The removed attentions and MLPs of blocks that still run in part, in the order of the map."""
        return tuple(each for each in self.sublayers if each[0] not in self.blocks)

    @cached_property
    def kept_blocks(self) -> tuple[int, ...]:
        """The blocks of which something is left, in the order in which they run."""
        return tuple(block for block in range(self.layer_map.num_blocks) if block not in self.blocks)

    def whole_blocks(self, notation: str) -> tuple[int, ...]:
        """`blocks`, for a notation that knows nothing smaller. Raises ConfigError if the depth removes a part."""
        if self.parts:
            shown = ", ".join(f"{block}.{part}" for block, part in self.parts[:4])
            raise ConfigError(
                f"format {notation} can only remove whole blocks, but depth {self.depth} removes {shown}"
                f"{', …' if len(self.parts) > 4 else ''}: use --format zeroed, decilm, mergekit, llm-drop or "
                "blockpruner, or a depth of whole blocks"
            )
        return self.blocks


def check_way(removal: Removal, notation: str, way: str) -> None:
    """Raises ConfigError where the patches of the depth cannot be written that way: they are never lost in silence."""
    if way not in PATCH_WAYS:
        raise ConfigError(f"patches {way!r} is unknown: choose {', '.join(PATCH_WAYS)}")
    patches = removal.layer_map.patches
    number = 0 if patches is None else len(patches.at(removal.depth))
    if way == "merge" and (notation not in _MERGE_PATCHES or not number):
        why = f"format {notation} is another" if number else f"depth {removal.depth} has none"
        raise ConfigError(
            f"patches can only be merged in format hf or gguf, and where there are some, but {why}"
        )
    if way == "merge":
        removal.whole_blocks(notation)
    merge = "--patches merge with a --calibration text, which approximates them where the model has room, "
    merge = merge if notation == "hf" else ""
    if way == "keep" and number and notation not in _HOLD_PATCHES:
        raise ConfigError(
            f"depth {removal.depth} has {number} patch{'es' * (number > 1)}, which format {notation} cannot hold: use "
            f"--format decilm, which holds a Llama's exactly, {merge}or --patches drop, which leaves them out"
        )


@dataclass(frozen=True)
class Imported:
    """What a foreign file says. Whatever it leaves open is None.

    `model` is a name or a path; `config` the Hugging Face configuration that the file is; `rest_from` says that all
    blocks from that number on are removed too; `notes` are for people.
    """

    units: tuple[Unit, ...]
    num_blocks: int | None = None
    model: str | None = None
    config: Mapping[str, Any] | None = None
    calibration: CalibrationRecord | None = None
    source: str | None = None
    rest_from: int | None = None
    notes: tuple[str, ...] = ()
    patches: tuple[Patch, ...] = ()


def block_numbers(values: Sequence[Any], where: str) -> tuple[int, ...]:
    """The values, checked to be block numbers. Raises LayerMapError that names the first that is not."""
    for index, value in enumerate(values):
        if not is_int(value) or value < 0:
            raise LayerMapError(
                f"{where}[{index}] is {str(value)[:40]!r}; it must be a block's number, 0 or more"
            )
    return tuple(values)

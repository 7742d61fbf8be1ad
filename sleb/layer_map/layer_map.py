"""LayerMap: which sublayers of which blocks of a decoder run, as a removal order with nested depths.

Depth k means that the first k units of the order are removed, so a deeper map runs a subset of what a
shallower one runs. The JSON form (schema 1) is one object:

    {"schema_version": 1, "model": "llama-2-7b", "fingerprint": "sha256:..." | null, "num_blocks": 32,
     "removed": [14, "7.attention"], "depth": 2, "losses": [dense, after 14, after 7.attention] | null,
     "candidate_losses": [{"1": 2.5, ..., "14": 2.25}, {...}] | null,
     "calibration": {...} | null, "source": "citation" | null,
     "search": {...}, "held_out": {...}, "held_out_losses": [dense, ...],
     "further_held_out": [{"record": {...}, "losses": [dense, ...]}],           (left out where unknown)
     "patches": {"file": "map.0a1b2c3d.safetensors", "sha256": "...", "record": {...}},
     "unpatched": {"record": {...}, "losses": [dense, ...]}}

A block is written as its number and a part of one as "7.attention" or "7.mlp". A candidate that the search
disqualified (its loss was not finite) is null there and `math.inf` in memory. The first held-out text stands
apart from the further ones because earlier versions know one. Fields that are not named here are ignored, so
that a later version may add some without a new schema.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import cast

from sleb.errors import LayerMapError
from sleb.fields import Fields, parse_json, read_json, shown_path
from sleb.files import replacement
from sleb.layer_map.json_form import dump_document, read_document
from sleb.layer_map.patches import Patch, Patches
from sleb.layer_map.units import (
    MAX_BLOCKS,
    CalibrationRecord,
    Part,
    SearchRecord,
    Sublayer,
    TextLosses,
    Unit,
    is_int,
)

__all__ = [
    "CalibrationRecord",
    "LayerMap",
    "Part",
    "Patch",
    "Patches",
    "SearchRecord",
    "TextLosses",
    "Unit",
    "shipped_maps",
]


@dataclass(frozen=True)
class LayerMap:
    """A frozen removal order over one model's units, and how it was found.

    `losses[k]` is the loss (sum over the calibration windows of mean cross-entropy × window length) with
    the first k units removed; [0] is the dense model's. `candidate_losses[k]` holds the loss, or what else `search`
    names as its objective, of every unit that round k + 1 computed whole, `math.inf` for a disqualified one. `held_out`
    are texts that took no part in the search: the calibration text flatters what was chosen on it. `depth` is the
    recommended one; left out, it is the whole order. `patches` stand where units were removed, and the losses are those
    with them; where the search fitted them, to every second window, losses are the others' times all windows for each
    of them. `unpatched` are the losses without, of one of these texts. Raises LayerMapError when the fields contradict
    each other.
    """

    model: str
    fingerprint: str | None
    num_blocks: int
    removed: tuple[Unit, ...] = ()
    losses: tuple[float, ...] | None = None
    candidate_losses: tuple[dict[Unit, float], ...] | None = field(default=None, hash=False)
    calibration: CalibrationRecord | None = None
    depth: int = -1
    source: str | None = None
    search: SearchRecord | None = None
    held_out: tuple[TextLosses, ...] = ()
    patches: Patches | None = None
    unpatched: TextLosses | None = None

    def __post_init__(self) -> None:
        if not is_int(self.num_blocks) or not 1 <= self.num_blocks <= MAX_BLOCKS:
            raise LayerMapError(f"num_blocks {self.num_blocks!r} must be an integer from 1 to {MAX_BLOCKS}")
        object.__setattr__(self, "removed", tuple(self.removed))
        self._check_units(self.removed, "removed")
        self._check_repeats()
        if self.losses is not None:
            object.__setattr__(self, "losses", tuple(self.losses))
            self._check_losses(self.losses, "losses")
        object.__setattr__(self, "held_out", tuple(self.held_out))
        for index, text in enumerate(self.held_out):
            if text.losses:
                name = f"further_held_out[{index - 1}].losses" if index else "held_out_losses"
                self._check_losses(text.losses, name)
        if self.unpatched is not None:
            self._check_losses(self.unpatched.losses, "unpatched.losses")
        if self.candidate_losses is not None:
            object.__setattr__(self, "candidate_losses", tuple(dict(each) for each in self.candidate_losses))
            self._check_candidates(self.candidate_losses)
        object.__setattr__(self, "depth", self.max_depth if self.depth == -1 else self._depth(self.depth))

    def _check_units(self, units: Iterable[Unit], name: str) -> None:
        for unit in units:
            if unit.block >= self.num_blocks:
                allowed = f"its {self.num_blocks} blocks are 0 to {self.num_blocks - 1}"
                raise LayerMapError(
                    f"unit {unit} in {name} is not in the model {shown_path(self.model)}: {allowed}"
                )

    def _check_repeats(self) -> None:
        owner: dict[Sublayer, Unit] = {}
        for unit in self.removed:
            for sublayer in unit.sublayers:
                if sublayer in owner:
                    other = owner[sublayer]
                    why = "is repeated" if other == unit else f"overlaps {other}, which goes before it"
                    raise LayerMapError(
                        f"unit {unit} in removed {why}: each sublayer can be removed only once"
                    )
                owner[sublayer] = unit

    def _check_losses(self, losses: tuple[float, ...], name: str) -> None:
        if len(losses) != len(self.removed) + 1:
            wanted = f"{len(self.removed) + 1} (the dense model's and one after each removal)"
            raise LayerMapError(
                f"{name} has {len(losses)} values; {len(self.removed)} removals need {wanted}"
            )
        for index, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise LayerMapError(f"{name}[{index}] is {loss}: every loss must be a finite number")

    def _check_candidates(self, rounds: tuple[dict[Unit, float], ...]) -> None:
        if len(rounds) != len(self.removed):
            raise LayerMapError(
                f"candidate_losses has {len(rounds)} rounds; {len(self.removed)} removals need as many"
            )
        for index, candidates in enumerate(rounds):
            self._check_units(candidates, f"candidate_losses[{index}]")
            for unit, loss in candidates.items():
                if math.isnan(loss) or loss == -math.inf:
                    raise LayerMapError(
                        f"candidate_losses[{index}] of unit {unit} is {loss}: it must be finite, or inf "
                        "(null in JSON) for a disqualified candidate"
                    )

    def _depth(self, depth: int) -> int:
        if not is_int(depth) or not 0 <= depth <= self.max_depth:
            raise LayerMapError(
                f"depth {depth!r} is not in the layer map of {shown_path(self.model)}: "
                f"it has depths 0 to {self.max_depth}"
            )
        return depth

    @property
    def measured_depth(self) -> int:
        """What is measured beside depth 0 unless one says: the recommended depth; where that is 0, half the order."""
        return self.depth or (self.max_depth + 1) // 2

    @property
    def max_depth(self) -> int:
        """How many units the whole order removes."""
        return len(self.removed)

    @cached_property
    def _removed_at(self) -> dict[Sublayer, int]:
        return {each: at for at, unit in enumerate(self.removed, 1) for each in unit.sublayers}

    def removed_at(self, block: int, part: Part) -> int | None:
        """The 1-based place in the order at which a sublayer goes (depth k lacks it iff place <= k), or None.

        For part "block": the place at which the last of its two sublayers goes.
        """
        unit = Unit(block, part)
        self._check_units((unit,), "the question")
        places = [self._removed_at.get(each) for each in unit.sublayers]
        return None if None in places else max(cast(list[int], places))

    def active(self, unit: Unit | tuple[int, Part], depth: int) -> bool:
        """Whether any sublayer of a unit, or of a (block, part) pair, still runs at `depth`."""
        block, part = (unit.block, unit.part) if isinstance(unit, Unit) else unit
        place = self.removed_at(block, part)
        return self._depth(depth) >= 0 and (place is None or place > depth)

    def at(self, depth: int) -> LayerMap:
        """The map whose order is cut to its first `depth` removals, and which recommends all of them."""
        self._depth(depth)
        return replace(
            self,
            removed=self.removed[:depth],
            losses=None if self.losses is None else self.losses[: depth + 1],
            held_out=tuple(text.up_to(depth) for text in self.held_out),
            unpatched=None if self.unpatched is None else self.unpatched.up_to(depth),
            candidate_losses=None if self.candidate_losses is None else self.candidate_losses[:depth],
            depth=depth,
            patches=None if self.patches is None else self.patches.up_to(depth),
        )

    def patches_at(self, depth: int, hidden_size: int) -> tuple[Patch, ...]:
        """The patches that rows of `depth` get, from the bottom up; depth 0 has none, and reads no file.

        Raises LayerMapError for a file of patches that is missing, changed, of another map, or of another width.
        """
        if self.patches is None or self._depth(depth) == 0:
            return ()
        self.patches.check_runs(self.removed)
        found = self.patches.at(depth)
        for patch in found:
            if patch.hidden_size != hidden_size:
                raise LayerMapError(
                    f"{patch.where} of {shown_path(self.model)} is {patch.hidden_size} wide, but the model "
                    f"{hidden_size}: its patches belong to another model"
                )
        return found

    def num_patch_parameters(self, depth: int) -> int:
        """Of the patches that rows of `depth` get."""
        return 0 if self.patches is None else self.patches.num_parameters(self._depth(depth))

    @property
    def calibration_losses(self) -> TextLosses:
        """The calibration text with `losses`."""
        return TextLosses(self.calibration or CalibrationRecord(), self.losses or ())

    def token_loss(self, depth: int) -> float | None:
        """Mean cross-entropy in nats a token at `depth` on the calibration text; None where that is not known."""
        return self.calibration_losses.token_loss(self._depth(depth))

    def perplexity(self, depth: int) -> float | None:
        """Perplexity of the calibration text at `depth`, which flatters; None where that is not known."""
        return self.calibration_losses.perplexity(self._depth(depth))

    def recommend(self, depth: int) -> LayerMap:
        """The same order with another recommended depth."""
        return replace(self, depth=self._depth(depth))

    def digest(self, depth: int) -> str:
        """SHA-256 (hex) over the model's shape, the *set* of sublayers removed at `depth`, and the patches there."""
        gone = sorted(each for unit in self.removed[: self._depth(depth)] for each in unit.sublayers)
        what: list[object] = [self.fingerprint, self.num_blocks, gone]
        if self.patches is not None and depth:
            what += [self.patches.sha256, depth]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @classmethod
    def dense(cls, model: str, num_blocks: int, fingerprint: str | None = None) -> LayerMap:
        """The map that removes nothing."""
        return cls(model=model, fingerprint=fingerprint, num_blocks=num_blocks)

    def check_model(
        self,
        *,
        num_blocks: int,
        fingerprint: str | None = None,
        model: str = "the model",
        parallel: bool = False,
    ) -> None:
        """LayerMapError if the map was found on a model of another shape; an unknown fingerprint fits any.

        parallel: attention and MLP of the model's blocks read the same residual: none can go without the other.
        """
        found, model = shown_path(self.model), shown_path(model)
        remedy = f"use a map found on {model}, or make one with `sleb prune`"
        if num_blocks != self.num_blocks:
            raise LayerMapError(
                f"the layer map is for {found} with {self.num_blocks} blocks, "
                f"but {model} has {num_blocks}; {remedy}"
            )
        if fingerprint is not None and self.fingerprint is not None and fingerprint != self.fingerprint:
            raise LayerMapError(
                f"the layer map is for {found} (fingerprint {shown_path(self.fingerprint)}), "
                f"but {model} has another shape (fingerprint {fingerprint}); {remedy}"
            )
        if parallel and (half := next((unit for unit in self.removed if unit.part != "block"), None)):
            raise LayerMapError(
                f"the layer map removes {half}, but attention and MLP of a block of {model} read the same residual and "
                "only go together; use a map of whole blocks (`sleb prune --units blocks`)"
            )

    def to_json(self, stem: str = "map") -> str:
        """Schema 1, keys sorted, units in the order of the blocks, strict (no NaN), ends with a newline.

        stem: of the map's file, after which that of its patches is named.
        """
        return dump_document({each.name: getattr(self, each.name) for each in fields(self)}, stem)

    @classmethod
    def from_json(cls, text: str) -> LayerMap:
        """Read and validate the JSON form; LayerMapError says what is wrong with it."""
        return cls._read(parse_json(text, "layer map", LayerMapError), None)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerMap:
        """Read a map file; every LayerMapError names the file."""
        try:
            return cls._read(read_json(Path(path), LayerMapError), Path(path).parent)
        except FileNotFoundError:
            remedy = "make one with `sleb prune`, or name one that exists"
            raise LayerMapError(f"layer map {shown_path(path)} does not exist; {remedy}") from None

    @classmethod
    def find(cls, name: str | os.PathLike[str]) -> LayerMap:
        """The map in a file of that name, else the shipped one of that name. LayerMapError lists those."""
        shipped = shipped_maps()
        if os.path.exists(name):
            return cls.load(name)
        if str(name) not in shipped:
            raise LayerMapError(
                f"layer map {shown_path(name)} does not exist, neither a file nor shipped; `sleb prune` makes one; "
                f"shipped are: {', '.join(shipped)}"
            )
        return cls.load(shipped[str(name)])

    @classmethod
    def _read(cls, document: Fields, folder: Path | None) -> LayerMap:
        values = read_document(document, folder)
        try:
            return cls(**values)
        except LayerMapError as error:
            raise LayerMapError(f"{shown_path(document.source)}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON form, and the patches beside it, each atomically: a reader, or a crash, sees the old map with
        the old patches or the new one with the new ones."""
        target, earlier = Path(path), None
        with suppress(LayerMapError):  # what is replaced may be anything
            earlier = LayerMap.load(target).patches
        try:
            if self.patches is not None:
                self.patches.save(target.with_name(self.patches.file_name(target.stem)))
            with replacement(target) as temporary:
                temporary.write_text(self.to_json(target.stem), encoding="utf-8")
            if earlier is not None and earlier != self.patches:
                earlier.remove(target.stem)
        except OSError as error:
            raise LayerMapError(f"layer map {path} cannot be written: {error.strerror}") from None


def shipped_maps() -> dict[str, Path]:
    """The maps that come with the package, by name, in alphabetical order."""
    return {path.stem: path for path in sorted((Path(__file__).parents[1] / "maps").glob("*.json"))}

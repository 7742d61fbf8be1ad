"""What stands where units were removed: small maps of the residual stream, fitted and never trained.

A patch takes the place of a run of removed sublayers, for the rows of some depths:

    h ← h + W φ(h) + b      φ(h) = h / rms(h) where it is normed, else h
    h ← s · h + b           the form "scale"

The norm is the model's own kind (mean removed as well where that is LayerNorm) without a weight. A map's patches are
one safetensors file beside it: tensors "<i>.<name>" in float16 or float32, and in its metadata under "patches" a JSON
list with an object a patch: first, last ("7.attention" …), first_depth, last_depth (null: all deeper ones), form and
normed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from sleb.errors import LayerMapError
from sleb.fields import Fields, parse_json, read_bytes, shown_path
from sleb.files import replacement
from sleb.layer_map.units import MAX_BLOCKS, CalibrationRecord, Sublayer, Unit

Form = Literal["full", "low-rank", "scale"]
FORMS: tuple[str, ...] = get_args(Form)
Array = np.ndarray[Any, np.dtype[Any]]

_NAMES: dict[str, tuple[str, ...]] = {
    "full": ("weight", "bias"),
    "low-rank": ("down", "up", "bias"),
    "scale": ("scale", "bias"),
}
_MAX_BYTES = 1 << 34  # of a file: a full patch of width 16,384 is half a gigabyte
_MAX_PATCHES = 1 << 14
_HALF_MAX = 65504.0  # the largest float16


@dataclass(frozen=True, eq=False)
class Patch:
    """One patch. E: the hidden size.

    Attributes:
        first, last: the run of removed sublayers in whose place it stands, both included.
        first_depth, last_depth: the depths whose rows get it, both included; None: all from first_depth on.
        normed: whether it reads h / rms(h) instead of h; false for a scale.
        tensors: full: weight [E, E] (outputs, inputs); low-rank: down [r, E] and up [E, r], W = up · down; scale: scale
            [E]; and bias [E].
    """

    first: Sublayer
    last: Sublayer
    first_depth: int
    last_depth: int | None
    form: Form
    normed: bool
    tensors: Mapping[str, Array]

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise LayerMapError(f"patch form {self.form!r} does not exist: choose {', '.join(FORMS)}")
        if self.last < self.first:
            raise LayerMapError(f"a patch's run ends before it begins: {self.where}")
        if self.first_depth < 1 or (self.last_depth is not None and self.last_depth < self.first_depth):
            raise LayerMapError(f"{self.where}: depths {self.depths} are none: they begin at 1")
        width, names = self.hidden_size, _NAMES[self.form]
        shapes = {"bias": (width,), "scale": (width,), "weight": (width, width)}
        if self.form == "low-rank":
            rank = self.tensors["down"].shape[0] if "down" in self.tensors else 0
            shapes |= {"down": (rank, width), "up": (width, rank)}
        found = {name: tensor.shape for name, tensor in self.tensors.items()}
        if found != {name: shapes[name] for name in names} or 0 in sum(found.values(), ()):
            raise LayerMapError(
                f"{self.where}: its tensors are {found}; form {self.form} has {', '.join(names)}"
            )

    @property
    def hidden_size(self) -> int:
        """E; 0 for a patch without a bias, which is none."""
        return (
            int(self.tensors["bias"].shape[0]) if "bias" in self.tensors and self.tensors["bias"].ndim else 0
        )

    @property
    def depths(self) -> str:
        """For messages: "3", "3 to 5" or "3 and deeper"."""
        if self.last_depth is None:
            return f"{self.first_depth} and deeper"
        return (
            str(self.first_depth)
            if self.last_depth == self.first_depth
            else f"{self.first_depth} to {self.last_depth}"
        )

    @property
    def where(self) -> str:
        """For messages: the run that it stands for."""
        return f"patch {_name(self.first)} to {_name(self.last)}"

    @property
    def num_parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())

    def serves(self, depth: int) -> bool:
        """Whether rows of `depth` get it."""
        return self.first_depth <= depth and (self.last_depth is None or depth <= self.last_depth)


@dataclass(frozen=True)
class PatchRecord:
    """How patches were fitted. Every field may be unknown (None).

    `form` is that of all patches, `rank` of low-rank ones, `ridge` a share of each feature's variance, `calibration`
    the tokens.
    """

    form: str | None = None
    rank: int | None = None
    ridge: float | None = None
    calibration: CalibrationRecord | None = None


class Patches:
    """The patches of a layer map; those in a file are read when they are asked for.

    Equal if the contents are. Attributes: sha256: of the file, in hexadecimal digits. record: how they were fitted.
    """

    def __init__(self, sha256: str, record: PatchRecord, path: Path | None, content: bytes | None) -> None:
        self.sha256 = sha256
        self.record = record
        self._path, self._content = path, content

    @classmethod
    def of(cls, patches: Iterable[Patch], record: PatchRecord = PatchRecord()) -> Patches:
        """Those that were just fitted. Stored as float16 where that holds them, else float32."""
        listed, tensors = [], {}
        for index, patch in enumerate(patches):
            entry = {"first": _name(patch.first), "last": _name(patch.last), "form": patch.form}
            listed.append(
                entry
                | {"first_depth": patch.first_depth, "last_depth": patch.last_depth, "normed": patch.normed}
            )
            for name, tensor in patch.tensors.items():
                if not np.isfinite(tensor).all():
                    raise LayerMapError(f"{patch.where}: {name} holds values that are not finite numbers")
                small = np.abs(tensor).max() < _HALF_MAX
                stored = np.ascontiguousarray(tensor, np.float16 if small else np.float32)
                tensors[f"{index}.{name}"] = stored
        # One entry: safetensors writes several in any order, and the file's name is of its hash.
        content = to_bytes(tensors, {"patches": json.dumps(listed)})
        return cls(hashlib.sha256(content).hexdigest(), record, None, content)

    @classmethod
    def in_file(cls, path: Path, sha256: str, record: PatchRecord) -> Patches:
        """Those of a file that is read, and must then have that hash, when its patches are asked for."""
        return cls(sha256, record, path, None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patches) and (self.sha256, self.record) == (other.sha256, other.record)

    def __hash__(self) -> int:
        return hash(self.sha256)

    def load(self) -> tuple[Patch, ...]:
        """All of them, by the place of their runs. Raises LayerMapError for a file that is not what the map names."""
        return self._loaded

    def at(self, depth: int) -> tuple[Patch, ...]:
        """Those that rows of `depth` get, from the bottom up; none at depth 0, which reads no file."""
        return tuple(patch for patch in self._loaded if patch.serves(depth)) if depth else ()

    def num_parameters(self, depth: int) -> int:
        """Of the patches of `depth`."""
        return sum(patch.num_parameters for patch in self.at(depth))

    def num_bytes(self, depth: int) -> int:
        """Of the patches of `depth`, in the file."""
        return sum(tensor.nbytes for patch in self.at(depth) for tensor in patch.tensors.values())

    def check_runs(self, removed: Sequence[Unit]) -> None:
        """LayerMapError unless every patch stands for a run that the order `removed` takes out at its depths, and no
        two for one sublayer at a depth."""
        place = {each: at for at, unit in enumerate(removed, 1) for each in unit.sublayers}
        taken: dict[Sublayer, list[Patch]] = {}
        for patch in self._loaded:
            for sublayer in _between(patch.first, patch.last):
                if place.get(sublayer, math.inf) > patch.first_depth:
                    raise LayerMapError(
                        f"{self._source}: {patch.where} stands for {_name(sublayer)}, which runs at depth "
                        f"{patch.first_depth}: the file belongs to another map; fit patches with `sleb patch`"
                    )
                for other in taken.setdefault(sublayer, []):
                    if other.serves(patch.first_depth) or patch.serves(other.first_depth):
                        raise LayerMapError(
                            f"{self._source}: two patches stand for {_name(sublayer)} at one depth; "
                            "fit patches with `sleb patch`"
                        )
                taken[sublayer].append(patch)

    def up_to(self, depth: int) -> Patches | None:
        """Those of the depths up to `depth`; None where there are none."""
        if depth == 0:
            return None
        kept = [patch for patch in self._loaded if patch.first_depth <= depth]
        if len(kept) == len(self._loaded):
            return self
        return Patches.of(kept, self.record) if kept else None

    def file_name(self, stem: str) -> str:
        """Of the file beside the map "stem.json". New patches have another name: a map never names half-new ones."""
        return f"{stem}.{self.sha256[:8]}.safetensors"

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises OSError, or LayerMapError if they cannot be read."""
        if self._path is None or not path.exists() or not path.samefile(self._path):
            content = self._bytes()
            with replacement(path) as temporary:
                temporary.write_bytes(content)

    def remove(self, stem: str) -> None:
        """Deletes their file, the map "stem.json" having others now, unless a copy of it in the folder names it too.

        Raises OSError.
        """
        if self._path is None or self._path.name != self.file_name(stem):
            return
        if not any(_names(other, self._path.name) for other in self._path.parent.glob("*.json")):
            self._path.unlink(missing_ok=True)

    @property
    def _source(self) -> str:
        return "the patches" if self._path is None else shown_path(self._path)

    def _bytes(self) -> bytes:
        if self._content is not None:
            return self._content
        assert self._path is not None
        remedy = "copy a map and its patches together, or fit patches with `sleb patch`"
        try:
            content = read_bytes(self._path, LayerMapError, _MAX_BYTES)
        except FileNotFoundError:
            raise LayerMapError(
                f"{self._source} is missing: the layer map beside it names it; {remedy}"
            ) from None
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise LayerMapError(
                f"{self._source} has the SHA-256 {found}, but the layer map names {self.sha256}: it is of another map, "
                f"or was changed; {remedy}"
            )
        return content

    @cached_property
    def _loaded(self) -> tuple[Patch, ...]:
        content = self._bytes()
        try:
            tensors = from_bytes(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise LayerMapError(f"{self._source} is no safetensors file of patches: {error}") from None
        metadata = header.get("__metadata__", {})
        document = parse_json(
            f'{{"patches": {metadata.get("patches", "null")}}}', self._source, LayerMapError
        )
        entries = document.items("patches", _MAX_PATCHES)
        found = []
        for index, entry in enumerate(entries):
            fields = document.beside({f"patches[{index}]": entry}).object(f"patches[{index}]")
            own = {name: tensors.pop(f"{index}.{name}") for name in ("weight", "down", "up", "scale", "bias")
                   if f"{index}.{name}" in tensors}  # fmt: skip
            found.append(self._patch(fields, own))
        if tensors:
            raise LayerMapError(f"{self._source} holds {min(tensors)}, which belongs to no patch")
        return tuple(sorted(found, key=lambda patch: (patch.first, patch.first_depth)))

    def _patch(self, fields: Fields, tensors: Mapping[str, Array]) -> Patch:
        first_depth = fields.integer("first_depth", 1, 2 * MAX_BLOCKS)
        for name, tensor in tensors.items():
            if tensor.dtype not in (np.float16, np.float32) or not np.isfinite(tensor).all():
                raise LayerMapError(f"{self._source}: {name} must be finite numbers of 16 or 32 bits")
        try:
            return Patch(
                _sublayer(fields, "first"),
                _sublayer(fields, "last"),
                first_depth,
                fields.integer("last_depth", first_depth, 2 * MAX_BLOCKS, None),
                cast(Form, fields.string("form", FORMS)),
                fields.boolean("normed"),
                tensors,
            )
        except LayerMapError as error:
            if str(error).startswith(self._source):
                raise
            raise LayerMapError(f"{self._source}: {error}") from None


def _names(file: Path, name: str) -> bool:
    """Whether a JSON file has `name` in it."""
    try:
        return name.encode() in read_bytes(file, LayerMapError)
    except (LayerMapError, OSError):
        return False


def _name(sublayer: Sublayer) -> str:
    return f"{sublayer[0]}.{sublayer[1]}"


def _sublayer(fields: Fields, name: str) -> Sublayer:
    wanted = 'a part of a block like "7.attention" or "7.mlp"'
    try:
        unit = Unit.parse(fields.string(name))
    except LayerMapError:
        raise fields.wrong(name, wanted) from None
    if unit.part == "block":
        raise fields.wrong(name, wanted)
    return unit.sublayers[0]


def _between(first: Sublayer, last: Sublayer) -> Iterable[Sublayer]:
    """The sublayers from `first` to `last`, as they run."""
    for block in range(first[0], last[0] + 1):
        for sublayer in Unit(block).sublayers:
            if first <= sublayer <= last:
                yield sublayer

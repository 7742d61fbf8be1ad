"""The JSON form of a layer map, schema 1: types and wording of errors; the meaning is checked by LayerMap."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from sleb.errors import LayerMapError
from sleb.fields import Fields, as_integer, as_number
from sleb.layer_map.patches import Patches, PatchRecord
from sleb.layer_map.units import MAX_BLOCKS, CalibrationRecord, SearchRecord, TextLosses, Unit

SCHEMA_VERSION = 1
# That maps without them need not name.
_LATER_FIELDS = ("search", "held_out", "held_out_losses", "further_held_out", "patches", "unpatched")
_MAX_UNITS = 2 * MAX_BLOCKS  # in an order: the attention and the MLP of every block
_MAX_HELD_OUT = 1 << 6  # texts
_MAX_TEXT = 1 << 12  # characters of a name or a citation
_MOST = 1 << 64  # of a seed

Record = TypeVar("Record", CalibrationRecord, SearchRecord)
Convert = Callable[[Fields, str], Any]


def dump_document(values: Mapping[str, Any], stem: str) -> str:
    """The fields of a LayerMap as strict JSON (no NaN), keys sorted, units in the order of the blocks.

    stem: of the map's file, after which that of its patches is named.
    """
    document = dict(values, schema_version=SCHEMA_VERSION)
    document["removed"] = [unit.block if unit.part == "block" else str(unit) for unit in values["removed"]]
    if values["candidate_losses"] is not None:
        document["candidate_losses"] = [
            {str(unit): loss if math.isfinite(loss) else None for unit, loss in sorted(candidates.items())}
            for candidates in values["candidate_losses"]
        ]
    texts = [_dump_text(each) for each in values["held_out"]]
    first = texts[0] if texts else {"record": None, "losses": None}
    document |= {name: _dump_record(values[name]) for name in ("calibration", "search")}
    document |= {
        "held_out": first["record"],
        "held_out_losses": first["losses"],
        "further_held_out": texts[1:],
    }
    if values["unpatched"] is not None:
        document["unpatched"] = _dump_text(values["unpatched"])
    patches: Patches | None = values["patches"]
    if patches is not None:
        file = {"file": patches.file_name(stem), "sha256": patches.sha256}
        document["patches"] = file | {"record": asdict(patches.record)}
    for name in _LATER_FIELDS:
        if not document[name]:
            del document[name]
    return json.dumps(dict(sorted(document.items())), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _dump_record(record: CalibrationRecord | SearchRecord | None) -> dict[str, Any] | None:
    return None if record is None else dict(sorted(asdict(record).items()))


def _dump_text(text: TextLosses) -> dict[str, Any]:
    return {"record": _dump_record(text.record), "losses": text.losses}


def read_document(document: Fields, folder: Path | None) -> dict[str, Any]:
    """The fields of a LayerMap from those of its JSON; LayerMapError for what is not one of schema 1.

    folder: where the file of its patches lies; None where the text is no file's.
    """
    version = document.integer("schema_version", -_MOST, _MOST)
    if version > SCHEMA_VERSION:
        raise document.wrong(
            "schema_version", f"{SCHEMA_VERSION}: install a newer sleb, which reads later ones"
        )
    if version < 1:
        raise document.wrong("schema_version", f"an integer from 1 to {SCHEMA_VERSION}")
    removed = _each(document, "removed", _unit)
    return {
        "model": _text(document, "model"),
        "fingerprint": _text(document, "fingerprint", None),
        "num_blocks": document.integer("num_blocks", 1, MAX_BLOCKS),
        "removed": removed,
        "losses": _each(document, "losses", _loss, None),
        "candidate_losses": _each(document, "candidate_losses", _candidates, None),
        "calibration": _record(document, "calibration", CalibrationRecord),
        # -1 stands for "the whole order" in memory only.
        "depth": document.integer("depth", 0, len(removed), len(removed)),
        "source": _text(document, "source", None),
        "search": _record(document, "search", SearchRecord),
        "held_out": _held_out(document),
        "patches": _patches(document, folder),
        "unpatched": _text_losses(document, "unpatched") if "unpatched" in document else None,
    }


def _patches(document: Fields, folder: Path | None) -> Patches | None:
    found = document.object("patches", None)
    if found is None:
        return None
    name, digest, record = _text(found, "file"), found.string("sha256"), found.object("record", None)
    if folder is None or Path(name).name != name or not name.endswith(".safetensors"):
        raise found.wrong(
            "file", "the name of a .safetensors file beside the layer map, read from its own file"
        )
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise found.wrong("sha256", "64 hexadecimal digits")
    if record is None:
        return Patches.in_file(folder / name, digest, PatchRecord())
    rank, ridge = record.integer("rank", 1, _MOST, None), record.number("ridge", 0, _MOST, None)
    fitted = PatchRecord(
        _text(record, "form", None), rank, ridge, _record(record, "calibration", CalibrationRecord)
    )
    return Patches.in_file(folder / name, digest, fitted)


def _held_out(document: Fields) -> tuple[TextLosses, ...]:
    record = _record(document, "held_out", CalibrationRecord)
    losses = _each(document, "held_out_losses", _loss, None)
    first = (
        ()
        if record is None and losses is None
        else (TextLosses(record or CalibrationRecord(), losses or ()),)
    )
    further = _each(document, "further_held_out", _text_losses, None, most=_MAX_HELD_OUT)
    return (*first, *(further or ()))


def _text_losses(items: Fields, where: str) -> TextLosses:
    found = items.object(where)
    record = _record(found, "record", CalibrationRecord) or CalibrationRecord()
    return TextLosses(record, _each(found, "losses", _loss, None) or ())


def _text(document: Fields, name: str, *default: None) -> Any:
    text = document.string(name, None, *default)
    if text is not None and len(text) > _MAX_TEXT:
        raise document.wrong(name, f"a string of at most {_MAX_TEXT} characters")
    return text


def _each(document: Fields, name: str, convert: Convert, *default: None, most: int = _MAX_UNITS + 1) -> Any:
    values = document.items(name, most, *default)
    if values is None:
        return None
    items = document.beside({f"{name}[{index}]": value for index, value in enumerate(values)})
    return tuple(convert(items, where) for where in items.values)


def _unit(items: Fields, where: str) -> Unit:
    value = items.values[where]
    number = as_integer(value)
    try:
        return Unit.parse(value if isinstance(value, str) else str(number))
    except LayerMapError:
        wanted = 'a block\'s number, or a part of one like "7.attention" or "7.mlp"'
        raise items.wrong(where, wanted) from None


def _loss(items: Fields, where: str) -> float:
    loss = as_number(items.values[where])
    if loss is None:
        raise items.wrong(where, "a number, and a finite number")
    return loss


def _candidates(items: Fields, where: str) -> dict[Unit, float]:
    """A disqualified unit's loss is null."""
    candidates = items.object(where).values
    if len(candidates) > 2 * _MAX_UNITS:
        raise items.wrong(where, "an object with a loss for a unit")
    units = [_unit(items.beside({(key := f"a unit of {where}"): name}), key) for name in candidates]
    losses = items.beside({f"{where} of unit {name}": loss for name, loss in candidates.items()})
    found = [math.inf if losses.values[each] is None else _loss(losses, each) for each in losses.values]
    return dict(zip(units, found, strict=True))


def _record(document: Fields, name: str, kind: type[Record]) -> Record | None:
    record = document.object(name, None)
    if record is None:
        return None
    readers: dict[str, Convert] = {"special_tokens": lambda each, key: each.boolean(key, None)}
    for key in ("seed", "seqlen", "windows"):
        readers[key] = lambda each, key: each.integer(key, -_MOST, _MOST, None)
    found = {each.name: readers.get(each.name, _optional_text)(record, each.name) for each in fields(kind)}
    return kind(**found)


def _optional_text(document: Fields, name: str) -> Any:
    return _text(document, name, None)

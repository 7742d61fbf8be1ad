"""The JSON form of a layer map, schema 1: types and wording of errors; the meaning is checked by LayerMap."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, NoReturn, TypeVar

from sleb.errors import LayerMapError
from sleb.layer_map.units import CalibrationRecord, SearchRecord, Unit, is_int

SCHEMA_VERSION = 1
_LATER_FIELDS = ("search", "held_out", "held_out_losses")  # that maps without them need not name

Record = TypeVar("Record", CalibrationRecord, SearchRecord)
_TYPE_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


def dump_document(values: Mapping[str, Any]) -> str:
    """The fields of a LayerMap as strict JSON (no NaN), keys sorted, units in the order of the blocks."""
    document = dict(values, schema_version=SCHEMA_VERSION)
    document["removed"] = [unit.block if unit.part == "block" else str(unit) for unit in values["removed"]]
    if values["candidate_losses"] is not None:
        document["candidate_losses"] = [
            {str(unit): loss if math.isfinite(loss) else None for unit, loss in sorted(candidates.items())}
            for candidates in values["candidate_losses"]
        ]
    for name in ("calibration", "search", "held_out"):
        if values[name] is not None:
            document[name] = dict(sorted(asdict(values[name]).items()))
    for name in _LATER_FIELDS:
        if document[name] is None:
            del document[name]
    return json.dumps(dict(sorted(document.items())), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def parse_document(text: str) -> dict[str, Any]:
    """The fields of a LayerMap from its JSON; LayerMapError for text that is not one of schema 1."""
    try:
        document = json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise LayerMapError(f"it is not JSON, or is cut short: {error}") from None
    if not isinstance(document, dict):
        found = _TYPE_NAMES[type(document)]
        raise LayerMapError(
            f"its top level is {found}; a layer map is an object with model, num_blocks, removed"
        )
    _check_schema(document)
    calibration, held_out, search = (
        _get(document, name, dict, optional=True) for name in ("calibration", "held_out", "search")
    )
    removed = _get(document, "removed", list)
    return {
        "model": _get(document, "model", str),
        "fingerprint": _get(document, "fingerprint", str, optional=True),
        "num_blocks": _get(document, "num_blocks", int),
        "removed": tuple(_unit(value, f"removed[{index}]") for index, value in enumerate(removed)),
        "losses": _each(_get(document, "losses", list, optional=True), _loss, "losses"),
        "candidate_losses": _each(
            _get(document, "candidate_losses", list, optional=True), _candidates, "candidate_losses"
        ),
        "calibration": None
        if calibration is None
        else _record(calibration, CalibrationRecord, "calibration"),
        "depth": len(removed) if document.get("depth") is None else _depth(document["depth"]),
        "source": _get(document, "source", str, optional=True),
        "search": None if search is None else _record(search, SearchRecord, "search"),
        "held_out": None if held_out is None else _record(held_out, CalibrationRecord, "held_out"),
        "held_out_losses": _each(
            _get(document, "held_out_losses", list, optional=True), _loss, "held_out_losses"
        ),
    }


def _reject_constant(name: str) -> NoReturn:
    raise LayerMapError(
        f"it holds {name}: every loss must be a finite number (null for a disqualified candidate)"
    )


def _check_schema(document: dict[str, Any]) -> None:
    version = _get(document, "schema_version", int)
    if version > SCHEMA_VERSION:
        raise LayerMapError(
            f"it has schema version {version}; this sleb reads up to {SCHEMA_VERSION}: install a newer sleb"
        )
    if version < 1:
        raise LayerMapError(
            f"its schema version {version} does not exist; this sleb reads 1 to {SCHEMA_VERSION}"
        )


def _wrong(where: str, value: object, wanted: str) -> LayerMapError:
    return LayerMapError(f"{where} is {json.dumps(value)[:60]}; it must be {wanted}")


def _get(document: Mapping[str, Any], key: str, kind: type, *, optional: bool = False) -> Any:
    value = document.get(key)
    if value is None and optional:
        return None
    if key not in document:
        raise LayerMapError(f"it has no {key}, which must be {_TYPE_NAMES[kind]}")
    if not (is_int(value) if kind is int else isinstance(value, kind)):
        raise _wrong(key, value, _TYPE_NAMES[kind] + (" or null" if optional else ""))
    return value


def _each(values: list[Any] | None, convert: Callable[[Any, str], Any], name: str) -> tuple[Any, ...] | None:
    if values is None:
        return None
    return tuple(convert(value, f"{name}[{index}]") for index, value in enumerate(values))


def _unit(value: Any, where: str) -> Unit:
    wanted = 'a block\'s number, or a part of one like "7.attention" or "7.mlp"'
    if is_int(value) and value >= 0:
        return Unit(value)
    if isinstance(value, str):
        try:
            return Unit.parse(value)
        except LayerMapError:
            pass
    raise _wrong(where, value, wanted)


def _loss(value: Any, where: str) -> float:
    if not is_int(value) and not isinstance(value, float):
        raise _wrong(where, value, "a number")
    try:
        loss = float(value)
    except OverflowError:
        loss = math.inf
    if not math.isfinite(loss):
        raise LayerMapError(f"{where} is {loss}: every loss must be a finite number")
    return loss


def _candidates(value: Any, where: str) -> dict[Unit, float]:
    if not isinstance(value, dict):
        raise _wrong(where, value, 'an object of losses like {"14": 2.5}')
    return {
        _unit(key, f"a unit of {where}"): math.inf if loss is None else _loss(loss, f"{where} of unit {key}")
        for key, loss in value.items()
    }


def _record(value: dict[str, Any], kind: type[Record], where: str) -> Record:
    kinds: dict[str, type] = {"seed": int, "seqlen": int, "windows": int, "special_tokens": bool}
    known = {each.name: kinds.get(each.name, str) for each in fields(kind)}
    try:
        return kind(**{name: _get(value, name, found, optional=True) for name, found in known.items()})
    except LayerMapError as error:
        raise LayerMapError(f"in {where}: {error}") from None


def _depth(value: Any) -> int:
    # -1 stands for "the whole order" in memory only.
    if not is_int(value) or value < 0:
        raise _wrong("depth", value, "an integer of 0 or more, or null")
    return value

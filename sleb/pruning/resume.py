"""The file that a search writes: whether it may be written, and whether the map in it can be continued."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleb.errors import ConfigError, LayerMapError
from sleb.files import check_writable
from sleb.layer_map.layer_map import LayerMap, SearchRecord
from sleb.layer_map.patches import PatchRecord


def check_output(path: Path, *, resume: bool, force: bool) -> LayerMap | None:
    """The map to continue, if any; an error, before any work, when the map could not be saved at the end."""
    check_writable(path)
    if not path.exists():
        return None
    if resume:
        return LayerMap.load(path)
    if not force:
        raise ConfigError(
            f"output {path} exists: continue it with --resume, replace it with --force, or name another"
        )
    return None


def _hashes(layer_map: LayerMap) -> str | None:
    return ", ".join(str(text.record.token_hash) for text in layer_map.held_out) or None


def _fitted(record: PatchRecord | None) -> str:
    if record is None:
        return "none"
    rank = "" if record.rank is None else f"={record.rank}"
    tokens = None if record.calibration is None else record.calibration.token_hash
    return f"{record.form}{rank}, fitted to the tokens {tokens}"


def check_resume(earlier: LayerMap, wanted: LayerMap, patches: PatchRecord | None) -> None:
    """LayerMapError unless `earlier` was found on the model, tokens and precision of `wanted`, with such patches."""
    remedy = "repeat the options of the first run, or start again without --resume and with --force"
    found, asked = earlier.calibration, wanted.calibration
    if found is None or asked is None or earlier.losses is None or earlier.candidate_losses is None:
        raise LayerMapError(f"cannot resume: the map has no calibration record or no losses; {remedy}")
    # A map of an earlier version says nothing of its search: it was over whole blocks.
    searched, asking = (each.search or SearchRecord(units="blocks") for each in (earlier, wanted))
    pairs: Sequence[tuple[str, object, object]] = (
        ("model", earlier.model, wanted.model),
        ("number of blocks", earlier.num_blocks, wanted.num_blocks),
        ("fingerprint", earlier.fingerprint, wanted.fingerprint),
        ("units", searched.units, asking.units),
        ("cost", searched.cost, asking.cost),
        ("objective", searched.objective or "loss", asking.objective or "loss"),
        ("patch", searched.patch or "none", asking.patch or "none"),
        ("held-out text", _hashes(earlier), _hashes(wanted)),
        ("dtype", found.dtype, asked.dtype),
        ("seqlen", found.seqlen, asked.seqlen),
        ("number of windows", found.windows, asked.windows),
        ("hash of the calibration tokens", found.token_hash, asked.token_hash),
        # Those that `sleb patch` fitted are others than the search judged by.
        ("patches", _fitted(None if earlier.patches is None else earlier.patches.record), _fitted(patches)),
    )
    for name, before, now in pairs:
        if before != now:
            raise LayerMapError(f"cannot resume: the map's {name} is {before}, this run's is {now}; {remedy}")

"""From what was asked for to windows of tokens and the record of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from sleb.errors import ConfigError
from sleb.layer_map.units import CalibrationRecord
from sleb.pruning.calibration.generated import Generate, generated_tokens
from sleb.pruning.calibration.samplers import (
    DEFAULT_WINDOWS,
    POOL_TOKENS,
    Sampler,
    adds_special_tokens,
    cut_windows,
    permutation,
)
from sleb.pruning.calibration.sources import Encode, Render, open_source
from sleb.pruning.calibration.spec import GENERATED, SourceSpec, label, parse_source, shares
from sleb.pruning.calibration.tables import check_table, read_text

_GENERATED_SAMPLER = "generated"


_CHECKED = 1 << 16  # characters of a text that are looked at before a model is loaded


@dataclass(frozen=True)
class Calibration:
    """Windows [W, L] int64, what they are, and a note for people where a default was cut short."""

    windows: Tensor
    record: CalibrationRecord
    note: str | None = None


@dataclass(frozen=True)
class _Model:
    """What is needed of the model; see `calibration_windows`."""

    encode: Encode
    render: Render | None
    generate: Generate | None
    on_generate: Callable[[float], None]
    start: int | None


def calibration_windows(
    source: str | Path,
    encode: Encode,
    *,
    sampler: str = "packed",
    seqlen: int = 2048,
    windows: int | None = None,
    seed: int | None = None,
    most: int = DEFAULT_WINDOWS,
    render: Render | None = None,
    generate: Generate | None = None,
    on_generate: Callable[[float], None] = lambda share: None,
    start: int | None = None,
) -> Calibration:
    """Tokens of `source` as windows of `seqlen`, those of a mix one source after the other (`calibration.spec`).

    `encode` turns text into token ids; `adds_special_tokens` says whether with the special ones. `render` turns
    messages into token ids, `generate` samples documents (`calibration.generated`); without them such sources
    are errors. `windows` None: as many as there are, up to `most`; of a mix, `most`. `seed` None is 0 for rows and
    for whatever holds text of the model. on_generate gets the share of that text that is written. `start`: a token that
    each window begins with. Raises ConfigError
    for options out of range and for a text that is too short for them, SlebError for one that cannot be read or
    downloaded.
    """
    check_options(source, sampler, seqlen, windows, seed)
    specs = parse_source(source)
    names = [_GENERATED_SAMPLER if spec.name == GENERATED else sampler for spec in specs]
    if seed is None and (sampler == "rows" or _GENERATED_SAMPLER in names):
        seed = 0
    model = _Model(encode, render, generate, on_generate, start)
    chosen = _gather(specs, model, sampler, seqlen, windows or most, seed)
    record = CalibrationRecord(
        source=label(specs),
        sampler="+".join(dict.fromkeys(names)),
        seed=seed,
        seqlen=seqlen,
        windows=len(chosen),
        token_hash=token_hash(chosen),
        special_tokens=adds_special_tokens(sampler) or start is not None,
    )
    return Calibration(chosen, record, _shortage(record, windows, most))


def _shortage(record: CalibrationRecord, asked: int | None, most: int) -> str | None:
    """What to say where there are fewer windows than by default; ConfigError where there are fewer than asked for."""
    assert record.windows is not None
    if record.windows >= (asked or most):
        return None
    found = f"calibration {record.source} gives {record.windows} windows of {record.seqlen} tokens"
    if asked is not None:
        raise ConfigError(
            f"{found}, not {asked}: ask for --windows {record.windows} or fewer, for a shorter --seqlen, "
            "or give a longer text"
        )
    return f"{found}; all of them are used"


def token_hash(windows: Tensor) -> str:
    """ "sha256:" and the digest of the token ids in order, as little-endian int64."""
    return "sha256:" + hashlib.sha256(windows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def check_options(
    source: str | Path, sampler: str, seqlen: int | None, windows: int | None, seed: int | None
) -> None:
    """ConfigError for what can be seen to be wrong before a model is loaded or a text is read."""
    if sampler not in get_args(Sampler):
        raise ConfigError(f"sampler {sampler!r} does not exist: choose {' or '.join(get_args(Sampler))}")
    if seqlen is not None and seqlen < 2:
        raise ConfigError(f"seqlen {seqlen} is too short: a window needs 2 tokens or more to predict one")
    if windows is not None and windows < 1:
        raise ConfigError(f"windows {windows} must be 1 or more")
    if seed is not None and seed < 0:
        raise ConfigError(f"seed {seed} must be 0 or more")
    specs = parse_source(source)
    for spec in specs:
        if spec.name == GENERATED and sampler == "rows":
            raise ConfigError(f"calibration {GENERATED} has no rows to draw: leave --sampler rows out")
        if spec.column is not None:
            check_table(Path(spec.name), spec.column)
        elif spec.is_file:
            read_text(Path(spec.name), _CHECKED)
    if windows is not None:
        _check_shares(specs, windows)


def _check_shares(specs: Sequence[SourceSpec], windows: int) -> None:
    for spec, share in zip(specs, shares(specs, windows), strict=True):
        if not share:
            raise ConfigError(
                f"windows {windows} are too few for the mix {label(specs)}: none is left for {spec.label}; "
                "ask for more --windows, or give it a larger weight"
            )


def _source_windows(
    spec: SourceSpec, model: _Model, sampler: str, seqlen: int, wanted: int, seed: int | None
) -> Tensor:
    """`wanted` windows of one source, or all that it has."""
    num_tokens = wanted * seqlen
    if spec.name == GENERATED:
        if model.generate is None:
            raise ConfigError(
                f"calibration {GENERATED} needs a model that generates, which this use of the text has not: "
                "name a data set or a file"
            )
        # A document fills a window at most, with what it begins with or the token that ends it.
        token_ids: Sequence[int] = generated_tokens(
            model.generate, num_tokens, seed or 0, seqlen - 1, model.on_generate
        )
        return cut_windows(token_ids, seqlen, spec.label, model.start)
    source = open_source(spec, model.encode, model.render)
    if sampler == "rows":
        return cut_windows(source.rows(seed or 0), seqlen, spec.label, model.start)[:wanted].contiguous()
    token_ids = source.packed(num_tokens if seed is None else max(num_tokens, POOL_TOKENS))
    windows = cut_windows(token_ids, seqlen, spec.label, model.start)
    if seed is not None:
        windows = windows[permutation(len(windows), seed).tolist()]
    return windows[:wanted].contiguous()


def _gather(
    specs: Sequence[SourceSpec], model: _Model, sampler: str, seqlen: int, total: int, seed: int | None
) -> Tensor:
    """`total` windows, shared out by weight; of a single source as many as there are, `total` at most.

    Raises ConfigError where a source of a mix has less than its share.
    """
    _check_shares(specs, total)
    counts = dict(zip(specs, shares(specs, total), strict=True))
    found: dict[SourceSpec, Tensor] = {}
    # What the model writes comes last: it takes longest, and a text that is too short must be told before.
    for spec in sorted(specs, key=lambda spec: spec.name == GENERATED):
        found[spec] = _source_windows(spec, model, sampler, seqlen, counts[spec], seed)
        if len(found[spec]) < counts[spec] and len(specs) > 1:
            fewer = _most_windows(specs, total, {each: len(windows) for each, windows in found.items()})
            remedy = f"ask for --windows {fewer} or fewer, for" if fewer else "ask for"
            raise ConfigError(
                f"calibration {spec.label} must give {counts[spec]} of the {total} windows of {seqlen} tokens in "
                f"{label(specs)}, and has {len(found[spec])}: {remedy} a shorter --seqlen, give it less weight, or "
                "give a longer text"
            )
    return torch.cat([found[spec] for spec in specs])


def _most_windows(specs: Sequence[SourceSpec], total: int, have: dict[SourceSpec, int]) -> int:
    """The most windows below `total` for which sources that have so many suffice; 0 if there is no such number."""
    for fewer in range(total - 1, 0, -1):
        counts = shares(specs, fewer)
        if all(0 < count <= have.get(spec, total) for spec, count in zip(specs, counts, strict=True)):
            return fewer
    return 0

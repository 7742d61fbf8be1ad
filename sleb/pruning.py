"""From a checkpoint to a layer map: load the model, gather the calibration, search, save each round."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from sleb.calibration import Calibration, adds_special_tokens, calibration_windows
from sleb.errors import ConfigError, LayerMapError
from sleb.layer_map import LayerMap
from sleb.prune_options import PruneOptions, parse_remove
from sleb.search import (
    ScoringModel,
    SearchProgress,
    SearchResult,
    SearchSettings,
    check_num_remove,
    num_units,
    search,
)

DEFAULT_SEQLEN = 2048


class PrunableModel(ScoringModel, Protocol):
    """A scoring model that knows its name, shape, tokenizer and context, as `DecoderScorer` does."""

    @property
    def model_name(self) -> str: ...
    @property
    def fingerprint(self) -> str | None: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def max_length(self) -> int | None: ...


@dataclass(frozen=True)
class PruneReport:
    """What a search found, the block passes per window that it took, its tokens and its seconds."""

    layer_map: LayerMap
    result: SearchResult
    num_windows: int
    seqlen: int
    seconds: float


def prune(
    model: str | os.PathLike[str] | PrunableModel,
    remove: int | str = "20%",
    calibration: str | Path = "wikitext2",
    **options: Any,
) -> LayerMap:
    """Search for the blocks that `model` misses least (Algorithm 1 of SLEB); the map recommends all of them.

    `model` is what the engine loads (a folder, hub id, .gguf file or alias) or a loaded model; the other
    options are the fields of `PruneOptions`. Raises ConfigError, ModelError, LayerMapError or SlebError.
    """
    return run_pruning(model, PruneOptions(remove, calibration, **options)).layer_map


def run_pruning(
    model: str | os.PathLike[str] | PrunableModel,
    options: PruneOptions,
    *,
    progress: Callable[[SearchProgress], None] | None = None,
    on_round: Callable[[LayerMap], None] | None = None,
    note: Callable[[str], None] = lambda message: None,
) -> PruneReport:
    """`prune` with everything that it measured.

    `on_round` gets the map as decided so far, after it is saved; `note` gets remarks for people. Whatever
    ends the search, the output file holds the rounds that were completed, or is as it was before the first.
    """
    options.check()
    path = None if options.output is None else Path(options.output)
    earlier = None if path is None else check_output(path, resume=options.resume, force=options.force)
    scorer = _load(model, options)
    num_remove = _num_remove(options, scorer.num_blocks)
    depth = num_remove if options.depth is None else options.depth
    tokens = _gather(scorer, options, note)
    current = _empty_map(scorer, tokens, options)
    start = SearchResult()
    if earlier is not None:
        check_resume(earlier, current)
        start = SearchResult(earlier.removed, earlier.losses or (), earlier.candidate_losses or ())
        note(f"continuing {path}: {earlier.max_depth} of {num_remove} removals are decided")

    def finish_round(result: SearchResult) -> None:
        nonlocal current
        current = _with_result(current, result, depth)
        if path is not None:
            current.save(path)
        if on_round is not None:
            on_round(current)

    started = time.monotonic()
    if num_remove > len(start.removed):
        result = search(
            scorer,
            tokens.windows,
            num_remove=num_remove,
            resume=start,
            progress=progress,
            on_round=finish_round,
            settings=SearchSettings(
                units=options.units, mode=options.search_mode, batch_windows=options.batch_windows
            ),
        )
    else:
        result = start
        finish_round(start)  # the order stays, longer than asked; only the recommended depth changes
    num_windows, seqlen = tokens.windows.shape
    return PruneReport(current, result, num_windows, seqlen, time.monotonic() - started)


def check_output(path: Path, *, resume: bool, force: bool) -> LayerMap | None:
    """The map to continue, if any; an error, before any work, when the map could not be saved at the end."""
    if path.is_dir():
        raise ConfigError(f"output {path} is a folder: name a file in it, like {path / 'map.json'}")
    folder = path.resolve().parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output {path} cannot be written ({error.strerror}): name a file elsewhere"
        ) from None
    if not path.exists():
        return None
    if resume:
        return LayerMap.load(path)
    if not force:
        raise ConfigError(
            f"output {path} exists: continue it with --resume, replace it with --force, or name another"
        )
    return None


def check_resume(earlier: LayerMap, wanted: LayerMap) -> None:
    """LayerMapError unless `earlier` was found on the model, tokens and precision of `wanted`."""
    remedy = "repeat the options of the first run, or start again without --resume and with --force"
    found, asked = earlier.calibration, wanted.calibration
    if found is None or asked is None or earlier.losses is None or earlier.candidate_losses is None:
        raise LayerMapError(f"cannot resume: the map has no calibration record or no losses; {remedy}")
    pairs: Sequence[tuple[str, object, object]] = (
        ("model", earlier.model, wanted.model),
        ("number of blocks", earlier.num_blocks, wanted.num_blocks),
        ("fingerprint", earlier.fingerprint, wanted.fingerprint),
        ("dtype", found.dtype, asked.dtype),
        ("seqlen", found.seqlen, asked.seqlen),
        ("number of windows", found.windows, asked.windows),
        ("hash of the calibration tokens", found.token_hash, asked.token_hash),
    )
    for name, before, now in pairs:
        if before != now:
            raise LayerMapError(f"cannot resume: the map's {name} is {before}, this run's is {now}; {remedy}")


def _num_remove(options: PruneOptions, num_blocks: int) -> int:
    num_remove = parse_remove(options.remove, num_units(options.units, num_blocks))
    check_num_remove(num_remove, num_blocks, options.units)
    if options.depth is not None and not 0 <= options.depth <= num_remove:
        allowed = f"0 to {num_remove}, the number of units removed"
        raise ConfigError(f"depth {options.depth} to recommend must be {allowed}")
    return num_remove


def _load(model: str | os.PathLike[str] | PrunableModel, options: PruneOptions) -> PrunableModel:
    if not isinstance(model, str | os.PathLike):
        return model
    from sleb.engine.scoring import DecoderScorer

    return DecoderScorer.load(os.fspath(model), dtype=options.dtype, device=options.device)


def _gather(scorer: PrunableModel, options: PruneOptions, note: Callable[[str], None]) -> Calibration:
    context, seqlen, sampler = scorer.max_length, options.seqlen, options.sampler
    if seqlen is None:
        seqlen = min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)
    elif context is not None and seqlen > context:
        raise ConfigError(
            f"seqlen {seqlen} is longer than the context of {scorer.model_name}: {context} at most"
        )
    tokenizer = scorer.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{scorer.model_name} has no tokenizer: add its tokenizer.json to the model's folder"
        )
    # A tokenizer file may carry a limit that would silently cut the calibration text.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text: str) -> Sequence[int]:
        return cast(
            Sequence[int], tokenizer.encode(text, add_special_tokens=adds_special_tokens(sampler)).ids
        )

    tokens = calibration_windows(
        options.calibration,
        encode,
        sampler=sampler,
        seqlen=seqlen,
        windows=options.windows,
        seed=options.seed,
    )
    if tokens.note:
        note(tokens.note)
    return tokens


def _empty_map(scorer: PrunableModel, tokens: Calibration, options: PruneOptions) -> LayerMap:
    return LayerMap(
        model=scorer.model_name,
        fingerprint=scorer.fingerprint,
        num_blocks=scorer.num_blocks,
        calibration=replace(tokens.record, dtype=options.dtype),
    )


def _with_result(layer_map: LayerMap, result: SearchResult, depth: int) -> LayerMap:
    return replace(
        layer_map,
        removed=result.removed,
        losses=result.losses,
        candidate_losses=result.candidate_losses,
        depth=min(depth, len(result.removed)),
    )

"""Filling allocated weights: from safetensors, sharded or not, or with random numbers.

Matrices that are to be quantised are read one by one and quantised at once, several at a time in as many threads
as torch has: the checkpoint's own dtype is never held for more than those.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.memory import GIB, check_fits, refusal_told
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.checkpoint import open_checkpoint
from sleb.engine.model.weight_cache import WeightCache
from sleb.engine.model.weights import DecoderWeights, Target, Targets, allocate, num_bytes, patch_weights
from sleb.errors import ModelError
from sleb.fields import shown_path
from sleb.kernels.quantization import WEIGHT_FORMATS, WeightFormat
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer
from sleb.models.weight_files import StoredTensor, opened

_NUM_TENSORS_PER_OPEN = 16
_MAX_THREADS = 8  # each holds a matrix of the checkpoint; a block has up to seven
_DEVIATION = 0.02  # of random weights: the initialiser range of Llama and OPT

OnProgress = Callable[[int, int], None]  # weights loaded, of how many


def load_weights(
    path: Path,
    spec: DecoderSpec,
    keep: set[Sublayer],
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
    *,
    weight_format: WeightFormat | None = None,
    patches: Sequence[Patch] = (),
    on_progress: OnProgress | None = None,
) -> DecoderWeights:
    """The weights of the sublayers in `keep` from the checkpoint folder `path`, and those of `patches`.

    load_format: "auto" or "safetensors" read the checkpoint; "dummy" draws random weights from `seed`.
    weight_format: how matrices are quantised; what was made is kept in the cache folder for the next time.
    on_progress: called in this thread as weights come in. Raises ModelError for missing, extra or misshaped
    tensors, for pickles, for unreadable files, for values that cannot be quantised, and, before anything is taken, for
    weights larger than the memory that is free.
    """
    checkpoint = None if load_format == "dummy" else open_checkpoint(path, spec)
    spec = spec if checkpoint is None else checkpoint.spec
    size = _weight_bytes(spec, keep, dtype, weight_format)
    size += sum(patch.num_parameters for patch in patches) * dtype.itemsize
    remedy = _smaller(spec, keep, dtype, size)
    check_fits(f"{shown_path(path)}: the weights take", size, device, remedy, ModelError)
    with refusal_told(f"weights of {size / GIB:.2f} GiB", device, remedy):
        weights, targets = allocate(spec, keep, dtype, device, weight_format)
        progress = _Progress(targets, on_progress)
        if checkpoint is None:
            _fill_random(targets, seed, device, progress)
        else:
            _fill(path, checkpoint.tensors, targets, progress)
        made = tuple(patch_weights(patch, dtype, device, weight_format) for patch in patches)
    return replace(weights, patches=made)


def _weight_bytes(
    spec: DecoderSpec, keep: set[Sublayer], dtype: torch.dtype, weight_format: WeightFormat | None
) -> int:
    return num_bytes(allocate(spec, keep, dtype, torch.device("meta"), weight_format)[0])


def _smaller(spec: DecoderSpec, keep: set[Sublayer], dtype: torch.dtype, size: int) -> str:
    """What would make the weights smaller than `size` bytes, and how small."""
    choices = {"--dtype bfloat16": _weight_bytes(spec, keep, torch.bfloat16, None)} | {
        f"--weights {name}": _weight_bytes(spec, keep, dtype, each) for name, each in WEIGHT_FORMATS.items()
    }
    told = [f"{flag} makes that {each / GIB:.2f} GiB" for flag, each in choices.items() if each < size]
    return ", ".join([*told, "a deeper tier alone (--tiers) keeps fewer blocks"])


def _fill(path: Path, stored: Mapping[str, StoredTensor], targets: Targets, progress: _Progress) -> None:
    """Fills every target from the checkpoint in `path`, or from what is kept of it."""
    plain = {name: target for name, target in targets.items() if isinstance(target.weight, Tensor)}
    for names in _grouped(stored, plain):
        with opened(stored[names[0]].file) as handle:
            for name in names:
                plain[name].fill(handle.get_tensor(stored[name].name))
        progress.add(plain[name] for name in names)
    quantized = {name: target for name, target in targets.items() if not isinstance(target.weight, Tensor)}
    if quantized:
        shards = {stored[name].file for name in quantized}
        _quantize(WeightCache(path, shards), stored, quantized, progress)


class _Progress:
    """Counts the weights that have come in, and tells."""

    def __init__(self, targets: Targets, report: OnProgress | None) -> None:
        self._report = report
        self._num_done = 0
        self._total = sum(math.prod(target.weight.shape) for target in targets.values())
        self.add([])

    def add(self, targets: Iterable[Target]) -> None:
        self._num_done += sum(math.prod(target.weight.shape) for target in targets)
        if self._report is not None:
            self._report(self._num_done, self._total)


def _fill_random(targets: Targets, seed: int, device: torch.device, progress: _Progress) -> None:
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, target in targets.items():
        weight = target.weight
        if not isinstance(weight, Tensor):
            weight.fill_random(_DEVIATION, generator)
        elif weight.dim() == 1 and name.endswith(".weight"):
            weight.fill_(target.factor)  # a norm's
        else:
            weight.normal_(0.0, _DEVIATION, generator=generator)
        progress.add([target])


def _quantize(
    cache: WeightCache,
    stored: Mapping[str, StoredTensor],
    targets: Mapping[str, Target],
    progress: _Progress,
) -> None:
    """Fills every target from the cache, or else from the checkpoint.

    A thread works on one matrix alone: the pieces that stay in a processor's cache are too small to be shared out.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        min(num_threads, len(targets), _MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)
    )

    def load(name: str) -> None:
        weight = targets[name].weight
        assert not isinstance(weight, Tensor)
        if not cache.load(name, stored[name].file, weight):
            _read_quantized(stored[name], targets[name])
            cache.store(name, stored[name].file, weight)

    try:
        for name, _ in zip(targets, pool.map(load, targets), strict=True):
            progress.add([targets[name]])
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # the last call counts for threads that start later


def _read_quantized(stored: StoredTensor, target: Target) -> None:
    with opened(stored.file) as handle:
        try:
            target.fill(handle.get_tensor(stored.name))
        except ValueError:
            raise ModelError(
                f"{stored.file}: {stored.name} holds values that are not finite, which cannot be quantised; "
                "use weights auto, or another checkpoint"
            ) from None


def _grouped(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterator[list[str]]:
    """The wanted tensors by file, a few at a time: a file's pages stay mapped only while it is open."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[stored[name].file].append(name)
    for inside in by_file.values():
        for start in range(0, len(inside), _NUM_TENSORS_PER_OPEN):
            yield inside[start : start + _NUM_TENSORS_PER_OPEN]

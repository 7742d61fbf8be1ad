"""Filling allocated weights: from safetensors, sharded or not, or with random numbers.

Matrices that are to be quantised are read one by one and quantised at once, several at a time in as many threads
as torch has: the checkpoint's own dtype is never held for more than those.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.memory import GIB, check_fits, refusal_told
from sleb.engine.model.allocation import Target, Targets, allocate, patch_weights
from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.checkpoint import Checkpoint, open_checkpoint
from sleb.engine.model.quantized.find import QuantizedTensor
from sleb.engine.model.weight_cache import WeightCache
from sleb.engine.model.weights import DecoderWeights, num_bytes
from sleb.errors import ModelError
from sleb.fields import shown_path
from sleb.kernels.quantization import WEIGHT_FORMATS, Int4Weight, Int8Weight, Quantized, WeightFormat
from sleb.layer_map.patches import Patch
from sleb.layer_map.units import Sublayer
from sleb.models.weight_files import StoredTensor, opened

logger = logging.getLogger("sleb.engine")

_HALF_MAX = torch.finfo(torch.float16).max
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
    as_stored: bool = False,
    patches: Sequence[Patch] = (),
    on_progress: OnProgress | None = None,
) -> DecoderWeights:
    """The weights of the sublayers in `keep` from the checkpoint folder `path`, and those of `patches`.

    load_format: "auto" or "safetensors" read the checkpoint; "dummy" draws random weights from `seed`.
    weight_format: how matrices are quantised; what was made is kept in the cache folder for the next time.
    as_stored: matrices that the checkpoint has quantised stay in its bits where those can be held.
    on_progress: called in this thread as weights come in. Raises ModelError for missing, extra or misshaped
    tensors, for pickles, for unreadable files, for values that cannot be quantised, and, before anything is taken, for
    weights larger than the memory that is free.
    """
    checkpoint = None if load_format == "dummy" else open_checkpoint(path, spec)
    spec = spec if checkpoint is None else checkpoint.spec
    held = _held(checkpoint) if checkpoint and as_stored and weight_format is None else {}
    size = _weight_bytes(spec, keep, dtype, weight_format, held)
    size += sum(patch.num_parameters for patch in patches) * dtype.itemsize
    remedy = _smaller(spec, keep, dtype, size)
    check_fits(f"{shown_path(path)}: the weights take", size, device, remedy, ModelError)
    with refusal_told(f"weights of {size / GIB:.2f} GiB", device, remedy):
        weights, targets = allocate(spec, keep, dtype, device, weight_format, held)
        progress = _Progress(targets, on_progress)
        if checkpoint is None:
            _fill_random(targets, seed, device, progress)
        else:
            _tell(path, checkpoint, targets, dtype)
            _fill(path, checkpoint.tensors, targets, weight_format is not None, progress)
        made = tuple(patch_weights(patch, dtype, device, weight_format) for patch in patches)
    return replace(weights, patches=made)


def _weight_bytes(
    spec: DecoderSpec,
    keep: set[Sublayer],
    dtype: torch.dtype,
    weight_format: WeightFormat | None,
    held: Mapping[str, Quantized | None] | None = None,
) -> int:
    return num_bytes(allocate(spec, keep, dtype, torch.device("meta"), weight_format, held)[0])


def _held(checkpoint: Checkpoint) -> dict[str, Quantized | None]:
    return {name: stored.kind for name, stored in checkpoint.quantized.items()}


def _tell(path: Path, checkpoint: Checkpoint, targets: Targets, dtype: torch.dtype) -> None:
    """Says which quantised matrices become wider numbers."""
    wide = {
        name: stored
        for name, stored in checkpoint.quantized.items()
        if name in targets and isinstance(targets[name].weight, Tensor)
    }
    if wide:
        whys = sorted({stored.plan.why or stored.format.name for stored in wide.values()})
        logger.warning(
            "%s: %d quantised matrices (%s) are held as %s",
            shown_path(path),
            len(wide),
            ", ".join(whys),
            str(dtype)[6:],
        )


def _smaller(spec: DecoderSpec, keep: set[Sublayer], dtype: torch.dtype, size: int) -> str:
    """What would make the weights smaller than `size` bytes, and how small."""
    choices = {"--dtype bfloat16": _weight_bytes(spec, keep, torch.bfloat16, None)} | {
        f"--weights {name}": _weight_bytes(spec, keep, dtype, each) for name, each in WEIGHT_FORMATS.items()
    }
    told = [f"{flag} makes that {each / GIB:.2f} GiB" for flag, each in choices.items() if each < size]
    return ", ".join([*told, "a deeper tier alone (--tiers) keeps fewer blocks"])


def _fill(
    path: Path, stored: Mapping[str, StoredTensor], targets: Targets, quantises: bool, progress: _Progress
) -> None:
    """Fills every target from the checkpoint in `path`, or from what is kept of it.

    quantises: targets that are quantised are so by us, whatever the checkpoint's own bits.
    """
    plain = {
        name: target
        for name, target in targets.items()
        if isinstance(target.weight, Tensor) and not isinstance(stored[name], QuantizedTensor)
    }
    for names in _grouped(stored, plain):
        with opened(stored[names[0]].file) as handle:
            for name in names:
                weight, tensor = plain[name].weight, handle.get_tensor(stored[name].name)
                if isinstance(weight, Tensor) and weight.dtype == torch.float16 != tensor.dtype:
                    _check_range(path, stored[name].name, tensor)
                plain[name].fill(tensor)
        progress.add(plain[name] for name in names)
    quantized = {name: target for name, target in targets.items() if name not in plain}
    if quantized:
        shards = {stored[name].file for name in quantized}
        _quantize(WeightCache(path, shards), stored, quantized, quantises, progress)


def _check_range(path: Path, name: str, tensor: Tensor) -> None:
    largest = max(-tensor.min().item(), tensor.max().item()) if tensor.numel() else 0.0
    if largest > _HALF_MAX:
        raise ModelError(
            f"{shown_path(path)}: '{name}' holds {largest:.6g}, and float16 no more than {_HALF_MAX:.0f}: use --dtype "
            "float32, or bfloat16 where the device has it"
        )


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
            assert isinstance(weight, Int8Weight | Int4Weight)
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
    quantises: bool,
    progress: _Progress,
) -> None:
    """Fills every target from a quantised checkpoint, from the cache, or else from the checkpoint.

    A thread works on one matrix alone: the pieces that stay in a processor's cache are too small to be shared out.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        min(num_threads, len(targets), _MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)
    )

    def load(name: str) -> None:
        weight, source = targets[name].weight, stored[name]
        if isinstance(source, QuantizedTensor) and (not quantises or isinstance(weight, Tensor)):
            targets[name].take(source.decoded())
            return
        assert isinstance(weight, Int8Weight | Int4Weight)
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
    try:
        target.fill(stored.read())
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

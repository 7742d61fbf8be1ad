"""Filling allocated weights: from safetensors, sharded or not, or with random numbers.

Matrices that are to be quantised are read one by one and quantised at once, several at a time in as many threads
as torch has: the checkpoint's own dtype is never held for more than those.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.weight_cache import WeightCache
from sleb.engine.model.weights import DecoderWeights, Targets, all_sublayers, allocate
from sleb.errors import ModelError
from sleb.kernels.quantization import QuantizedWeight, Weight, WeightFormat
from sleb.layer_map.units import Sublayer

# Buffers that old checkpoints carry and that are computed instead of read.
_IGNORED_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".self_attn.rotary_emb.inv_freq",
)
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
    on_progress: OnProgress | None = None,
) -> DecoderWeights:
    """The weights of the sublayers in `keep` from the checkpoint folder `path`.

    load_format: "auto" or "safetensors" read the checkpoint; "dummy" draws random weights from `seed`.
    weight_format: how matrices are quantised; what was made is kept in the cache folder for the next time.
    on_progress: called in this thread as weights come in. Raises ModelError for missing, extra or misshaped
    tensors, for pickles, for unreadable files and for values that cannot be quantised.
    """
    weights, targets = allocate(spec, keep, dtype, device, weight_format)
    progress = _Progress(targets, on_progress)
    if load_format == "dummy":
        _fill_random(targets, seed, device, progress)
        return weights
    files = checkpoint_files(path, spec)
    plain = {name: target for name, target in targets.items() if isinstance(target, Tensor)}
    for file, names in _grouped(files, plain):
        _read(file, names, plain)
        progress.add(plain[name] for name in names)
    quantized = {name: target for name, target in targets.items() if not isinstance(target, Tensor)}
    if quantized:
        _quantize(WeightCache(path), files, quantized, progress)
    return weights


def checkpoint_files(path: Path, spec: DecoderSpec) -> dict[str, Path]:
    """Which safetensors file of the folder `path` holds each tensor; reads headers only.

    Raises ModelError unless the checkpoint has exactly the tensors, in the shapes, that `spec` asks for.
    """
    files = _tensor_files(path)
    _, expected = allocate(spec, all_sublayers(spec), torch.float32, torch.device("meta"))
    _check_tensors(path, spec, expected, files)
    return files


class _Progress:
    """Counts the weights that have come in, and tells."""

    def __init__(self, targets: Targets, report: OnProgress | None) -> None:
        self._report = report
        self._num_done = 0
        self._total = sum(math.prod(target.shape) for target in targets.values())
        self.add([])

    def add(self, targets: Iterable[Weight]) -> None:
        self._num_done += sum(math.prod(target.shape) for target in targets)
        if self._report is not None:
            self._report(self._num_done, self._total)


def _fill_random(targets: Targets, seed: int, device: torch.device, progress: _Progress) -> None:
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, target in targets.items():
        if not isinstance(target, Tensor):
            target.fill_random(_DEVIATION, generator)
        elif name.endswith("norm.weight"):
            target.fill_(1.0)
        else:
            target.normal_(0.0, _DEVIATION, generator=generator)
        progress.add([target])


def _quantize(
    cache: WeightCache, files: dict[str, Path], targets: Mapping[str, QuantizedWeight], progress: _Progress
) -> None:
    """Fills every target from the cache, or else from the checkpoint.

    A thread works on one matrix alone: the pieces that stay in a processor's cache are too small to be shared out.
    """
    num_threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        min(num_threads, len(targets), _MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)
    )

    def load(name: str) -> None:
        if not cache.load(name, files[name], targets[name]):
            _read_quantized(files[name], name, targets[name])
            cache.store(name, files[name], targets[name])

    try:
        for name, _ in zip(targets, pool.map(load, targets), strict=True):
            progress.add([targets[name]])
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # the last call counts for threads that start later


def _read_quantized(file: Path, name: str, target: QuantizedWeight) -> None:
    with _opened(file) as handle:
        try:
            target.fill(handle.get_tensor(name))
        except ValueError:
            raise ModelError(
                f"{file}: {name} holds values that are not finite, which cannot be quantised; "
                "use weights auto, or another checkpoint"
            ) from None


def _tensor_files(path: Path) -> dict[str, Path]:
    """Which file holds each tensor. Never opens a pickle."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): path / str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{index} is not a safetensors index ({error!r}); download the model again"
            ) from None
        _check_shards(path, set(files.values()))
        return files
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}"))
        if pickles:
            raise ModelError(
                f"{path} holds pickled weights ({pickles[0]}), which can run code when they are read; "
                "convert them to safetensors (transformers: model.save_pretrained(folder))"
            )
        raise ModelError(f"{path} holds no .safetensors file; download the model again")
    return {name: shard for shard in shards for name in _names(shard)}


def _check_shards(path: Path, shards: set[Path]) -> None:
    for shard in sorted(shards):
        if shard.resolve().parent != path.resolve() and not shard.is_symlink():
            raise ModelError(f"the index in {path} points outside the folder: {shard}")
        if not shard.is_file():
            raise ModelError(f"shard {shard} named by the index is missing; download the model again")


def _names(file: Path) -> list[str]:
    with _opened(file) as handle:
        return list(handle.keys())


def _check_tensors(path: Path, spec: DecoderSpec, expected: Targets, files: dict[str, Path]) -> None:
    missing = sorted(set(expected) - set(files))
    if missing:
        raise ModelError(f"{path} lacks {_some(missing)}, which {spec.architecture} needs; download it again")
    allowed = {f"{spec.names.head}.weight"} if spec.tied_embeddings else set()
    extra = sorted(
        name for name in set(files) - set(expected) - allowed if not name.endswith(_IGNORED_SUFFIXES)
    )
    if extra:
        raise ModelError(
            f"{path} holds {_some(extra)}, which {spec.architecture} does not have; "
            "the checkpoint is of another architecture than its config says"
        )
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in expected:
        by_file[files[name]].append(name)
    for file, names in by_file.items():
        _check_shapes(file, names, expected)


def _check_shapes(file: Path, names: list[str], expected: Targets) -> None:
    with _opened(file) as handle:
        for name in names:
            shape, wanted = tuple(handle.get_slice(name).get_shape()), tuple(expected[name].shape)
            if shape != wanted:
                raise ModelError(f"{file}: {name} has shape {shape}, but the config asks for {wanted}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _grouped(files: dict[str, Path], names: Iterable[str]) -> Iterator[tuple[Path, list[str]]]:
    """The wanted tensors by file, a few at a time: a file's pages stay mapped only while it is open."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[files[name]].append(name)
    for file, inside in by_file.items():
        for start in range(0, len(inside), _NUM_TENSORS_PER_OPEN):
            yield file, inside[start : start + _NUM_TENSORS_PER_OPEN]


def _read(file: Path, names: list[str], targets: Mapping[str, Tensor]) -> None:
    with _opened(file) as handle:
        for name in names:
            targets[name].copy_(handle.get_tensor(name))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The safetensors file, opened. Raises ModelError if it, or what is read while it is open, is not readable."""
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from None

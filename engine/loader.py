"""Filling allocated weights: from safetensors, sharded or not, or with random numbers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sleb.engine.architecture import DecoderSpec
from sleb.engine.weights import DecoderWeights, Targets, all_sublayers, allocate
from sleb.errors import ModelError
from sleb.units import Sublayer

# Buffers that old checkpoints carry and that are computed instead of read.
_IGNORED_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".self_attn.rotary_emb.inv_freq",
)
_NUM_TENSORS_PER_OPEN = 16


def load_weights(
    path: Path,
    spec: DecoderSpec,
    keep: set[Sublayer],
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    seed: int = 0,
) -> DecoderWeights:
    """The weights of the sublayers in `keep` from the checkpoint folder `path`.

    load_format: "auto" or "safetensors" read the checkpoint; "dummy" draws random weights from `seed`.
    Raises ModelError for missing, extra or misshaped tensors, for pickles, and for unreadable files.
    """
    weights, targets = allocate(spec, keep, dtype, device)
    if load_format == "dummy":
        _fill_random(targets, seed, device)
        return weights
    files = _tensor_files(path)
    _, expected = allocate(spec, all_sublayers(spec), dtype, torch.device("meta"))
    _check_tensors(path, spec, expected, files)
    for file, names in _grouped(files, targets):
        _read(file, names, targets)
    return weights


def _fill_random(targets: Targets, seed: int, device: torch.device) -> None:
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, target in targets.items():
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        else:  # 0.02 is the initialiser range of Llama and OPT
            target.normal_(0.0, 0.02, generator=generator)


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
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from None


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
    try:
        with safe_open(file, framework="pt") as handle:
            for name in names:
                shape, wanted = tuple(handle.get_slice(name).get_shape()), tuple(expected[name].shape)
                if shape != wanted:
                    raise ModelError(f"{file}: {name} has shape {shape}, but the config asks for {wanted}")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _grouped(files: dict[str, Path], targets: Targets) -> Iterator[tuple[Path, list[str]]]:
    """The wanted tensors by file, a few at a time: a file's pages stay mapped only while it is open."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in targets:
        by_file[files[name]].append(name)
    for file, names in by_file.items():
        for start in range(0, len(names), _NUM_TENSORS_PER_OPEN):
            yield file, names[start : start + _NUM_TENSORS_PER_OPEN]


def _read(file: Path, names: list[str], targets: Targets) -> None:
    try:
        with safe_open(file, framework="pt") as handle:
            for name in names:
                targets[name].copy_(handle.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file ({error}); download it again") from None

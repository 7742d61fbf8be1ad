"""A GGUF file as a Hugging Face folder: config.json, safetensors, tokenizer, chat template, generation config.

transformers has a GGUF loader. It is not used for the weights, because it needs a package more (accelerate),
holds the whole model in memory, drops Llama 3's rope scaling, and knows neither SmolLM3 nor SmolLM's way of
splitting text. The `gguf` package, which llama.cpp's authors keep, does the dequantising; here
tensors are renamed, put into Hugging Face's row order, and written chunk by chunk, so memory stays small
whatever the model's size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from sleb.errors import ModelError
from sleb.fields import shown, shown_path
from sleb.models.families import Family
from sleb.models.gguf.config import (
    architecture_of,
    bias_flags,
    block_tensors,
    generation_config,
    model_config,
    outer_tensors,
    tensor_shapes,
    token_ids,
)
from sleb.models.gguf.reader import Tensor, read_gguf
from sleb.models.gguf.tokenizer import write_tokenizer
from sleb.models.gguf.vocabulary import read_vocabulary
from sleb.models.store import check_space

Dtype = Literal["bfloat16", "float32"]
Progress = Callable[[int, int], None]

SHARD_BYTES = 5_000_000_000
_CHUNK_ELEMENTS = 1 << 22
_ITEM_BYTES = {"bfloat16": 2, "float32": 4}
_SAFETENSORS_NAME = {"bfloat16": "BF16", "float32": "F32"}
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_MAX_ROPE_FACTORS = 1 << 11  # half the largest head


@dataclass(frozen=True)
class _Planned:
    """A tensor to write. `shape` as Hugging Face has it; `num_heads`: its rows are in rotation order, else 0."""

    name: str
    shape: tuple[int, ...]
    source: Tensor
    num_heads: int

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def convert_gguf(
    source: Path,
    folder: Path,
    *,
    dtype: Dtype = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes the model of `source` into the existing empty `folder`.

    `progress(done, total)` counts bytes of weights written. Not atomic: `sleb.models.store` sees to that. Raises
    ModelError for a file that is damaged or not supported, OSError when the folder cannot be written.
    """
    fields, tensors = read_gguf(source, architecture_of)
    family = architecture_of(fields)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or "tokenizer.ggml.tokens" not in fields:
        raise ModelError(
            f"{shown_path(source)} holds no language model (token_embd.weight or its vocabulary is missing)"
        )
    vocabulary = read_vocabulary(fields)
    if len(vocabulary.tokens) > embedding.shape[0]:
        rows = f"token_embd.weight has {embedding.shape[0]} rows"
        raise ModelError(
            f"{shown_path(source)}: its vocabulary has {len(vocabulary.tokens)} tokens, and {rows}: one for each"
        )
    factors = {name: _factors(tensors[name], source) for name in _ROPE_FACTORS if name in tensors}
    config = model_config(fields, embedding.shape[0], frozenset(tensors), factors, dtype)
    plan = _plan(tensors, family, config, source)
    _write_json(folder / "config.json", config | token_ids(vocabulary))
    _write_json(folder / "generation_config.json", generation_config(fields, vocabulary))
    write_tokenizer(vocabulary, folder, config["max_position_embeddings"])
    _write_weights(plan, folder, dtype, shard_bytes, progress, source)


def _plan(
    tensors: Mapping[str, Tensor], family: Family, config: Mapping[str, Any], source: Path
) -> list[_Planned]:
    """Every tensor of the model in the file's order. Raises ModelError if the file has others than the model."""
    renamed = _renamed(family, config)
    present = set(tensors) - set(_ROPE_FACTORS)
    if missing := sorted(set(renamed) - present):
        raise ModelError(
            f"{shown_path(source)} lacks {len(missing)} tensors of a {family.model_type} model: {_few(missing)}"
        )
    if extra := sorted(present - set(renamed)):
        raise ModelError(
            f"{shown_path(source)} has {len(extra)} tensors that a {family.model_type} model has no place for: "
            f"{_few(extra)}"
        )
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    shapes = tensor_shapes(config)
    plan = []
    for name, tensor in tensors.items():
        if name not in renamed:
            continue
        part, kind = name.split(".")[-2:]
        wanted = shapes[part] if kind == "weight" else shapes[part][:1]
        if tensor.shape != wanted:
            told = f"{name} has shape {list(tensor.shape)}; by the metadata it must be {list(wanted)}"
            raise ModelError(f"{shown_path(source)}: {told}")
        if tensor.data.ndim != 2:
            raise ModelError(
                f"{shown_path(source)}: {name} is a quantised vector; only matrices may be quantised"
            )
        num_heads = heads.get(part, 0) if family.gguf and family.gguf.interleaved else 0
        plan.append(_Planned(renamed[name], tensor.shape, tensor, num_heads))
    for planned in {planned.source.kind: planned for planned in plan}.values():
        _dequantized(planned.source.data[:1], planned.source, source)  # refused before the work, not amid it
    return plan


def _renamed(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """The names of all tensors that the model must have, in the file and in the folder."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in outer_tensors(family).items()}
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    flags = bias_flags(family)
    biased = {each for each, flag in flags.items() if (config[flag] if isinstance(flag, str) else flag)}
    for block in range(config["num_hidden_layers"]):
        prefix = family.names.block.format(block=block)
        for theirs, ours in block_tensors(family).items():
            for kind in ("weight", "bias") if theirs in biased else ("weight",):
                names[f"blk.{block}.{theirs}.{kind}"] = f"{prefix}.{ours}.{kind}"
    return names


def _few(names: list[str]) -> str:
    return ", ".join(map(shown, names[:4])) + (", …" if len(names) > 4 else "")


def _factors(tensor: Tensor, source: Path) -> Any:
    """The vector `tensor` as float32."""
    if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
        wanted = f"a vector of at most {_MAX_ROPE_FACTORS}"
        raise ModelError(
            f"{shown_path(source)}: {tensor.name} has shape {list(tensor.shape)}; it must be {wanted}"
        )
    return _dequantized(tensor.data, tensor, source).reshape(-1)


def _dequantized(data: npt.NDArray[np.uint8], tensor: Tensor, source: Path) -> npt.NDArray[np.float32]:
    """Rows of `tensor.data` as float32, contiguous and writable."""
    from gguf import dequantize

    try:
        return np.require(dequantize(data, tensor.kind), np.float32, ["C", "W"])
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{shown_path(source)}: {tensor.name} cannot be dequantised ({error})") from error


def _chunks(planned: _Planned, dtype: Dtype, source: Path) -> Iterator[bytes]:
    """The tensor's little-endian bytes in `dtype`, some rows at a time.

    llama.cpp rotates neighbours (0, 1), (2, 3), … of a head, Hugging Face its halves (0, d/2), (1, d/2 + 1), …:
    files made for the former hold a head's rows as [d/2, 2], to be read here as [2, d/2].
    """
    import torch

    data = planned.source.data
    num_rows = planned.shape[0]
    order = np.arange(num_rows)
    if planned.num_heads:
        order = order.reshape(planned.num_heads, -1, 2).swapaxes(1, 2).reshape(-1)
    step = max(1, _CHUNK_ELEMENTS * num_rows // planned.num_elements)
    for start in range(0, num_rows, step):
        values = _dequantized(data[order[start : start + step]], planned.source, source)
        if dtype == "bfloat16":
            values = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        yield values.tobytes()


def _write_weights(
    plan: list[_Planned],
    folder: Path,
    dtype: Dtype,
    shard_bytes: int,
    progress: Progress | None,
    source: Path,
) -> None:
    shards = _shards(plan, _ITEM_BYTES[dtype], shard_bytes)
    total = sum(planned.num_elements for planned in plan) * _ITEM_BYTES[dtype]
    check_space(folder, total)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write_header(file, shard, dtype)
            for planned in shard:
                weight_map[planned.name] = name
                for chunk in _chunks(planned, dtype, source):
                    file.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(plan: list[_Planned], item_bytes: int, shard_bytes: int) -> list[list[_Planned]]:
    shards: list[list[_Planned]] = [[]]
    filled = 0
    for planned in plan:
        size = planned.num_elements * item_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += size
    return shards


def _write_header(file: BinaryIO, shard: list[_Planned], dtype: Dtype) -> None:
    """The safetensors header (huggingface.co/docs/safetensors): its length in 8 bytes, then JSON, padded to 8.

    Written here because the library wants all tensors of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in shard:
        end = offset + planned.num_elements * _ITEM_BYTES[dtype]
        header[planned.name] = {
            "dtype": _SAFETENSORS_NAME[dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

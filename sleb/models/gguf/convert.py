"""A GGUF file as a Hugging Face folder: config.json, safetensors, tokenizer, chat template, generation config.

transformers has a GGUF loader. It is not used for the weights, because it needs a package more (accelerate), holds the
whole model in memory, drops Llama 3's rope scaling, and knows neither SmolLM3 nor SmolLM's way of splitting text. The
`gguf` package, which llama.cpp's authors keep, does the dequantising; here tensors are renamed, put into Hugging Face's
row order (`sleb.models.gguf.tensors`), and written chunk by chunk, so memory stays small whatever the model's size.
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
from sleb.models.gguf.blocks import BLOCKS, kept_end
from sleb.models.gguf.config import (
    architecture_of,
    generation_config,
    model_config,
    token_ids,
)
from sleb.models.gguf.reader import Tensor, read_gguf
from sleb.models.gguf.tensors import Placed, family_tensors, num_experts
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
    """A tensor to write: in `dtype`, or with `keep_bits` in its blocks where those are kept."""

    placed: Placed
    source: Tensor
    dtype: Dtype
    keep_bits: bool

    @property
    def keeps(self) -> bool:
        """Whether its blocks are written as they are."""
        is_matrix = self.keep_bits and len(self.source.shape) == 2
        return (
            is_matrix
            and self.source.kind.name in BLOCKS
            and not (self.placed.transposed or self.placed.shift)
        )

    @property
    def name(self) -> str:
        """In the folder."""
        name = self.placed.name
        return name.removesuffix(".weight") + kept_end(self.source.kind.name) if self.keeps else name

    @property
    def num_elements(self) -> int:
        return int(np.prod(self.source.shape, dtype=np.int64))

    @property
    def num_bytes(self) -> int:
        """In the folder."""
        return self.source.data.nbytes if self.keeps else self.num_elements * _ITEM_BYTES[self.dtype]


def convert_gguf(
    source: Path,
    folder: Path,
    *,
    dtype: Dtype = "bfloat16",
    keep_bits: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes the model of `source` into the existing empty `folder`.

    keep_bits: matrices in blocks of a kind that `sleb.models.gguf.blocks` knows stay in them, as bytes, unless they
    must be turned; vectors are float32.
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
    plan = _plan(_by_expert(tensors), family, config, source, dtype, keep_bits)
    unread = {"num_key_value_heads", "head_dim"} - set(family.fields)  # it derives them
    written = {family.own(name): value for name, value in config.items() if name not in unread}
    if any(planned.keeps for planned in plan):
        written["quantization_config"] = {"quant_method": "gguf"}
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # not what the class fills in
    _write_json(folder / "config.json", written | none | token_ids(vocabulary))
    _write_json(folder / "generation_config.json", generation_config(fields, vocabulary))
    write_tokenizer(vocabulary, folder, config["max_position_embeddings"])
    _write_weights(plan, folder, shard_bytes, progress, source)


def _plan(
    tensors: Mapping[str, Tensor],
    family: Family,
    config: Mapping[str, Any],
    source: Path,
    dtype: Dtype,
    keep_bits: bool,
) -> list[_Planned]:
    """Every tensor of the model in the file's order. Raises ModelError if the file has others than the model."""
    config = {**family.fields, **config}
    if family.experts and num_experts(family.experts, config) * config["num_hidden_layers"] > len(tensors):
        raise ModelError(f"{shown_path(source)} has fewer experts than its expert_count says")
    expected = family_tensors(family, config)
    present = set(tensors) - set(_ROPE_FACTORS)
    if missing := sorted(set(expected) - present):
        raise ModelError(
            f"{shown_path(source)} lacks {len(missing)} tensors of a {family.model_type} model: {_few(missing)}"
        )
    if extra := sorted(present - set(expected)):
        raise ModelError(
            f"{shown_path(source)} has {len(extra)} tensors that a {family.model_type} model has no place for: "
            f"{_few(extra)}"
        )
    plan = []
    for name, tensor in tensors.items():
        if name not in expected:
            continue
        wanted = expected[name].shape
        if tensor.shape != wanted:
            told = f"{name} has shape {list(tensor.shape)}; by the metadata it must be {list(wanted)}"
            raise ModelError(f"{shown_path(source)}: {told}")
        if tensor.data.ndim != 2:
            raise ModelError(
                f"{shown_path(source)}: {name} is a quantised vector; only matrices may be quantised"
            )
        exact = keep_bits and len(wanted) == 1  # vectors are small, and their bits are float32's
        plan.append(_Planned(expected[name], tensor, "float32" if exact else dtype, keep_bits))
    for planned in {planned.source.kind: planned for planned in plan}.values():
        dequantized(planned.source.data[:1], planned.source, source)  # refused before the work, not amid it
    return plan


def _by_expert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With each expert's part of what holds all of them, by the names of `family_tensors`."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) == 3 and name.endswith("_exps.weight"):
            each = ((f"{name}#{index}", data) for index, data in enumerate(tensor.data))
            found |= {own: Tensor(own, tensor.shape[1:], tensor.kind, data) for own, data in each}
        else:
            found[name] = tensor
    return found


def _few(names: list[str]) -> str:
    return ", ".join(map(shown, names[:4])) + (", …" if len(names) > 4 else "")


def _factors(tensor: Tensor, source: Path) -> Any:
    """The vector `tensor` as float32."""
    if len(tensor.shape) != 1 or tensor.shape[0] > _MAX_ROPE_FACTORS:
        wanted = f"a vector of at most {_MAX_ROPE_FACTORS}"
        raise ModelError(
            f"{shown_path(source)}: {tensor.name} has shape {list(tensor.shape)}; it must be {wanted}"
        )
    return dequantized(tensor.data, tensor, source).reshape(-1)


def dequantized(data: npt.NDArray[np.uint8], tensor: Tensor, source: Path) -> npt.NDArray[np.float32]:
    """Rows of `tensor.data` as float32, contiguous and writable."""
    from gguf import dequantize

    try:
        return np.require(dequantize(data, tensor.kind), np.float32, ["C", "W"])
    except (NotImplementedError, ValueError) as error:
        raise ModelError(f"{shown_path(source)}: {tensor.name} cannot be dequantised ({error})") from error


def _chunks(planned: _Planned, source: Path) -> Iterator[bytes]:
    """The tensor's little-endian bytes, some rows at a time; a matrix that is turned, at once."""
    import torch

    placed, data = planned.placed, planned.source.data
    num_rows = planned.source.shape[0]
    order = np.arange(num_rows) if placed.order is None else placed.order
    step = num_rows if placed.transposed else max(1, _CHUNK_ELEMENTS * num_rows // planned.num_elements)
    for start in range(0, num_rows, step):
        rows = data[order[start : start + step]]
        if planned.keeps:
            yield rows.tobytes()
            continue
        values = dequantized(rows, planned.source, source)
        if placed.shift:
            values -= np.float32(placed.shift)
        if placed.transposed:
            values = np.ascontiguousarray(values.T)
        if planned.dtype == "bfloat16":
            values = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
        yield values.tobytes()


def _write_weights(
    plan: list[_Planned],
    folder: Path,
    shard_bytes: int,
    progress: Progress | None,
    source: Path,
) -> None:
    shards = _shards(plan, shard_bytes)
    total = sum(planned.num_bytes for planned in plan)
    check_space(folder, total)
    weight_map: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            _write_header(file, shard)
            for planned in shard:
                weight_map[planned.name] = name
                for chunk in _chunks(planned, source):
                    file.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress(done, total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _shards(plan: list[_Planned], shard_bytes: int) -> list[list[_Planned]]:
    shards: list[list[_Planned]] = [[]]
    filled = 0
    for planned in plan:
        size = planned.num_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += size
    return shards


def _write_header(file: BinaryIO, shard: list[_Planned]) -> None:
    """The safetensors header (huggingface.co/docs/safetensors): its length in 8 bytes, then JSON, padded to 8.

    Written here because the library wants all tensors of a file in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in shard:
        end = offset + planned.num_bytes
        header[planned.name] = {
            "dtype": "U8" if planned.keeps else _SAFETENSORS_NAME[planned.dtype],
            "shape": list(planned.source.data.shape if planned.keeps else planned.placed.checkpoint_shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

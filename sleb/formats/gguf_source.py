"""A model as a GGUF file would hold all of it, from such a file or as llama.cpp's converter makes one of a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sleb.engine.model.architecture import DecoderSpec
from sleb.engine.model.checkpoint import open_checkpoint
from sleb.errors import ConfigError
from sleb.formats.gguf_metadata import rotation_keys, size_keys, tokenizer_keys
from sleb.formats.source import Source
from sleb.models.config import family_of, read_config, read_fields
from sleb.models.families import FAMILIES, Family, Gguf
from sleb.models.gguf.reader import raw_keys, read_gguf
from sleb.models.gguf.tensors import Placed, family_tensors
from sleb.models.gguf.values import Values, made_values, of_checkpoint, of_file, stacked
from sleb.models.gguf.writer import as_key

Floats = npt.NDArray[np.float32]
_SAME = {"gelu_new": "gelu_pytorch_tanh"}  # one function by two names
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # llama.cpp's llama_ftype


@dataclass(frozen=True)
class FileModel:
    """What a file is made of: keys as bytes, and every tensor by its name in the file."""

    keys: Mapping[str, bytes]
    tensors: Mapping[str, Values]


class GgufSource:
    """A model's folder, and what its fields and tensors are called in a file.

    Attributes: values: its family's fields of config.json, sizes and switches among them. architecture: the file's.
    """

    def __init__(self, source: Source) -> None:
        self.path, self.spec, self.name = source.path, source.spec, source.name
        self.fields = read_config(source.path)
        self.family: Family = family_of(self.fields)
        if self.family.gguf is None:
            known = ", ".join(family.architecture for family in FAMILIES.values() if family.gguf)
            raise ConfigError(
                f"{source.name}: {self.family.architecture} is not written as GGUF, these are: {known}; use --format hf"
            )
        spec, values = self.spec, read_fields(self.fields, self.family)
        self.values: dict[str, Any] = values | {
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "tie_word_embeddings": spec.tied_embeddings,
            "intermediate_size": spec.intermediate_size,
            "epsilon": spec.norm_eps,
        }
        self.architecture = self.family.gguf.name

    def placed(self, **own: Any) -> dict[str, Placed]:
        """Every tensor by its name in the file; `own`: fields in the place of the config's."""
        return family_tensors(self.family, self.values | own)

    def from_file(self, path: Path) -> FileModel:
        """All of a GGUF file."""
        fields, tensors = read_gguf(path)
        self.architecture = fields.string("general.architecture")
        return FileModel(raw_keys(path), {name: of_file(tensor, path) for name, tensor in tensors.items()})

    def from_checkpoint(self) -> FileModel:
        """All of a folder, as llama.cpp's converter would have it."""
        assert self.family.gguf is not None
        checkpoint = open_checkpoint(self.path, self.spec)
        self._check_computed(self.family.gguf, checkpoint.spec)
        self.values["tie_word_embeddings"] = checkpoint.spec.tied_embeddings
        tensors: dict[str, Values] = {}
        together: dict[str, list[Values]] = {}
        for name, placed in self.placed().items():
            values = of_checkpoint(checkpoint.tensors[placed.name], placed)
            whole, _, expert = name.partition("#")
            if expert:
                together.setdefault(whole, []).append(values)
            else:
                tensors[name] = values
        tensors |= {name: stacked(each) for name, each in together.items()}
        if self.family.gguf.head == "own":
            tensors.setdefault("output.weight", tensors["token_embd.weight"])
        keys: dict[str, Any] = size_keys(self.family, self.values)
        factors: Mapping[str, Floats] = {}
        if self.spec.rotaries:
            rotation, factors = rotation_keys(self.fields, self.family, self.values, self.spec.rotaries)
            keys |= rotation
        stored = {values.kind for values in tensors.values() if len(values.shape) > 1}
        general = {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": self.name,
            "general.file_type": FILE_TYPES[next(iter(stored)) if len(stored) == 1 else "F32"],
            "general.quantization_version": 2,
        }
        own = {f"{self.architecture}.{name}": value for name, value in keys.items()}
        written = general | own | tokenizer_keys(self.path, self.spec.vocab_size)
        found = {name: as_key(name, value) for name, value in written.items()}
        found |= self.window_keys(range(self.spec.num_blocks))
        return FileModel(found, tensors | {name: made_values(each) for name, each in factors.items()})

    def window_keys(self, blocks: Sequence[int]) -> dict[str, bytes]:
        """Which of `blocks` slide a window; nothing where llama.cpp does not look at it."""
        windows = [self.spec.windows[block] for block in blocks]
        if not any(windows) or not self.has_windows:
            return {}
        key = f"{self.architecture}.attention.sliding_window"
        keys = {key: as_key(key, next(window for window in windows if window))}
        return keys | {f"{key}_pattern": as_key(f"{key}_pattern", [each is not None for each in windows])}

    @property
    def has_windows(self) -> bool:
        """Whether llama.cpp slides windows in this architecture."""
        gguf = self.family.gguf
        return gguf is not None and gguf.full_every is not None and "layer_types" in self.family.fields

    def _check_computed(self, gguf: Gguf, spec: DecoderSpec) -> None:
        """Raises ConfigError for what llama.cpp computes otherwise, or not, in this architecture."""
        usual = self.family.fields["hidden_act"]
        biases = {"qkv": spec.qkv_bias, "out": spec.out_bias, "mlp": spec.mlp_bias}
        scaled = {"attention_multiplier", "query_pre_attn_scalar"} & set(gguf.keys)
        wrong = None
        if _SAME.get(spec.activation, spec.activation) != _SAME.get(usual, usual):
            wrong = f"the activation {spec.activation}, and llama.cpp computes {usual}"
        elif gguf.head == "tied" and not spec.tied_embeddings:
            wrong = "an output head of its own, and llama.cpp takes the embedding"
        elif not scaled and spec.attention_scale != spec.head_dim**-0.5:
            wrong = f"{spec.attention_scale:g} as the factor on the scores, and llama.cpp takes 1 / sqrt(head size)"
        elif any(each and name not in gguf.biases for name, each in biases.items()):
            wrong = "biases that llama.cpp does not add"
        elif gguf.all_biases and not all(biases.values()):
            wrong = "not all the biases that llama.cpp asks for"
        elif not gguf.grouped and spec.num_kv_heads != spec.num_heads:
            wrong = "keys and values that queries share, which llama.cpp does not have"
        elif spec.clip_qkv is not None and "clip_qkv" not in gguf.keys:
            wrong = "a bound on queries, keys and values that llama.cpp does not have"
        elif any(spec.windows) and not self.has_windows:
            wrong = "sliding windows, which llama.cpp does not have"
        if wrong:
            raise ConfigError(
                f"{self.name} has {wrong} in its architecture {self.architecture}: use --format hf"
            )

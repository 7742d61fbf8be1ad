"""Which of a folder's tensors are quantised matrices, by its config's words and their names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sleb.engine.model.quantized.formats import FORMATS as OTHERS
from sleb.engine.model.quantized.formats import Decoded, Format, Module, Plan
from sleb.engine.model.quantized.gguf import GGUF
from sleb.errors import ModelError
from sleb.fields import Fields, read_json, shown, shown_path, shown_text
from sleb.kernels.quantization import Quantized
from sleb.models.weight_files import StoredTensor, opened

FORMATS = {**OTHERS, "gguf": GGUF}

_NUMBERS = ("F64", "F32", "F16", "BF16")
# How tensors' names end in each format, the telling ones first: all of `ends` must be there.
_BY_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("NVFP4", ("weight_scale_2",)),
    ("NVFP4 (compressed-tensors)", ("weight_global_scale",)),
    ("compressed-tensors", ("weight_packed",)),
    ("GPTQ", ("qweight", "g_idx")),
    ("AWQ", ("qweight", "qzeros")),
    ("HQQ", ("W_q",)),
    ("FP8 in blocks", ("weight_scale_inv",)),
    ("bitsandbytes, 8 bit", ("SCB",)),
    ("bitsandbytes, 4 bit", ("absmax",)),
    ("MLX", ("scales",)),
    ("quantised with a scale for each weight", ("weight_scale",)),
    ("quantised", ("qweight",)),
)
_CONFIGS = ("quantization", "quantization_config", "compression_config")  # MLX writes the first two
# What tools write beside config.json instead, and the method that each is of.
_BESIDE = (
    ("quantize_config.json", "gptq"),
    ("quant_config.json", "awq"),
    ("hf_quant_config.json", "modelopt"),
)


@dataclass(frozen=True)
class QuantizedTensor(StoredTensor):
    """A matrix that is stored as several tensors, those of `module`; its name, file and dtype are the mark's."""

    module: Module
    format: Format
    plan: Plan

    @property
    def kind(self) -> Quantized | None:
        """What `sleb.kernels.quantization` holds its numbers in; None: only as they are dequantised."""
        return self.plan.kind

    def parts_of(self, name: str) -> dict[str, StoredTensor]:
        """Its parts, each as it ends."""
        stem = name.removesuffix(self.format.result)
        return {stem + end: part for end, part in self.module.parts.items()}

    def decoded(self) -> Decoded:
        """The matrix as the file says it, on the CPU. Raises ModelError."""
        parts: dict[str, Tensor] = {}
        for end, part in self.module.parts.items():
            with opened(part.file) as handle:
                parts[end] = handle.get_tensor(part.name)
        return self.plan.decode(parts)

    def read(self) -> Tensor:
        """The matrix in numbers, float32 unless the format's are fewer bits'. Raises ModelError."""
        values = self.decoded()
        return values if isinstance(values, Tensor) else values.dequantize(torch.float32)


def quantized_by_config(path: Path) -> str | None:
    """How the folder's config.json says that its weights are quantised, such as "gptq, 4 bits"; None: it does not."""
    try:
        config = read_json(path / "config.json")
    except FileNotFoundError:
        return None
    for name in _CONFIGS:
        if isinstance(values := config.values.get(name), dict):
            facts = [values.get(key) for key in ("quant_method", "quant_algo", "format", "fmt")]
            words = [shown(fact).strip('"') for fact in facts if fact]
            if not words and name == "quantization":
                words = ["MLX"]
            bits = next((values[key] for key in ("bits", "w_bit", "nbits") if values.get(key)), None)
            for key, number in (("load_in_4bit", 4), ("load_in_8bit", 8)):
                bits = number if values.get(key) is True else bits
            return ", ".join([*words, *([f"{shown(bits)} bits"] if bits else [])]) or None
    return None


def quantized_tensors(path: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the folder `path` with each quantised matrix as one, by names; those of its parts are gone.

    Raises ModelError for parts that do not fit one another, or what the config says.
    """
    method, settings = _settings(path)
    found = dict(stored)
    for each in FORMATS.get(method or "", ()):
        for name in [name for name in found if name.endswith(each.mark)]:
            stem = name.removesuffix(each.mark)
            ends = (each.mark, *each.ends)
            parts = {end: found[stem + end] for end in ends if stem + end in found}
            if each.mark in parts and not isinstance(parts[each.mark], QuantizedTensor) and _quantised(parts):
                for end in parts:
                    del found[stem + end]
                found[stem + each.result] = _one(stem, Module(parts, settings), each)
    return found


def check_not_quantized(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Raises ModelError, which names the format and the remedy, for tensors that are no plain numbers."""
    tensors = [each for each in tensors if not isinstance(each, QuantizedTensor)]
    ends = {tensor.name.rpartition(".")[2] for tensor in tensors}
    by_names = [name for name, marks in _BY_NAMES if ends.issuperset(marks)]
    marks = {mark for _, every in _BY_NAMES for mark in every}
    odd = [each for each in tensors if each.dtype not in _NUMBERS]
    telling = odd or [each for each in tensors if each.name.rpartition(".")[2] in marks]
    if not telling:
        return
    by_config = quantized_by_config(path)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in odd}))
    found = by_config or (by_names[0] if by_names else f"stored as {dtypes}")
    tensor = f"{shown_text(telling[0].name[:200])} is {telling[0].dtype}"
    raise ModelError(
        f"{shown_path(path)} holds quantised weights ({found}; {tensor}), which sleb does not read: give the model's "
        "unquantised checkpoint, which --weights int8 or int4 quantises as it is loaded, a GGUF file, or one whose "
        f"config.json says quant_method {', '.join(sorted(OTHERS))}"
    )


def _settings(path: Path) -> tuple[str | None, Fields]:
    """The method of quantisation by config.json, or a file beside it, and its fields."""
    for file, method in (("config.json", None), *_BESIDE):
        try:
            config = read_json(path / file)
        except FileNotFoundError:
            continue
        if method not in (None, "modelopt"):
            return method, config
        for name in _CONFIGS:
            if isinstance(config.values.get(name), dict):
                inner = config.object(name)
                told = inner.string("quant_method", default=method)
                return told or ("mlx" if name == "quantization" else None), inner
    return None, Fields({}, path / "config.json")


def _quantised(parts: Mapping[str, StoredTensor]) -> bool:
    return any(each.dtype not in _NUMBERS for each in parts.values())


def _one(stem: str, module: Module, each: Format) -> QuantizedTensor:
    plan = each.plan(module)
    largest = max(module.parts.values(), key=lambda part: math.prod(part.shape))
    name = stem + each.result
    return QuantizedTensor(name, largest.file, largest.dtype, plan.shape, module, each, plan)

"""Quantised checkpoints of other tools, told by name: their tensors are no weights without scales, and are not read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sleb.errors import ModelError
from sleb.fields import read_json, shown, shown_path, shown_text
from sleb.models.weight_files import StoredTensor

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


def check_not_quantized(path: Path, tensors: Sequence[StoredTensor]) -> None:
    """Raises ModelError, which names the format and the remedy, for tensors that are no plain numbers."""
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
        "unquantised checkpoint, which --weights int8 or int4 quantises as it is loaded, or a GGUF file"
    )

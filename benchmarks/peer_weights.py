"""What an engine's weights are by its own files, which may be something else than the command line calls them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

_UNQUANTISED = ("all f32", "f64", "f32", "f16", "bf16", "fp32", "fp16", "float32", "float16", "bfloat16")
# llama.cpp's names of file types (llama_ftype_name in src/llama-model-loader.cpp), which end its line about a model.
_GGUF_TYPE = re.compile(
    r"(?:^|\s)(?:\(guessed\) )?(all F32|BF16|F16|I?Q\d\w*|TQ\d\w*|MXFP4 MoE|NVFP4)(?: mix)?(?: - .+)?$"
)


def gguf_format(model_type: object) -> str | None:
    """As q4_1, from the model_type that llama-bench tells, as "llama 135M Q4_1"; None for another form."""
    found = _GGUF_TYPE.search(model_type) if isinstance(model_type, str) else None
    return found[1].lower() if found else None


def declared_format(folder: Path) -> str | None:
    """From the quantization_config of a Hugging Face folder, as "gptq, 4 bits"; None where it has none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        return None
    method, bits = found.get("quant_method"), found.get("bits")
    name = method if isinstance(method, str) else "quantised"
    return f"{name}, {bits} bits" if isinstance(bits, int) else name


def ir_format(folder: Path) -> str | None:
    """The element type of most bytes of an OpenVINO model's constants, as f16 or u4; None where that is not told."""
    num_bytes: Counter[str] = Counter()
    try:
        for _, layer in ElementTree.iterparse(folder / "openvino_model.xml"):
            data = layer.find("data") if layer.get("type") == "Const" else None
            if data is not None and "element_type" in data.attrib:
                num_bytes[data.attrib["element_type"]] += int(data.get("size", "0"))
    except (OSError, ValueError, ElementTree.ParseError):
        return None
    return num_bytes.most_common(1)[0][0] if num_bytes else None


def is_quantised(weights: object) -> bool:
    """Whether weights of that name are something else than floating-point numbers; False where none is told."""
    return isinstance(weights, str) and weights.lower() not in _UNQUANTISED

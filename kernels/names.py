"""Names by which devices, dtypes, formats of weights, kernels and attentions are chosen; no torch is imported."""

import re

from sleb.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTIZED = ("int8", "int4")
KV_DTYPES = ("auto", "int8", "fp8")
FILE = "file"  # the format of weights that a quantised checkpoint has
KERNELS = ("triton", "torch", "cpu")
ATTENTION_BACKENDS = ("triton", "flash", "torch")


def check_device(name: str) -> None:
    """Raises ConfigError for what is not written as a device; whether it is there is not looked at."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", name):
        raise ConfigError(f"device '{name}' is not known; choose one of: auto, cpu, cuda, cuda:N")

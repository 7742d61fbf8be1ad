"""The device, the dtypes and the formats of weights that options name."""

from __future__ import annotations

import logging
from functools import cache

import torch

from sleb.errors import ConfigError
from sleb.kernels.names import DTYPE_ALIASES, DTYPES, FILE, check_device
from sleb.kernels.quantization import WEIGHT_FORMATS, WeightFormat

logger = logging.getLogger("sleb.engine")

AS_STORED = ("auto", FILE)  # what `weights` is where a quantised checkpoint keeps its bits


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA GPU, else the CPU. Raises ConfigError if it is absent."""
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        why, remedy = f"torch sees {count} CUDA GPUs", f"cuda:0 to cuda:{count - 1}" if count else "cpu"
        if torch.version.cuda is None:
            why, remedy = f"torch {torch.__version__} is built without CUDA", "cpu, or install a CUDA build"
        raise ConfigError(f"device '{name}' is not on this machine ({why}); try {remedy}")
    return device


def make_current(device: torch.device) -> None:
    """Makes a GPU the one on which this thread's streams and events are made and Triton launches."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def resolve_dtype(
    name: str, weights: str, checkpoint: str | None, device: torch.device, *, wide_range: bool = False
) -> torch.dtype:
    """The dtype of activations, and of weights that are not quantised.

    `weights` if it names a dtype, else `name`, else the checkpoint's. In place of the checkpoint's bfloat16 a GPU that
    has none gets float16, or float32 for a model of wide_range, and says so. Raises ConfigError for one that is asked
    of such a GPU: it would compute it by other numbers' instructions, many times slower.
    """
    for choice in (weights, name, checkpoint):
        choice = DTYPE_ALIASES.get(choice or "", choice)
        if choice in DTYPES:
            break
    else:
        return torch.float32
    lacking = _lacks_bfloat16(device) if choice == "bfloat16" else None
    instead = "float32" if wide_range else "float16"
    if lacking is None:
        dtype: torch.dtype = getattr(torch, choice)
        return dtype
    if choice in {DTYPE_ALIASES.get(asked, asked) for asked in (weights, name)}:
        raise ConfigError(f"dtype 'bfloat16' cannot be had: {lacking}; use --dtype auto or {instead}")
    _say_once(f"{lacking}: {instead} takes the place of the checkpoint's bfloat16")
    return torch.float32 if wide_range else torch.float16


def _lacks_bfloat16(device: torch.device) -> str | None:
    """Why a device has no instructions for bfloat16; None: it has, or it is a CPU, whose kernels know what to do."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"the GPU {device} has compute capability {major}.{minor}, and bfloat16 needs 8.0"


@cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


def resolve_weight_format(weights: str) -> WeightFormat | None:
    """How `weights` says that matrices are quantised; None: they are not."""
    return WEIGHT_FORMATS.get(weights)

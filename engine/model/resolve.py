"""The device, the dtypes and the formats of weights that options name."""

from __future__ import annotations

import torch

from sleb.errors import ConfigError
from sleb.kernels.names import DTYPE_ALIASES, DTYPES, FILE, check_device
from sleb.kernels.quantization import WEIGHT_FORMATS, WeightFormat

AS_STORED = ("auto", FILE)  # what `weights` is where a quantised checkpoint keeps its bits


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA GPU, else the CPU. Raises ConfigError if it is absent."""
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda:0" if name == "cuda" else name)
    if device.type == "cuda" and (not torch.cuda.is_available() or device.index >= torch.cuda.device_count()):
        raise ConfigError(
            f"device '{name}' is not on this machine ({torch.cuda.device_count()} CUDA GPUs); try cpu"
        )
    return device


def make_current(device: torch.device) -> None:
    """Makes a GPU the one on which this thread's streams and events are made and Triton launches."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def resolve_dtype(name: str, weights: str, checkpoint: str | None) -> torch.dtype:
    """The dtype of activations, and of weights that are not quantised.

    `weights` if it names a dtype, else `name`, else the checkpoint's.
    """
    for choice in (weights, name, checkpoint):
        choice = DTYPE_ALIASES.get(choice or "", choice)
        if choice in DTYPES:
            dtype: torch.dtype = getattr(torch, choice)
            return dtype
    return torch.float32


def resolve_weight_format(weights: str) -> WeightFormat | None:
    """How `weights` says that matrices are quantised; None: they are not."""
    return WEIGHT_FORMATS.get(weights)

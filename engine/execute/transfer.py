"""Numbers to the device and back without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(
    values: Sequence[Any] | np.ndarray[Any, Any], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """values as a tensor of `dtype` on the device; the copy to a GPU goes from pinned memory, behind what runs there.

    Torch keeps the pinned memory until the copy is done.
    """
    tensor = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def send(values: np.ndarray[Any, Any], target: Tensor) -> None:
    """Copies values into a tensor of their dtype and length, behind what runs on its device."""
    source = torch.from_numpy(values)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)


class HostCopy:
    """A copy of tensors on the host, under way from now on; `read` waits for it."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        # Copies on a CPU too: what was given may be a buffer that the next step writes.
        self._copies = [_copy(tensor) if on_gpu else tensor.clone() for tensor in tensors]
        if on_gpu:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[list[Any]]:
        """The tensors' values as nested lists."""
        if self._event is not None:
            self._event.synchronize()
        return [copy.tolist() for copy in self._copies]


def _copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)

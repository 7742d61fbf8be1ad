"""What a device can do at most, measured: bytes copied or read a second, and operations of a matrix product.

The limits of the roofline model (Williams et al. 2009, doi 10.1145/1498765.1498785), measured in the same run as what
is held against them. A copy counts what it reads and writes; decoding on a CPU only reads, which is faster, so what the
threads of our CPU kernels read is measured too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from sleb.kernels.cpu.library import CpuKernels, CpuKernelsUnavailableError

# A GPU's buffer is past every cache; a CPU's is past those of most.
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_READ_BYTES = 1 << 29
# Rows, columns and inputs of the matrix product: large enough for the vendor's library to be at its best.
_MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}
_REPETITIONS = 5


@dataclass(frozen=True)
class Ceilings:
    """Medians of a second's work; a multiply and an add count two. read_…: None where that was not measured."""

    copy_bytes_per_second: float
    matrix_flops_per_second: float
    dtype: str
    read_bytes_per_second: float | None = None

    def floor_seconds(self, num_bytes: float, flops: float = 0) -> float:
        """The least time that so many bytes and operations take; bytes at the rate of reading, where it is known."""
        memory = self.read_bytes_per_second or self.copy_bytes_per_second
        return max(num_bytes / memory, flops / self.matrix_flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, read_threads: int = 0) -> Ceilings:
    """What a copy and a matrix product of `dtype` reach on `device`, and what `read_threads` of our CPU kernels read.

    Takes two copy buffers, less where a GPU has little left, and three matrices, and frees them.
    """
    num_bytes, size = _COPY_BYTES[device.type], _MATRIX_SIZE[device.type]
    if device.type == "cuda":
        num_bytes = min(num_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    # Written, because memory that only was asked for may not be there yet.
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copied = _rate(partial(target.copy_, source), device, 2 * num_bytes)
    del source, target
    # Random: the power that a GPU draws, and with it its clock, depends on the values.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    computed = _rate(partial(torch.mm, left, right, out=out), device, 2 * size**3)
    del left, right, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    read = None
    if read_threads:
        try:
            kernels = CpuKernels.load(read_threads)
            read = median([kernels.read_bandwidth(_READ_BYTES) * 1e9 for _ in range(_REPETITIONS + 1)][1:])
        except (CpuKernelsUnavailableError, MemoryError):
            pass  # copying stands for it
    return Ceilings(copied, computed, str(dtype).removeprefix("torch."), read)


def _rate(run: Callable[[], object], device: torch.device, work: int) -> float:
    calls = [run] * (10 if device.type == "cuda" else 1)
    seconds_of_calls(calls, device)  # uncounted: the first calls find caches and clocks cold
    return median(work / seconds_of_calls(calls, device) for _ in range(_REPETITIONS))


def seconds_of_calls(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call, the mean of `calls` made one after another; on a GPU by its own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / len(calls)

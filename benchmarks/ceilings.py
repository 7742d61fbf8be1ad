"""What a device can do at most, measured: bytes copied or read a second, and operations of a matrix product.

They stand for the two limits of the roofline model (Williams et al. 2009, doi 10.1145/1498765.1498785): no work is
done faster than its bytes are moved or its operations computed. A copy counts what it reads and what it writes.
Decoding on a CPU writes next to nothing, and reading alone is faster than copying: where our CPU kernels run, what
their threads read is measured too. Measured in the same run as what is held against them, so that clocks and
neighbours are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from sleb.kernels.cpu.library import CpuKernels, CpuKernelsUnavailableError

# A card's buffer is past every cache; a CPU's is past those of most.
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
_READ_BYTES = 1 << 29
# Rows, columns and inputs of the matrix product: large enough for the vendor's library to be at its best.
_MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}
_REPETITIONS = 5


@dataclass(frozen=True)
class Ceilings:
    """Medians of a second's work, and every sample.

    Attributes:
        copy_bytes_per_second: read and written, by a copy on the device.
        matrix_flops_per_second: of a matrix product of `dtype`; a multiply and an add count two.
        read_bytes_per_second: by the threads of our CPU kernels; None where that was not measured.
    """

    copy_bytes_per_second: float
    matrix_flops_per_second: float
    copy_samples: list[float]
    matrix_samples: list[float]
    dtype: str
    read_bytes_per_second: float | None = None
    read_samples: list[float] = field(default_factory=list)

    @property
    def memory_bytes_per_second(self) -> float:
        """What bounds reading: the rate of reading where it is known, else of copying."""
        return self.read_bytes_per_second or self.copy_bytes_per_second

    def floor_seconds(self, num_bytes: float, flops: float = 0) -> float:
        """The least time that so many bytes and operations take."""
        return max(num_bytes / self.memory_bytes_per_second, flops / self.matrix_flops_per_second)


def with_read_ceiling(ceilings: Ceilings, num_threads: int, repetitions: int = _REPETITIONS) -> Ceilings:
    """The same with the rate at which `num_threads` threads of our CPU kernels read; unchanged where none can run."""
    try:
        kernels = CpuKernels.load(num_threads)
        samples = [kernels.read_bandwidth(_READ_BYTES) * 1e9 for _ in range(repetitions + 1)][1:]
    except (CpuKernelsUnavailableError, MemoryError):
        return ceilings
    return replace(ceilings, read_bytes_per_second=median(samples), read_samples=samples)


def measure_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    *,
    copy_bytes: int | None = None,
    matrix_size: int | None = None,
    repetitions: int = _REPETITIONS,
) -> Ceilings:
    """Both ceilings of `device`, the matrix product of `dtype`.

    Takes two copy buffers of copy_bytes, less where a card has little left, and three matrices, and frees them.
    """
    copy_bytes = copy_bytes or _COPY_BYTES[device.type]
    if device.type == "cuda":
        copy_bytes = min(copy_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    copy = copy_rates(device, copy_bytes, repetitions)
    matrix = matrix_rates(device, dtype, matrix_size or _MATRIX_SIZE[device.type], repetitions)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Ceilings(median(copy), median(matrix), copy, matrix, str(dtype).removeprefix("torch."))


def copy_rates(device: torch.device, num_bytes: int, repetitions: int = _REPETITIONS) -> list[float]:
    """Bytes read and written a second, of copies of `num_bytes` bytes."""
    # Written, because memory that only was asked for may not be there yet.
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    calls = 10 if device.type == "cuda" else 1
    return _rates(lambda: target.copy_(source), device, 2 * num_bytes, calls, repetitions)


def matrix_rates(
    device: torch.device, dtype: torch.dtype, size: int, repetitions: int = _REPETITIONS
) -> list[float]:
    """Operations a second, of products of square matrices of `size` rows."""
    # Random: the power that a card draws, and with it its clock, depends on the values.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    calls = 10 if device.type == "cuda" else 1
    return _rates(lambda: torch.mm(left, right, out=out), device, 2 * size**3, calls, repetitions)


def _rates(
    run: Callable[[], object], device: torch.device, work: int, calls: int, repetitions: int
) -> list[float]:
    seconds_of_calls([run] * calls, device)  # uncounted: the first calls find caches and clocks cold
    return [work / seconds_of_calls([run] * calls, device) for _ in range(repetitions)]


def seconds_of_calls(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Seconds of one call, the mean of `calls` made one after another; on a card by its own clock."""
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

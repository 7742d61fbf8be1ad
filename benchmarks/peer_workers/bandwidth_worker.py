"""How fast the threads of sleb's kernels read memory; a process of its own, whose buffer no engine's peak counts."""

from __future__ import annotations

from typing import Any

from sleb.kernels.cpu.library import CpuKernels


class Engine:
    """The kernels without a model."""

    def __init__(self, threads: int) -> None:
        self._kernels = CpuKernels.load(threads)
        self.facts: dict[str, Any] = {"level": self._kernels.level}

    def read(self, num_bytes: int) -> dict[str, Any]:
        """GB/s (10⁹ bytes) of one pass over num_bytes."""
        return {"gb_per_second": self._kernels.read_bandwidth(num_bytes)}

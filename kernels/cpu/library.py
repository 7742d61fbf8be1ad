"""The C kernels as Python sees them: memory, packed weights, threads, and the entry points of an instruction set."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sleb.kernels.cpu.build import find_library, why_unavailable
from sleb.kernels.cpu.features import cpu_features, isa_level
from sleb.kernels.cpu.records import HEADER, Linear, Sample
from sleb.kernels.quantization import GROUP, GroupedWeight, Int8Weight, Weight
from sleb.kernels.reference.ops import Numbers

F32, F16, BF16, I8, I4 = (HEADER.constants[f"SLEB_{name}"] for name in ("F32", "F16", "BF16", "I8", "I4"))
I8_GROUPS, I8_HALVES = HEADER.constants["SLEB_I8_GROUPS"], HEADER.constants["SLEB_I8_HALVES"]
ATTENTION, MLP, PATCH = (HEADER.constants[f"SLEB_{name}"] for name in ("ATTENTION", "MLP", "PATCH"))
FORMATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}
NORMS = {"rms": HEADER.constants["SLEB_NORM_RMS"], "layer": HEADER.constants["SLEB_NORM_LAYER"]}
ACTIVATIONS = {
    "silu": HEADER.constants["SLEB_SILU"],
    "swish": HEADER.constants["SLEB_SILU"],
    "relu": HEADER.constants["SLEB_RELU"],
    "gelu": HEADER.constants["SLEB_GELU"],
    "gelu_new": HEADER.constants["SLEB_GELU_TANH"],
    "gelu_pytorch_tanh": HEADER.constants["SLEB_GELU_TANH"],
    "relu2": HEADER.constants["SLEB_RELU2"],
    "clamped_swiglu": HEADER.constants["SLEB_CLAMPED_SWIGLU"],
}
NOT_SHARED, SHARED, SHARED_GATED = (
    HEADER.constants[f"SLEB_{name}"] for name in ("NOT_SHARED", "SHARED", "SHARED_GATED")
)
PAGE_SIZES = (16, 32, 64, 128)  # a page must hold whole columns of 16 keys and divide a chunk of 128
EMULATED = "amx-emulated"
# ns for which an idle thread looks for work before it sleeps. Waking it takes some 100 µs, and a fast model's steps are
# 300 µs of bookkeeping apart.
_SPIN_NS = 2_000_000
_CHUNK = 64 << 20
_ENOUGH_CORES = 4
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class CpuKernelsUnavailableError(Exception):
    """The C kernels cannot run here; the message says why."""


class Arena:
    """Memory in huge pages, handed out piece by piece and freed together with the arena."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._next = self._end = 0

    def take(self, num_bytes: int) -> int:
        """The address of num_bytes zeroed bytes, aligned to 64. Raises MemoryError."""
        size = -(-num_bytes // 64) * 64
        if self._next + size > self._end:
            self._next, self._end = self.map(max(size, _CHUNK), huge=True)
        address, self._next = self._next, self._next + size
        return address

    def map(self, num_bytes: int, huge: bool) -> tuple[int, int]:
        """A mapping of its own, from its first address to its end; physical memory comes as it is touched."""
        address = self._library.sleb_map(num_bytes, huge)
        if not address:
            raise MemoryError(f"cannot allocate {num_bytes} bytes for the CPU kernels")
        weakref.finalize(self, self._library.sleb_unmap, address, num_bytes)
        return address, address + num_bytes


@dataclass
class CpuKernels:
    """The kernels of one instruction set, and the threads that run them.

    Attributes:
        level: avx512, avx512bf16, amx or amx-emulated.
        isa: the entry points; forward.h and sleb_cpu.h document them.
    """

    level: str
    num_threads: int
    library: Any
    isa: Any
    pool: int
    arena: Arena = field(init=False)
    _scratch: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.arena = Arena(self.library)
        self._scratch = torch.empty(0, dtype=torch.uint8)

    @classmethod
    def load(
        cls, num_threads: int | None = None, level: str | None = None, cpus: Sequence[int] | None = None
    ) -> CpuKernels:
        """The kernels for this processor.

        num_threads: the caller included; None: one a physical core that the process may use. level: None for the
        best one. cpus: the processor that each thread is pinned to, the caller's first; None: the system decides.
        Raises CpuKernelsUnavailableError.
        """
        level = level or isa_level()
        if level == "none":
            raise CpuKernelsUnavailableError(_why_no_level())
        path = find_library()
        if path is None:
            raise CpuKernelsUnavailableError(why_unavailable() or "the library is not there")
        try:
            library: Any = ctypes.CDLL(str(path))
        except OSError as error:
            raise CpuKernelsUnavailableError(f"{path} cannot be loaded: {error}") from None
        for name, (result, arguments) in HEADER.functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        isa = library.sleb_select(level.encode())
        if not isa and level == "amx":  # the system does not let this process use the tiles
            level = "avx512bf16"
            isa = library.sleb_select(level.encode())
        if not isa:
            raise CpuKernelsUnavailableError(f"there are no kernels for '{level}'")
        count = num_threads or (len(cpus) if cpus else default_num_threads())
        pool = library.sleb_pool_create(count, int32_array(cpus) if cpus else None, _SPIN_NS)
        if not pool:
            raise CpuKernelsUnavailableError("out of memory while starting threads")
        kernels = cls(level, library.sleb_pool_num_threads(pool), library, isa.contents, pool)
        weakref.finalize(kernels, library.sleb_pool_destroy, pool)
        return kernels

    def pack(self, weight: Weight, bias: Tensor | None = None, gated: bool = False) -> Linear:
        """Weight [n, k], on the CPU, packed into the arena; its tensors may go afterwards.

        gated: the first half of its rows is gate, the other half up.
        """
        rows, columns = weight.shape
        record = Linear(format=format_of(weight), n=rows, k=columns, gated=gated)
        if isinstance(weight, GroupedWeight):
            record.group = weight.groups.size
            record.base = HEADER.constants[f"SLEB_{weight.groups.base.upper()}"]
        record.data = self.arena.take(self.library.sleb_packed_bytes(record))
        values, scale, minimum = _parts(weight)
        self.library.sleb_pack(
            self.pool, record, values.data_ptr(), _address(scale), _address(minimum), record.data
        )
        if isinstance(weight, Int8Weight):
            record.scale = self._pack_vector(record, weight.scale)
        if bias is not None:
            record.bias = self._pack_vector(record, bias)
        return record

    def keep(self, vector: Tensor | None) -> int | None:
        """The address of a float32 copy of a small tensor, or None."""
        if vector is None:
            return None
        values = vector.detach().to(torch.float32).contiguous()
        address = self.arena.take(values.nbytes)
        ctypes.memmove(address, values.data_ptr(), values.nbytes)
        return address

    def read_bandwidth(self, num_bytes: int = 512 << 20) -> float:
        """GB/s (10⁹ bytes) at which all threads read num_bytes of memory, once: what bounds a small batch."""
        num_bytes = max(num_bytes >> 20, 1) << 20
        arena = Arena(self.library)
        address, _ = arena.map(num_bytes, huge=True)
        ctypes.memset(address, 1, num_bytes)
        begin = time.perf_counter()
        self.library.sleb_read(self.pool, address, num_bytes)
        return num_bytes / (time.perf_counter() - begin) / 1e9

    def sample(
        self,
        logits: Tensor,
        temperature: Numbers,
        top_k: Numbers,
        top_p: Numbers,
        min_p: Numbers,
        points: Numbers,
    ) -> Tensor:
        """As `sleb.kernels.reference.ops.sample`, without sorting.

        Not thread-safe; keeps its scratch for the next call.
        """
        assert logits.dtype == torch.float32 and logits.device.type == "cpu"
        logits = logits.contiguous()
        num_rows, vocab_size = logits.shape
        chosen = torch.empty(num_rows, dtype=torch.int64)
        temperatures, top_ps, min_ps, uniforms = numbers = [
            array("d", map(float, column)) for column in (temperature, top_p, min_p, points)
        ]
        counts = array("i", (min(int(count), vocab_size) if count > 0 else 0 for count in top_k))
        assert {num_rows} == {len(counts), *map(len, numbers)}, "one number a row"
        size = self.library.sleb_sample_bytes(vocab_size) * self.num_threads
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        record = Sample(
            logits=logits.data_ptr(),
            temperature=temperatures.buffer_info()[0],
            top_p=top_ps.buffer_info()[0],
            min_p=min_ps.buffer_info()[0],
            points=uniforms.buffer_info()[0],
            top_k=counts.buffer_info()[0],
            chosen=chosen.data_ptr(),
            scratch=self._scratch.data_ptr(),
            pool=self.pool,
            num_rows=num_rows,
            vocab_size=vocab_size,
        )
        self.isa.sample(record)
        return chosen

    def _pack_vector(self, record: Linear, vector: Tensor) -> int:
        values = vector.to(torch.float32).contiguous()
        address = self.arena.take(4 * self.library.sleb_num_packed_outputs(record))
        self.library.sleb_pack_vector(record, values.data_ptr(), address)
        return address


def format_of(weight: Weight) -> int:
    """The number of a weight's element format in sleb_cpu.h."""
    if isinstance(weight, Int8Weight):
        return I8
    if isinstance(weight, GroupedWeight):
        return I4 if weight.groups.bits == 4 else I8_GROUPS if weight.groups.size % GROUP == 0 else I8_HALVES
    return FORMATS[weight.dtype]


def _parts(weight: Weight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if isinstance(weight, GroupedWeight):
        minimum = None if weight.minimum is None else weight.minimum.contiguous()
        return weight.values.contiguous(), weight.scale.contiguous(), minimum
    if isinstance(weight, Int8Weight):
        return weight.values.contiguous(), None, None
    return weight.detach().contiguous(), None, None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def default_num_threads() -> int:
    """One thread a physical core that this process may use, since two on one core share what a kernel needs whole.

    Below four cores every logical processor counts: so few cores cannot keep enough reads under way to use the
    memory's bandwidth. No more than a container's quota of processor time pays for: threads that wait for one
    another must all run.
    """
    features = cpu_features()
    count = features.num_cores if features.num_cores >= _ENOUGH_CORES else num_usable_cpus()
    try:
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # no control groups, or "max": no quota
        return max(1, count)


def num_usable_cpus() -> int:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _why_no_level() -> str:
    features = cpu_features()
    if os.environ.get("SLEB_CPU_ISA") == "none":
        return "SLEB_CPU_ISA is none"
    return f"{features.model or features.arch} has no AVX-512 with VNNI"


def int32_array(values: Sequence[int]) -> Any:
    """A C array of 32-bit integers."""
    return (ctypes.c_int32 * len(values))(*values)

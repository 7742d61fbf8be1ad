"""What every Triton kernel of this folder shares: the interpreter, block sizes, the numbers of a GPU.

Triton decides when a kernel is defined whether it is compiled or interpreted: `TRITON_INTERPRET=1` must be set before
these modules are imported. Interpreted kernels run on a CPU, slowly, and give what the compiled ones give.
"""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core
from triton.language.extra import cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")

# Streaming multiprocessors that the interpreter claims: few, so that its grids stay small.
_INTERPRETED_PROCESSORS = 4
_LEAST_SHARED = 99 << 10  # of compute capabilities 8.6, 8.9 and 12.0 (CUDA programming guide)
_FIRST_DEPENDENT = 90  # compute capability, times ten, that programmatic dependent launch came with
_COMPILED = tl.constexpr(not INTERPRETED)
NUM_COUNTERS = 1 << 18


def power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least `number` and `least`: Triton's blocks have no other sizes."""
    return 1 << (max(number, least, 1) - 1).bit_length()


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a GPU's shared memory that a program may have."""
    if device.type != "cuda":
        return 1 << 30  # the interpreter needs none
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED))


def counters(device: torch.device) -> Tensor:
    """[NUM_COUNTERS] int32 zeros, by which programs of a launch find out which of them arrives last.

    Launches of a stream follow one another and share them: each leaves them at 0. Another stream has its own, as where
    one engine captures its graphs while another one serves on the same GPU.
    """
    return _counters(device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@cache
def _counters(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)


@cache
def _dependent_launch(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= _FIRST_DEPENDENT


def pdl_launch(device: torch.device) -> dict[str, Any]:
    """Options of a launch that may start before the one ahead of it has ended; its kernel calls `wait_for_previous`.

    Programmatic dependent launch, of compute capability 9.0 and up (CUDA programming guide).
    """
    return {"launch_pdl": True} if _dependent_launch(device) else {}


def _knows_dependent(semantic: Any) -> bool:
    """Of the target that is compiled for, which need not be the GPU that is there."""
    return int(re.sub(r"\D", "", str(semantic.builder.options.arch))) >= _FIRST_DEPENDENT


@core.extern
def _wait(_semantic: Any = None) -> None:
    if _knows_dependent(_semantic):
        cuda.gdc_wait(_semantic=_semantic)


@core.extern
def _launch(_semantic: Any = None) -> None:
    if _knows_dependent(_semantic):
        cuda.gdc_launch_dependents(_semantic=_semantic)


@triton.jit
def wait_for_previous():
    """Until all that the launches ahead of this one wrote is there: first of all on every path of a kernel, before it
    reads or writes what they might."""
    if _COMPILED:
        _wait()


@triton.jit
def launch_next():
    """The next launch may start once all programs have come this far; it waits by itself for what they write."""
    if _COMPILED:
        _launch()


@triton.jit
def prefetch(pointers):
    """The lines of L2 that hold what pointers, all of them inside of a tensor, point to; nothing where interpreted."""
    if _COMPILED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0",
            "=r,l",
            [pointers.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def launch_options(num_warps: int = 4, num_stages: int | None = None) -> dict[str, Any]:
    """What every launch says beside its arguments: warps, stages (None: Triton's own number) and, since from Triton
    3.10 on that is no longer the default, that a product and a sum may be one instruction with one rounding."""
    stages = {} if num_stages is None else {"num_stages": num_stages}
    return {"num_warps": num_warps, "enable_fp_fusion": True, **stages}


def dot_precision(dtype: torch.dtype) -> str:
    """How `multiply` computes products of `dtype`: float32 in full, where Triton's default would be tf32."""
    if INTERPRETED:
        return "widened"
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr):
    """The matrix product a · b in float32. The interpreter gets float32: it would multiply bit patterns of bfloat16."""
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def floats(integers, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Integers of 8 bits in `dtype`. The interpreter makes float32 of them first: it would give bfloat16 their bits."""
    if PRECISION == "widened":
        integers = integers.to(tl.float32)
    return integers.to(dtype)


def check_contiguous(**tensors: Tensor | None) -> None:
    """Asserts that kernels may walk the tensors row by row."""
    for name, tensor in tensors.items():
        assert tensor is None or tensor.is_contiguous(), f"{name} is not contiguous"

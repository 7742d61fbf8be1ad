"""What this processor offers to the C kernels: read once from /proc/cpuinfo, never raising where there is none."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sleb.errors import ConfigError

# From the least to the most; each needs what the ones before it need.
LEVELS = ("none", "avx512", "avx512bf16", "amx")
CPUINFO = Path("/proc/cpuinfo")
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@dataclass(frozen=True)
class CpuFeatures:
    """The instruction sets that the kernels use, and the cores.

    The AMX fields say what the processor has. Whether the system lets a process use it is known only after
    asking, which the C side does (arch_prctl ARCH_REQ_XCOMP_PERM).
    """

    arch: str  # as platform.machine() names it
    model: str  # "" where the system does not tell
    num_cores: int  # physical cores that this process may run on
    avx512: bool = False  # F, BW, VL and DQ
    vnni: bool = False  # AVX512-VNNI
    bf16: bool = False  # AVX512-BF16
    amx_bf16: bool = False
    amx_int8: bool = False

    @property
    def level(self) -> str:
        """The highest of LEVELS that this processor reaches."""
        if not (self.avx512 and self.vnni):
            return "none"
        if not self.bf16:
            return "avx512"
        return "amx" if self.amx_bf16 and self.amx_int8 else "avx512bf16"


@cache
def cpu_features() -> CpuFeatures:
    """The features of the machine that this runs on."""
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else None
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return parse_cpuinfo(text, platform.machine(), allowed)


def parse_cpuinfo(text: str, arch: str, allowed: Collection[int] | None = None) -> CpuFeatures:
    """The features of a machine whose /proc/cpuinfo reads `text`; `allowed` are the CPUs that count, default all."""
    processors = [_fields(block) for block in text.split("\n\n")]
    processors = [fields for fields in processors if fields.get("processor", "").isdecimal()]
    first = processors[0] if processors else {}
    # Arm has "Features" instead, in which none of these names appears.
    flags = set(first.get("flags", "").split()) if arch in ("x86_64", "AMD64") else set()
    has_tiles = "amx_tile" in flags
    return CpuFeatures(
        arch=arch,
        model=first.get("model name", ""),
        num_cores=_num_cores(processors, allowed),
        avx512=flags >= _AVX512,
        vnni="avx512_vnni" in flags,
        bf16="avx512_bf16" in flags,
        amx_bf16=has_tiles and "amx_bf16" in flags,
        amx_int8=has_tiles and "amx_int8" in flags,
    )


def isa_level(features: CpuFeatures | None = None) -> str:
    """The level to run at: the processor's, or that of SLEB_CPU_ISA if it is lower.

    The variable is a ceiling, for tests and comparisons: it cannot raise what the processor has. Raises
    ConfigError when it is none of LEVELS.
    """
    reached = (features or cpu_features()).level
    ceiling = os.environ.get("SLEB_CPU_ISA") or LEVELS[-1]
    if ceiling not in LEVELS:
        raise ConfigError(f"SLEB_CPU_ISA is '{ceiling}'; choose one of: {', '.join(reversed(LEVELS))}")
    return min(reached, ceiling, key=LEVELS.index)


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, colon, value in pairs if colon}


def _num_cores(processors: list[dict[str, str]], allowed: Collection[int] | None) -> int:
    """Hardware threads of one core share its "physical id" and "core id"; where there are none, each counts."""
    mine = [fields for fields in processors if allowed is None or int(fields["processor"]) in allowed]
    cores = {(fields.get("physical id"), fields.get("core id", fields["processor"])) for fields in mine}
    return len(cores) or (len(allowed) if allowed is not None else os.cpu_count() or 1)

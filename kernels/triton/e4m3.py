"""Keys and values in bytes: e4m3 by integer operations, which every GPU has and the interpreter too (Triton).

The format is that of Micikevicius et al. 2022 (arXiv 2209.05433) and of torch.float8_e4m3fn: sign, four bits of
exponent with a bias of 7, three of fraction; no infinities, and NaN where all but the sign is set. What is stored is
clamped to the largest number, 448, and rounded to nearest, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """The bytes of float32 numbers."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    kept = tl.minimum(magnitude, 0x43E00000)  # 448
    # A carry out of the fraction is one more of the exponent; its bias falls from 127 to 7.
    normal = ((kept + 0x7FFFF + ((kept >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 numbers are multiples of 2^-9: those of a float32 sum with 2^14, whose last bit is as much.
    subnormal = (kept.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    made = tl.where(kept < 0x3C800000, subnormal, normal)
    made = tl.where(magnitude > 0x7F800000, 0x7F, made)
    return (made | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(stored, dtype: tl.constexpr):
    """Bytes in `dtype`, exactly: among the bits of a float16 they are 2^-8 of what they stand for."""
    wide = stored.to(tl.int16)
    magnitude = wide & 0x7F
    half = (((wide & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True)
    return tl.where(magnitude == 0x7F, float("nan"), half.to(tl.float32) * 256.0).to(dtype)

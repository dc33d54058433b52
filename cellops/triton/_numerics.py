"""What kernels share: products, rounding, the sigmoid."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(left, right, sum, PRECISION: tl.constexpr):
    """sum + left @ right, in float32. The interpreter would multiply bfloat16's bit patterns, so it gets float32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sum, input_precision=PRECISION)


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """float32 values rounded to DTYPE, to the nearest and even. The interpreter itself truncates to bfloat16."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(DTYPE)

"""The activations of `group_conv1x1` and `depthwise_conv2d`, and their slopes; ACTIVATION is as in the ops."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of float32 values."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, x)  # NaN stays, as in the others
    elif ACTIVATION == "relu6":
        return tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))
    elif ACTIVATION == "gelu":
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "hardswish":
        return x * tl.where(x <= -3, 0.0, tl.where(x >= 3, 6.0, x + 3)) / 6
    else:
        return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The activation's derivative; at the kinks PyTorch's."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "relu6":
        return tl.where((x <= 0) | (x >= 6), 0.0, 1.0)
    elif ACTIVATION == "gelu":
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "silu":
        sigmoid = tl.sigmoid(x)
        return sigmoid * (1 + x * (1 - sigmoid))
    elif ACTIVATION == "hardswish":
        return tl.where(x <= -3, 0.0, tl.where(x < 3, x / 3 + 0.5, 1.0))
    else:
        return tl.full(x.shape, 1.0, tl.float32)

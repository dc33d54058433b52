"""Spatial attention: y = x * sigmoid(conv(x)), or of CBAM's maximum and mean over the channels.   Woo et al. 2018.

An image is read and written once, in bands of rows that stay in the cache between the map and the scaling. Saved for
backward: the arguments; the map is computed again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.ops._registration import expect
from cellops.reference import spatial_attention as reference


def spatial_attention(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mode: str = "conv",
    *,
    backend: str | None = None,
) -> Tensor:
    """Scale each pixel by a factor between 0 and 1: the sigmoid of a convolution with one output channel.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        weight: [1, C, k, k] for "conv", [1, 2, k, k] for "pool", the maximum's weights first (timm has the mean's
            first); k odd, with zero padding.
        bias: [1], or None.
        mode: what the convolution sees: "conv", the channels; "pool", their maximum and their mean.
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, C, H, W] of the input's dtype.

    Raises:
        ValueError: a shape, `mode` or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    return _operator(input, weight, bias, mode, backend)


def _check(call: Call) -> tuple[int, ...]:
    input, weight, bias = call.shapes
    (mode,) = call.settings
    assert input is not None and weight is not None
    if mode not in reference.MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, reference.MODES))}, got {mode!r}")
    sources = input[1] if mode == "conv" else 2
    square = len(weight) == 4 and weight[2] == weight[3] and weight[3] % 2 == 1
    if not square or weight[0] != 1 or weight[1] != sources:
        raise ValueError(f"weight must have shape (1, {sources}, k, k) with an odd k, got {tuple(weight)}")
    expect("bias", bias, (1,))
    return tuple(input)


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), weight, _ = call.shapes
    return _native.library().SpatialAttentionParams(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        kernel=weight[3],
        pool=call.settings[0] == "pool",
        **common,
    )


_operator = Operator(
    "spatial_attention",
    "input weight bias?",
    "str mode",
    check=_check,
    params=_params,
    formula=reference.spatial_attention,
    formula_of_backward=reference.spatial_attention_backward,
)

"""Depthwise convolution with what follows it: y = act(scale * dwconv(x, weight) + shift).

Fused: convolution, affine map and activation in one reading and one writing. With batch statistics x is read twice; the
convolution's result is never stored. Saved for backward: the arguments, and the batch's mean and variance.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.ops._registration import expect, expect_eps, expect_window
from cellops.ops.group_conv1x1 import ACTIVATION_CODES
from cellops.reference import depthwise_conv2d as reference


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel by itself with stride 1, scale, shift and activate.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        weight: [C, 1, k, k], k odd; zero padding keeps the size.
        scale: [C], times the convolution, or None for 1. Like `shift`, float32 beside a half input too.
        shift: [C], added after that, or None for 0.
        activation: "none", "relu", "relu6", "gelu" (with the error function), "silu" or "hardswish".
        backend: "cpu", "triton" or "reference", which then runs forward and backward or raises. None takes the best.
            Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, C, H, W] of the input's dtype.

    Raises:
        ValueError: a shape, `activation` or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    return _operator(input, weight, scale, shift, activation, backend)


def depthwise_conv2d_batch_norm(
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "none",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`depthwise_conv2d` in training: the convolution is normalised by its own mean and variance over the batch.

    Args:
        input, weight, activation, backend: as for `depthwise_conv2d`.
        gamma: [C], the normalisation's weight, or None for 1. Like `beta`, float32 beside a half input too.
        beta: [C], its bias, or None for 0.
        eps: added to the variance, at least 0.

    Returns:
        [N, C, H, W]; mean and biased variance [C] of the convolution, float32 or wider and without gradients.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `depthwise_conv2d`.
    """
    return _batch_norm_operator(input, weight, gamma, beta, eps, activation, backend)


def _check(call: Call) -> tuple[int, ...]:
    input, weight, *affine = call.shapes
    *eps, activation = call.settings
    assert input is not None and weight is not None
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATION_CODES))}, got {activation!r}")
    if eps:
        expect_eps(eps[0])
    expect_window(weight, input[1])
    for name, shape in zip(("gamma", "beta") if eps else ("scale", "shift"), affine, strict=True):
        expect(name, shape, (input[1],))
    return tuple(input)


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), weight, *_ = call.shapes
    *eps, activation = call.settings
    return _native.library().DepthwiseConv2dParams(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        kernel=weight[2],
        activation=ACTIVATION_CODES[activation],
        eps=eps[0] if eps else 0.0,
        **common,
    )


_operator = Operator(
    "depthwise_conv2d",
    "input weight scale?+ shift?+",
    "str activation",
    check=_check,
    params=_params,
    formula=reference.depthwise_conv2d,
    formula_of_backward=reference.depthwise_conv2d_backward,
)

_batch_norm_operator = Operator(
    "depthwise_conv2d_batch_norm",
    "input weight gamma?+ beta?+",
    "float eps, str activation",
    check=_check,
    params=_params,
    formula=reference.depthwise_conv2d_batch_norm,
    formula_of_backward=reference.depthwise_conv2d_batch_norm_backward,
    statistics="mean var",
)

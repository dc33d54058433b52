"""The funnel activation: y = max(x, scale * dwconv(x, weight) + shift).   Ma et al. 2020, eq. 3.

Fused: convolution, affine map and maximum in one reading and one writing. With batch statistics x is read twice; the
convolution's result is never stored. Saved for backward: the arguments, and the batch's mean and variance.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.ops._registration import expect, expect_eps, expect_window
from cellops.reference import frelu as reference


def frelu(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Take the larger of each value and a depthwise convolution around it.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        weight: [C, 1, k, k], k odd; stride 1, zero padding that keeps the size.
        scale: [C], times the convolution, or None for 1. Like `shift`, float32 beside a half input too.
        shift: [C], added after that, or None for 0.
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, C, H, W] of the input's dtype. Where both sides are equal each gets half of the gradient.

    Raises:
        ValueError: a shape or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    return _operator(input, weight, scale, shift, backend)


def frelu_batch_norm(
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`frelu` in training: the convolution is normalised by its own mean and variance over the batch.

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k], k odd.
        gamma: [C], the normalisation's weight, or None for 1. Like `beta`, float32 beside a half input too.
        beta: [C], its bias, or None for 0.
        eps: added to the variance, at least 0.
        backend: as for `frelu`.

    Returns:
        [N, C, H, W]; mean and biased variance [C] of the convolution, float32 or wider and without gradients.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `frelu`.
    """
    return _batch_norm_operator(input, weight, gamma, beta, eps, backend)


def _check(call: Call) -> tuple[int, ...]:
    input, weight, *affine = call.shapes
    assert input is not None and weight is not None
    channels = input[1]
    if call.settings:
        expect_eps(call.settings[0])
    expect_window(weight, channels)
    for name, shape in zip(("gamma", "beta") if call.settings else ("scale", "shift"), affine, strict=True):
        expect(name, shape, (channels,))
    return tuple(input)


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), weight, *_ = call.shapes
    return _native.library().FreluParams(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        kernel=weight[2],
        eps=call.settings[0] if call.settings else 0.0,
        **common,
    )


_operator = Operator(
    "frelu",
    "input weight scale?+ shift?+",
    "",
    check=_check,
    params=_params,
    formula=reference.frelu,
    formula_of_backward=reference.frelu_backward,
)

_batch_norm_operator = Operator(
    "frelu_batch_norm",
    "input weight gamma?+ beta?+",
    "float eps",
    check=_check,
    params=_params,
    formula=reference.frelu_batch_norm,
    formula_of_backward=reference.frelu_batch_norm_backward,
    statistics="mean var",
)

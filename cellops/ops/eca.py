"""Efficient channel attention: y = x * sigmoid(conv1d over channels(mean over pixels)).   Wang et al. 2020.

An image is read twice and written once; while it stays in the cache the second reading is free. Saved for backward:
the arguments; the means and scales are computed again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.reference import eca as reference


def eca(input: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Scale each channel by a factor between 0 and 1 drawn from the means of the channel and its neighbours.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        weight: [1, 1, k], k odd: a convolution over the channels with zero padding.
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, C, H, W] of the input's dtype.

    Raises:
        ValueError: a shape or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    return _operator(input, weight, backend)


def _check(call: Call) -> tuple[int, ...]:
    input, weight = call.shapes
    assert input is not None and weight is not None
    if len(weight) != 3 or weight[0] != 1 or weight[1] != 1 or weight[2] % 2 != 1:
        raise ValueError(f"weight must have shape (1, 1, k) with an odd k, got {tuple(weight)}")
    return tuple(input)


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), weight = call.shapes
    return _native.library().EcaParams(batch=batch, channels=channels, pixels=height * width, taps=weight[2], **common)


_operator = Operator(
    "eca",
    "input weight",
    "",
    check=_check,
    params=_params,
    formula=reference.eca,
    formula_of_backward=reference.eca_backward,
)

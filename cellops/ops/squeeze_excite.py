"""Squeeze-and-excitation: y = x * gate(fc2(act(fc1(mean over pixels)))).   Hu et al. 2018.

An image is read twice and written once; while it stays in the cache the second reading is free. Saved for backward:
the arguments; the means and scales are computed again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.ops._registration import expect
from cellops.reference import squeeze_excite as reference

ACTIVATION_CODES = {"relu": 1, "silu": 4}
GATE_CODES = {"sigmoid": 0, "hard_sigmoid": 1}


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    act: str = "relu",
    gate: str = "sigmoid",
    backend: str | None = None,
) -> Tensor:
    """Scale each channel by a factor between 0 and 1 that two 1x1 convolutions draw from the channels' means.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        weight1: [R, C, 1, 1], the squeeze.
        bias1: [R], or None.
        weight2: [C, R, 1, 1], the excitation.
        bias2: [C], or None.
        act: "relu" or "silu".
        gate: "sigmoid" or "hard_sigmoid" (`clamp(x + 3, 0, 6) / 6`).
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, C, H, W] of the input's dtype.

    Raises:
        ValueError: a shape, `act`, `gate` or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    return _operator(input, weight1, bias1, weight2, bias2, act, gate, backend)


def check_names(act: str, gate: str) -> None:
    """Raise ValueError unless both are known."""
    if act not in ACTIVATION_CODES:
        raise ValueError(f"act must be one of {', '.join(map(repr, ACTIVATION_CODES))}, got {act!r}")
    if gate not in GATE_CODES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATE_CODES))}, got {gate!r}")


def _check(call: Call) -> tuple[int, ...]:
    input, weight1, bias1, weight2, bias2 = call.shapes
    act, gate = call.settings
    assert input is not None and weight1 is not None
    check_names(act, gate)
    channels = input[1]
    if len(weight1) != 4 or weight1[0] < 1:
        raise ValueError(f"weight1 must have shape (hidden, {channels}, 1, 1), got {tuple(weight1)}")
    hidden = weight1[0]
    expect("weight1", weight1, (hidden, channels, 1, 1))
    expect("bias1", bias1, (hidden,))
    expect("weight2", weight2, (channels, hidden, 1, 1))
    expect("bias2", bias2, (channels,))
    return tuple(input)


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), weight1, *_ = call.shapes
    act, gate = call.settings
    return _native.library().SqueezeExciteParams(
        batch=batch,
        channels=channels,
        pixels=height * width,
        hidden=weight1[0],
        activation=ACTIVATION_CODES[act],
        gate=GATE_CODES[gate],
        **common,
    )


_operator = Operator(
    "squeeze_excite",
    "input weight1 bias1? weight2 bias2?",
    "str act, str gate",
    check=_check,
    params=_params,
    formula=reference.squeeze_excite,
    formula_of_backward=reference.squeeze_excite_backward,
)

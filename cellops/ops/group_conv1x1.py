"""Grouped 1x1 convolution with what follows it: y = shuffle(act(scale * conv(x, weight) + shift)).

Fused: x is read once and y written once, and the convolution is not stored. With batch statistics it must wait for
them. On the CPU it waits in memory, y's or, in training, its own: saved for backward, which reads it twice, it costs a
tensor like y, in float32 or wider, and spares half of the products. On a GPU, where products cost less than
memory, it is computed again each time. Saved besides: the arguments, and the batch's mean and variance.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.ops._registration import expect, expect_eps, integer
from cellops.reference import group_conv1x1 as reference

ACTIVATION_CODES = {"none": 0, "relu": 1, "relu6": 2, "gelu": 3, "silu": 4, "hardswish": 5}


def group_conv1x1(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    groups: int = 1,
    activation: str = "none",
    shuffle: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Convolve each pixel's channels group by group, scale, shift and activate, and shuffle the channels.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        weight: [O, C/groups, 1, 1].
        scale: [O], times the convolution, or None for 1. Like `shift`, float32 beside a half input too.
        shift: [O], added after that, or None for 0.
        groups: a divisor of C and O.
        activation: "none", "relu", "relu6", "gelu" (with the error function), "silu" or "hardswish".
        shuffle: whether the channels of the output are those of `torch.channel_shuffle(..., groups)`. `scale` and
            `shift` count the channels before it.
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, O, H, W] of the input's dtype.

    Raises:
        ValueError: a shape, `groups`, `activation` or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    groups = integer("groups", groups)
    return _operator(input, weight, scale, shift, groups, activation, shuffle, backend)


def group_conv1x1_batch_norm(
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    activation: str = "none",
    shuffle: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_conv1x1` in training: the convolution is normalised by its own mean and variance over the batch.

    Args:
        input, weight, groups, activation, shuffle, backend: as for `group_conv1x1`.
        gamma: [O], the normalisation's weight, or None for 1. Like `beta`, float32 beside a half input too.
        beta: [O], its bias, or None for 0.
        eps: added to the variance, at least 0.

    Returns:
        [N, O, H, W]; mean and biased variance [O] of the convolution, float32 or wider and without gradients.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: as `group_conv1x1`.
    """
    groups = integer("groups", groups)
    return _batch_norm_operator(input, weight, gamma, beta, eps, groups, activation, shuffle, backend)


def _check(call: Call) -> tuple[int, ...]:
    input, weight, *affine = call.shapes
    *eps, groups, activation, _ = call.settings
    assert input is not None and weight is not None
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATION_CODES))}, got {activation!r}")
    if eps:
        expect_eps(eps[0])
    batch, channels, height, width = input
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be a divisor of the input's {channels} channels, got {groups}")
    inputs = channels // groups
    if len(weight) != 4 or weight[0] < 1:
        raise ValueError(f"weight must have shape (outputs, {inputs}, 1, 1), got {tuple(weight)}")
    outputs = weight[0]
    expect("weight", weight, (outputs, inputs, 1, 1))
    if outputs % groups:
        raise ValueError(f"groups must be a divisor of the weight's {outputs} output channels, got {groups}")
    for name, shape in zip(("gamma", "beta") if eps else ("scale", "shift"), affine, strict=True):
        expect(name, shape, (outputs,))
    return batch, outputs, height, width


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), weight, *_ = call.shapes
    *eps, groups, activation, shuffle = call.settings
    return _native.library().GroupConv1x1Params(
        batch=batch,
        in_channels=channels,
        out_channels=weight[0],
        pixels=height * width,
        groups=groups,
        activation=ACTIVATION_CODES[activation],
        shuffle=shuffle,
        eps=eps[0] if eps else 0.0,
        **common,
    )


_operator = Operator(
    "group_conv1x1",
    "input weight scale?+ shift?+",
    "int groups, str activation, bool shuffle",
    check=_check,
    params=_params,
    formula=reference.group_conv1x1,
    formula_of_backward=reference.group_conv1x1_backward,
)

_batch_norm_operator = Operator(
    "group_conv1x1_batch_norm",
    "input weight gamma?+ beta?+",
    "float eps, int groups, str activation, bool shuffle",
    check=_check,
    params=_params,
    formula=reference.group_conv1x1_batch_norm,
    formula_of_backward=reference.group_conv1x1_batch_norm_backward,
    statistics="mean var",
    saves="convolution",
)

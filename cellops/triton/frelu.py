"""The funnel activation in Triton: y = max(x, gamma * n + beta), n = (z - mean) / deviation, z = dwconv(x, weight).

The kernels are in `_depthwise_kernels.py`.

Passes over the tensor in memory, for a tensor of B bytes (bound on an H200: passes * B / 4.3 TB/s; the instructions
take as long in bfloat16, as `_depthwise_kernels.py` says):
    forward                     2: read x, write y; that is the floor
    training forward            3: read x for the statistics, then the same; the floor for a tensor beyond the cache
    backward                    5 of B and 2 of float32: x and grad_output for the convolution's gradient, which is
                                written in float32; all three for the input's, which is written
    backward with statistics    2 more, for the sums that the statistics' gradients need (without: for scale and shift)
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cellops.triton import _depthwise


def frelu_forward_triton(
    input: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.frelu`."""
    return _depthwise.forward(input, weight, scale, shift, "funnel")


def frelu_batch_norm_forward_triton(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C, H, W], mean and biased variance; arguments as in `cellops.ops.frelu.frelu_batch_norm`."""
    return _depthwise.batch_norm_forward(input, weight, gamma, beta, eps, "funnel")


def frelu_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu`."""
    return _depthwise.backward(grad_output, input, weight, scale, shift, "funnel", wanted)


def frelu_batch_norm_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu_batch_norm`, through the statistics too."""
    return _depthwise.batch_norm_backward(grad_output, input, weight, gamma, beta, mean, var, eps, "funnel")

"""Depthwise convolution with what follows it in eager PyTorch: act(scale * dwconv(input) + shift).

Half types are computed in float32 and rounded at the end. Slopes at the kinks are PyTorch's.
"""

from __future__ import annotations

from torch import Tensor

from cellops.reference._activation import ACTIVATIONS, SLOPES
from cellops.reference._batch_norm import affine, batch_norm_backward, normalise, wide
from cellops.reference._depthwise import convolve, convolve_backward


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Convolve; the arguments must be valid (`cellops.depthwise_conv2d` checks them).

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k], k odd; zero padding keeps the size.
        scale: [C], or None for 1.
        shift: [C], or None for 0.
        activation: a key of `ACTIVATIONS`.
    """
    return ACTIVATIONS[activation](affine(convolve(wide(input), weight), scale, shift)).to(input.dtype)


def depthwise_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `depthwise_conv2d`, None for an absent one; grad_output [N, C, H, W]."""
    x = wide(input)
    convolved = convolve(x, weight)
    grad = _grad_of_affine(grad_output, affine(convolved, scale, shift), activation)
    grad_scale = None if scale is None else (grad * convolved).sum((0, 2, 3)).to(scale.dtype)
    grad_shift = None if shift is None else grad.sum((0, 2, 3)).to(shift.dtype)
    grad_input, grad_weight = convolve_backward(affine(grad, scale, None), x, weight)
    return grad_input.to(input.dtype), grad_weight.to(weight.dtype), grad_scale, grad_shift


def depthwise_conv2d_batch_norm(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with scale and shift from the batch: act(batch_norm(dwconv(input))).

    Args:
        input, weight, activation: as for `depthwise_conv2d`.
        gamma: [C], the normalisation's weight, or None for 1.
        beta: [C], its bias, or None for 0.
        eps: added to the variance.

    Returns:
        [N, C, H, W], and mean and biased variance [C] of the convolution in float32 or wider.
    """
    mean, variance, normalised = normalise(convolve(wide(input), weight), eps)
    return ACTIVATIONS[activation](affine(normalised, gamma, beta)).to(input.dtype), mean, variance


def depthwise_conv2d_batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `depthwise_conv2d_batch_norm`, through the statistics too."""
    x = wide(input)
    _, variance, normalised = normalise(convolve(x, weight), eps)
    grad = _grad_of_affine(grad_output, affine(normalised, gamma, beta), activation)
    grad_convolved, grad_gamma, grad_beta = batch_norm_backward(grad, normalised, variance, gamma, beta, eps)
    grad_input, grad_weight = convolve_backward(grad_convolved, x, weight)
    return grad_input.to(input.dtype), grad_weight.to(weight.dtype), grad_gamma, grad_beta


def _grad_of_affine(grad_output: Tensor, before: Tensor, activation: str) -> Tensor:
    """The gradient to `before`, what the activation was given."""
    grad = wide(grad_output)
    return grad if activation == "none" else grad * SLOPES[activation](before)

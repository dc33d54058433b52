"""The funnel activation (Ma et al. 2020, eq. 3) in eager PyTorch: max(input, scale * dwconv(input) + shift).

Half types are computed in float32 and rounded at the end. Where both sides of the maximum are equal each gets half of
the gradient, where one is NaN both get all of it, as in `torch.maximum`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cellops.reference._batch_norm import affine, batch_norm_backward, normalise, wide
from cellops.reference._depthwise import convolve, convolve_backward


def frelu(input: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Activate; the arguments must be valid (`cellops.frelu` checks them).

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k], k odd; zero padding keeps the size.
        scale: [C], or None for 1.
        shift: [C], or None for 0.
    """
    x = wide(input)
    return torch.maximum(x, affine(convolve(x, weight), scale, shift)).to(input.dtype)


def frelu_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu`, None for an absent one; grad_output [N, C, H, W]."""
    x = wide(input)
    convolved = convolve(x, weight)
    direct, through = _split(wide(grad_output), x, affine(convolved, scale, shift))
    grad_scale = None if scale is None else (through * convolved).sum((0, 2, 3)).to(scale.dtype)
    grad_shift = None if shift is None else through.sum((0, 2, 3)).to(shift.dtype)
    grad_input, grad_weight = convolve_backward(affine(through, scale, None), x, weight)
    return (direct + grad_input).to(input.dtype), grad_weight.to(weight.dtype), grad_scale, grad_shift


def frelu_batch_norm(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with scale and shift from the batch: max(input, batch_norm(dwconv(input))).

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k], k odd.
        gamma: [C], the normalisation's weight, or None for 1.
        beta: [C], its bias, or None for 0.
        eps: added to the variance.

    Returns:
        [N, C, H, W], and mean and biased variance [C] of the convolution in float32 or wider.
    """
    x = wide(input)
    convolved = convolve(x, weight)
    mean, variance, normalised = normalise(convolved, eps)
    return torch.maximum(x, affine(normalised, gamma, beta)).to(input.dtype), mean, variance


def frelu_batch_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu_batch_norm`, through the statistics too."""
    x = wide(input)
    _, variance, normalised = normalise(convolve(x, weight), eps)
    direct, through = _split(wide(grad_output), x, affine(normalised, gamma, beta))
    grad_convolved, grad_gamma, grad_beta = batch_norm_backward(through, normalised, variance, gamma, beta, eps)
    grad_input, grad_weight = convolve_backward(grad_convolved, x, weight)
    return (direct + grad_input).to(input.dtype), grad_weight.to(weight.dtype), grad_gamma, grad_beta


def _split(grad: Tensor, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of torch.maximum(x, other)."""
    shared = torch.where(x == other, grad / 2, grad)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return torch.where(x < other, zero, shared), torch.where(x > other, zero, shared)

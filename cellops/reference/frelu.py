"""The funnel activation (Ma et al. 2020, eq. 3) in eager PyTorch: max(input, scale * dwconv(input) + shift).

Half types are computed in float32 and rounded at the end. Where both sides of the maximum are equal each gets half of
the gradient, where one is NaN both get all of it, as in `torch.maximum`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cellops.reference._batch_norm import affine, batch_norm_backward, normalise, wide


def frelu(input: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Activate; the arguments must be valid (`cellops.frelu` checks them).

    Args:
        input: [N, C, H, W].
        weight: [C, 1, k, k], k odd; zero padding keeps the size.
        scale: [C], or None for 1.
        shift: [C], or None for 0.
    """
    x = wide(input)
    return torch.maximum(x, affine(_convolve(x, weight), scale, shift)).to(input.dtype)


def frelu_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu`, None for an absent one; grad_output [N, C, H, W]."""
    x = wide(input)
    convolved = _convolve(x, weight)
    direct, through = _split(wide(grad_output), x, affine(convolved, scale, shift))
    grad_scale = None if scale is None else (through * convolved).sum((0, 2, 3)).to(scale.dtype)
    grad_shift = None if shift is None else through.sum((0, 2, 3)).to(shift.dtype)
    grad_input, grad_weight = _convolve_backward(affine(through, scale, None), x, weight)
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
    convolved = _convolve(x, weight)
    mean, variance, normalised = normalise(convolved, eps)
    return torch.maximum(x, affine(normalised, gamma, beta)).to(input.dtype), mean, variance


def frelu_batch_norm_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu_batch_norm`, through the statistics too."""
    x = wide(input)
    _, variance, normalised = normalise(_convolve(x, weight), eps)
    direct, through = _split(wide(grad_output), x, affine(normalised, gamma, beta))
    grad_convolved, grad_gamma, grad_beta = batch_norm_backward(through, normalised, variance, gamma, beta, eps)
    grad_input, grad_weight = _convolve_backward(grad_convolved, x, weight)
    return (direct + grad_input).to(input.dtype), grad_weight.to(weight.dtype), grad_gamma, grad_beta


def _split(grad: Tensor, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of torch.maximum(x, other)."""
    shared = torch.where(x == other, grad / 2, grad)
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return torch.where(x < other, zero, shared), torch.where(x > other, zero, shared)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_convolve` to x and weight."""
    kernel = weight.shape[-1]
    half, (height, width) = kernel // 2, x.shape[2:]
    grad_x = _convolve(grad, weight.flip((2, 3)))
    padded = F.pad(x, (half, half, half, half))
    taps = [
        (grad * padded[:, :, i : i + height, j : j + width]).sum((0, 2, 3))
        for i in range(kernel)
        for j in range(kernel)
    ]
    return grad_x, torch.stack(taps, dim=1).reshape(weight.shape)

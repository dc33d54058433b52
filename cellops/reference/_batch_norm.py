"""What the references of ops with a normalisation share: statistics of each channel, the affine step, the gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """In the type that everything is computed in: float32, or float64 for float64."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)


def affine(values: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """scale * values + shift per channel; values [N, C, H, W], scale and shift [C], None for 1 and 0."""
    if scale is not None:
        values = values * _per_channel(scale.to(values.dtype))
    return values if shift is None else values + _per_channel(shift.to(values.dtype))


def normalise(values: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance [C], and the values with mean 0 and variance 1 in each channel."""
    mean = values.mean((0, 2, 3))
    centred = values - _per_channel(mean)
    variance = centred.square().mean((0, 2, 3))
    return mean, variance, centred * _per_channel((variance + eps).rsqrt())


def batch_norm_backward(
    grad: Tensor, normalised: Tensor, variance: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of affine(normalise(values), gamma, beta) to values, through the statistics too, to gamma and to beta.

    Args:
        grad: [N, C, H, W], the gradient to the result.
        normalised, variance: what `normalise` returned.
        gamma, beta: [C] or None.
        eps: the one that `normalise` was given.
    """
    grad_beta, grad_gamma = grad.sum((0, 2, 3)), (grad * normalised).sum((0, 2, 3))
    count = max(grad.shape[0] * grad.shape[2] * grad.shape[3], 1)
    centred = grad - _per_channel(grad_beta / count) - normalised * _per_channel(grad_gamma / count)
    return (
        affine(centred * _per_channel((variance + eps).rsqrt()), gamma, None),
        None if gamma is None else grad_gamma.to(gamma.dtype),
        None if beta is None else grad_beta.to(beta.dtype),
    )


def _per_channel(values: Tensor) -> Tensor:
    return values[:, None, None]

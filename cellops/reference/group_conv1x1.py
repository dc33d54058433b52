"""Grouped 1x1 convolution with what follows it in eager PyTorch: shuffle(act(scale * conv(input) + shift)).

Half types are computed in float32 and rounded at the end. Slopes at the kinks are PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cellops.reference._activation import ACTIVATIONS, SLOPES
from cellops.reference._batch_norm import affine, batch_norm_backward, normalise, wide


def group_conv1x1(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    groups: int = 1,
    activation: str = "none",
    shuffle: bool = False,
) -> Tensor:
    """Convolve; the arguments must be valid (`cellops.group_conv1x1` checks them).

    Args:
        input: [N, C, H, W].
        weight: [O, C/groups, 1, 1].
        scale: [O], or None for 1.
        shift: [O], or None for 0.
        groups: a divisor of C and O.
        activation: a key of `ACTIVATIONS`.
        shuffle: whether to shuffle the channels afterwards.
    """
    z = F.conv2d(wide(input), wide(weight), groups=groups)
    output = ACTIVATIONS[activation](affine(z, scale, shift))
    return (shuffle_channels(output, groups) if shuffle else output).to(input.dtype)


def group_conv1x1_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    activation: str,
    shuffle: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `group_conv1x1`, None for an absent one; grad_output [N, O, H, W]."""
    x, w = wide(input), wide(weight)
    z = F.conv2d(x, w, groups=groups)
    grad = _grad_of_affine(grad_output, affine(z, scale, shift), groups, activation, shuffle)
    grad_scale = None if scale is None else (grad * z).sum((0, 2, 3)).to(scale.dtype)
    grad_shift = None if shift is None else grad.sum((0, 2, 3)).to(shift.dtype)
    grad_input, grad_weight = _convolve_backward(affine(grad, scale, None), x, w, groups)
    return grad_input.to(input.dtype), grad_weight.to(weight.dtype), grad_scale, grad_shift


def group_conv1x1_batch_norm(
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    groups: int,
    activation: str,
    shuffle: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with scale and shift from the batch: shuffle(act(batch_norm(conv(input)))).

    Args:
        input, weight, groups, activation, shuffle: as for `group_conv1x1`.
        gamma: [O], the normalisation's weight, or None for 1.
        beta: [O], its bias, or None for 0.
        eps: added to the variance.

    Returns:
        [N, O, H, W], and mean and biased variance [O] of the convolution in float32 or wider.
    """
    z = F.conv2d(wide(input), wide(weight), groups=groups)
    mean, variance, normalised = normalise(z, eps)
    output = ACTIVATIONS[activation](affine(normalised, gamma, beta))
    return (shuffle_channels(output, groups) if shuffle else output).to(input.dtype), mean, variance


def group_conv1x1_batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    groups: int,
    activation: str,
    shuffle: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `group_conv1x1_batch_norm`, through the statistics too."""
    x, w = wide(input), wide(weight)
    _, variance, normalised = normalise(F.conv2d(x, w, groups=groups), eps)
    grad = _grad_of_affine(grad_output, affine(normalised, gamma, beta), groups, activation, shuffle)
    grad_z, grad_gamma, grad_beta = batch_norm_backward(grad, normalised, variance, gamma, beta, eps)
    grad_input, grad_weight = _convolve_backward(grad_z, x, w, groups)
    return grad_input.to(input.dtype), grad_weight.to(weight.dtype), grad_gamma, grad_beta


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """`torch.channel_shuffle`: channel i * (O / groups) + j of [N, O, H, W] goes to j * groups + i."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


def _grad_of_affine(grad_output: Tensor, before: Tensor, groups: int, activation: str, shuffle: bool) -> Tensor:
    """The gradient to `before`, what the activation was given."""
    grad = wide(grad_output)
    if shuffle:
        grad = shuffle_channels(grad, grad.shape[1] // groups)  # shuffling with the other factor undoes it
    return grad if activation == "none" else grad * SLOPES[activation](before)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution to x and weight."""
    outputs, inputs = weight.shape[0] // groups, weight.shape[1]
    transposed = weight.reshape(groups, outputs, inputs).transpose(1, 2).reshape(groups * inputs, outputs, 1, 1)
    grad_x = F.conv2d(grad, transposed, groups=groups)
    split_grad, split_x = grad.unflatten(1, (groups, outputs)), x.unflatten(1, (groups, inputs))
    return grad_x, torch.einsum("ngohw,ngihw->goi", split_grad, split_x).reshape(weight.shape)

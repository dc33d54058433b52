"""The depthwise convolution of `frelu` and `depthwise_conv2d`, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of [N, C, H, W] with [C, 1, k, k], k odd, of stride 1; zero padding keeps the size."""
    return F.conv2d(x, weight.to(x.dtype), padding=weight.shape[-1] // 2, groups=weight.shape[0])


def convolve_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `convolve` to x and weight."""
    kernel = weight.shape[-1]
    half, (height, width) = kernel // 2, x.shape[2:]
    grad_x = convolve(grad, weight.flip((2, 3)))
    padded = F.pad(x, (half, half, half, half))
    taps = [
        (grad * padded[:, :, i : i + height, j : j + width]).sum((0, 2, 3))
        for i in range(kernel)
        for j in range(kernel)
    ]
    return grad_x, torch.stack(taps, dim=1).reshape(weight.shape)

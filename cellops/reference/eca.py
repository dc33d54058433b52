"""Efficient channel attention (Wang et al. 2020) in eager PyTorch: input * sigmoid(conv1d over channels(mean)).

Pooling and the convolution are float32 for half types; the scales are rounded to the storage type, as eager's are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def eca(input: Tensor, weight: Tensor) -> Tensor:
    """Scale the channels; the arguments must be valid (`cellops.eca` checks them).

    Args:
        input: [N, C, H, W].
        weight: [1, 1, k], k odd; zero padding keeps the number of channels.
    """
    mean = _mean(input)
    return input * _scale(mean, weight).to(input.dtype)[:, :, None, None]


def eca_backward(grad_output: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to input and weight; arguments as in `eca`, grad_output [N, C, H, W]."""
    mean, half = _mean(input), weight.shape[-1] // 2
    scale = _scale(mean, weight)
    grad_logits = (grad_output.to(mean.dtype) * input.to(mean.dtype)).sum((2, 3)) * scale * (1 - scale)
    windows = F.pad(mean, (half, half)).unfold(1, weight.shape[-1], 1)  # [N, C, k]
    grad_weight = (windows * grad_logits.unsqueeze(-1)).sum((0, 1)).reshape(weight.shape)
    grad_mean = F.conv1d(grad_logits.unsqueeze(1), weight.to(mean.dtype).flip(-1), padding=half).squeeze(1)
    pixels = input.shape[2] * input.shape[3]
    grad_input = grad_output * scale.to(input.dtype)[:, :, None, None]
    grad_input = grad_input + (grad_mean / pixels).to(input.dtype)[:, :, None, None]
    return grad_input, grad_weight.to(weight.dtype)


def _mean(input: Tensor) -> Tensor:
    return input.to(torch.float64 if input.dtype == torch.float64 else torch.float32).mean((2, 3))


def _scale(mean: Tensor, weight: Tensor) -> Tensor:
    logits = F.conv1d(mean.unsqueeze(1), weight.to(mean.dtype), padding=weight.shape[-1] // 2)
    return logits.squeeze(1).sigmoid()

"""Spatial attention in eager PyTorch: input * sigmoid(a map of one number for each pixel).

The map is a convolution of the channels ("conv"), or of their maximum and their mean ("pool", CBAM: Woo et al. 2018).
It is float32 for half types; the scales are rounded to the storage type, as eager's are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MODES = ("conv", "pool")


def spatial_attention(input: Tensor, weight: Tensor, bias: Tensor | None = None, mode: str = "conv") -> Tensor:
    """Scale the pixels; the arguments must be valid (`cellops.spatial_attention` checks them).

    Args:
        input: [N, C, H, W].
        weight: [1, C, k, k] for "conv", [1, 2, k, k] for "pool", the maximum's weights first; k odd.
        bias: [1], or None.
        mode: "conv" or "pool".
    """
    source = _source(input, mode)
    return input * _scale(source, weight, bias).to(input.dtype)


def spatial_attention_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, mode: str = "conv"
) -> tuple[Tensor | None, ...]:
    """Gradients to the three tensors; arguments as in `spatial_attention`, grad_output [N, C, H, W].

    The gradient of a maximum is split evenly between the channels that reach it.
    """
    source, half = _source(input, mode), weight.shape[-1] // 2
    scale = _scale(source, weight, bias)
    product = grad_output.to(source.dtype) * input.to(source.dtype)
    grad_logits = product.sum(1, keepdim=True) * scale * (1 - scale)
    grad_source = F.conv_transpose2d(grad_logits, weight.to(source.dtype), padding=half)
    # Taps outside the image are zeros here: of the maps, or of the logits' gradients. Beside NaN they are NaN.
    if mode == "pool":
        reached = input == source[:, :1]
        through_max = grad_source[:, :1] / reached.sum(1, keepdim=True)
        through_max = torch.where(reached, through_max, torch.zeros((), dtype=source.dtype, device=input.device))
        grad_source = through_max + grad_source[:, 1:] / input.shape[1]
        columns = F.unfold(source, weight.shape[-2:], padding=half)  # [N, 2 * k * k, H * W]
        grad_weight = (columns @ grad_logits.flatten(2).transpose(1, 2)).sum(0)
    else:
        seen = F.unfold(grad_logits, weight.shape[-2:], padding=half).flip(1)  # [N, k * k, H * W]
        grad_weight = (source.flatten(2) @ seen.transpose(1, 2)).sum(0)
    grad_input = grad_output * scale.to(input.dtype) + grad_source.to(input.dtype)
    grad_bias = None if bias is None else grad_logits.sum((0, 2, 3)).to(bias.dtype)
    return grad_input, grad_weight.reshape(weight.shape).to(weight.dtype), grad_bias


def _source(input: Tensor, mode: str) -> Tensor:
    """What the convolution sees, in the type that it computes in."""
    wide = input.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    return wide if mode == "conv" else torch.cat((wide.amax(1, keepdim=True), wide.mean(1, keepdim=True)), 1)


def _scale(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide_bias = None if bias is None else bias.to(source.dtype)
    return F.conv2d(source, weight.to(source.dtype), wide_bias, padding=weight.shape[-1] // 2).sigmoid()

"""Efficient channel attention in Triton: y = x * sigmoid(conv1d over channels(mean over pixels)).

Pooling and scaling, with the bytes they move and their bound, are in `_channel_attention.py`; what is here handles
[N, C] numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from cellops.triton._channel_attention import channel_sums, chunks, scale_channels
from cellops.triton._launch import ceil_div, launch


@triton.jit
def eca_scale_kernel(
    sums,  # [N, parts, C] float32
    weight,  # [taps]
    scale,  # [N, C] float32
    channels,
    pixels,
    parts,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """scale[n, c] = sigmoid(sum over taps of weight[tap] * mean[n, c + tap - taps // 2]), 0 beyond the channels."""
    image = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    logits = tl.zeros([BLOCK_C], tl.float32)
    for tap in range(TAPS):
        neighbour = channel + tap - TAPS // 2
        valid = (neighbour >= 0) & (neighbour < channels)
        total = tl.zeros([BLOCK_C], tl.float32)
        for part in range(parts):
            total += tl.load(sums + (image * parts + part) * channels + neighbour, valid, 0.0)
        logits += tl.load(weight + tap).to(tl.float32) * (total / pixels)
    tl.store(scale + image * channels + channel, tl.sigmoid(logits), channel < channels)


def _scale(sums: Tensor, weight: Tensor, pixels: int) -> Tensor:
    batch, parts, channels = sums.shape
    scale = torch.empty(batch, channels, dtype=torch.float32, device=sums.device)
    constants = {"TAPS": weight.shape[2], "BLOCK_C": 128}
    grid = (batch, ceil_div(channels, 128))
    launch(eca_scale_kernel, grid, sums, weight, scale, channels, pixels, parts, **constants)
    return scale


def eca_forward_triton(input: Tensor, weight: Tensor) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.eca`."""
    output = torch.empty_like(input)
    for images in chunks(input):
        sums, _ = channel_sums(input[images])
        scale = _scale(sums, weight, input.shape[2] * input.shape[3])
        scale_channels(input[images], scale, None, output[images])
    return output


def eca_backward_triton(
    grad_output: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor]:
    """Gradients to input and weight."""
    pixels, taps = input.shape[2] * input.shape[3], weight.shape[2]
    sums, products = channel_sums(input, grad_output)
    scale = _scale(sums, weight, pixels)
    grad_logits = products.sum(1) * scale * (1 - scale)
    windows = F.pad(sums.sum(1) / pixels, (taps // 2, taps // 2)).unfold(1, taps, 1)  # [N, C, taps]
    grad_weight = (windows * grad_logits.unsqueeze(-1)).sum((0, 1))
    if not wanted[0]:
        return None, grad_weight
    grad_windows = F.pad(grad_logits, (taps // 2, taps // 2)).unfold(1, taps, 1)
    grad_mean = (grad_windows * weight.flatten().float().flip(0)).sum(2)
    grad_input = torch.empty_like(grad_output)
    scale_channels(grad_output, scale, grad_mean / pixels, grad_input)
    return grad_input, grad_weight

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

from cellops.triton._channel_attention import channel_sums, scale_channels
from cellops.triton._launch import ceil_div, launch, power_of_2


@triton.jit
def _mean(sums, image, channel, channels, pixels, parts, BLOCK_C: tl.constexpr):
    """Of each channel over an image's pixels, 0 beyond the channels."""
    total = tl.zeros([BLOCK_C], tl.float32)
    valid = (channel >= 0) & (channel < channels)
    for part in range(parts):
        total += tl.load(sums + (image * parts + part) * channels + channel, valid, 0.0)
    return total / pixels


@triton.jit
def eca_scale_kernel(
    sums,  # [N, parts, C] float32: of the input
    products,  # [N, parts, C] float32: of grad_output * input, None for forward
    weight,  # [taps]
    scale,  # [N, C] float32
    grad_logits,  # [N, C] float32, None for forward
    channels,
    pixels,
    parts,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    AXIS: tl.constexpr,
):
    """scale[n, c] = sigmoid(sum over taps of weight[tap] * mean[n, c + tap - taps // 2]), 0 beyond the channels.

    grad_logits[n, c] = products[n, c] * scale * (1 - scale).
    """
    image = tl.program_id(AXIS).to(tl.int64)
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    logits = tl.zeros([BLOCK_C], tl.float32)
    for tap in range(TAPS):
        mean = _mean(sums, image, channel + tap - TAPS // 2, channels, pixels, parts, BLOCK_C)
        logits += tl.load(weight + tap).to(tl.float32) * mean
    gate = tl.sigmoid(logits)
    tl.store(scale + image * channels + channel, gate, channel < channels)
    if products is not None:
        grad = _mean(products, image, channel, channels, 1, parts, BLOCK_C) * gate * (1 - gate)
        tl.store(grad_logits + image * channels + channel, grad, channel < channels)


@triton.jit
def eca_backward_kernel(
    sums,  # [N, parts, C] float32
    grad_logits,  # [N, C] float32
    weight,  # [taps]
    shares,  # [N, C] float32: of each pixel in the mean's gradient
    grad_weights,  # [N, blocks of C, WIDTH] float32
    channels,
    pixels,
    parts,
    TAPS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, no less than TAPS
    BLOCK_C: tl.constexpr,
    AXIS: tl.constexpr,
):
    """grad_mean[n, c] = sum over taps of weight[tap] * grad_logits[n, c - tap + taps // 2]; the weight's gradient."""
    image = tl.program_id(AXIS).to(tl.int64)
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    grad = tl.load(grad_logits + image * channels + channel, known, 0.0)
    share = tl.zeros([BLOCK_C], tl.float32)
    taps = tl.arange(0, WIDTH)
    tap_sums = tl.zeros([WIDTH], tl.float32)
    for tap in range(TAPS):
        other = channel - tap + TAPS // 2
        valid = (other >= 0) & (other < channels)
        back = tl.load(grad_logits + image * channels + other, valid, 0.0)
        share += tl.load(weight + tap).to(tl.float32) * back
        mean = _mean(sums, image, channel + tap - TAPS // 2, channels, pixels, parts, BLOCK_C)
        tap_sums += tl.where(taps == tap, tl.sum(grad * mean, 0), 0.0)
    tl.store(shares + image * channels + channel, share / pixels, known)
    row = image * tl.num_programs(1 - AXIS) + tl.program_id(1 - AXIS)
    tl.store(grad_weights + row * WIDTH + taps, tap_sums)


BLOCK_C = 128


def _scale(sums: Tensor, products: Tensor | None, weight: Tensor, pixels: int) -> tuple[Tensor, Tensor | None]:
    """The factor of each channel of each image, and with `products` the gradient to its logit."""
    batch, parts, channels = sums.shape
    scale = torch.empty(batch, channels, dtype=torch.float32, device=sums.device)
    grad_logits = None if products is None else torch.empty_like(scale)
    tensors = (sums, products, weight, scale, grad_logits)
    grid = (batch, ceil_div(channels, BLOCK_C))
    launch(eca_scale_kernel, grid, tensors, (channels, pixels, parts), TAPS=weight.shape[2], BLOCK_C=BLOCK_C)
    return scale, grad_logits


def eca_forward_triton(input: Tensor, weight: Tensor) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.eca`."""
    output = torch.empty_like(input)
    sums, _ = channel_sums(input)
    scale, _ = _scale(sums, None, weight, input.shape[2] * input.shape[3])
    scale_channels(input, scale, None, output)
    return output


def eca_backward_triton(
    grad_output: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor]:
    """Gradients to input and weight."""
    pixels, taps = input.shape[2] * input.shape[3], weight.shape[2]
    sums, products = channel_sums(input, grad_output)
    scale, grad_logits = _scale(sums, products, weight, pixels)
    batch, parts, channels = sums.shape
    width, blocks = power_of_2(taps), ceil_div(channels, BLOCK_C)
    shares = torch.empty_like(scale)
    grad_weights = torch.empty(batch, blocks, width, dtype=torch.float32, device=input.device)
    tensors = (sums, grad_logits, weight, shares, grad_weights)
    constants = {"TAPS": taps, "WIDTH": width, "BLOCK_C": BLOCK_C}
    launch(eca_backward_kernel, (batch, blocks), tensors, (channels, pixels, parts), **constants)
    grad_input = None
    if wanted[0]:
        grad_input = torch.empty_like(grad_output)
        scale_channels(grad_output, scale, shares, grad_input)
    return grad_input, grad_weights.sum((0, 1))[:taps]

"""Squeeze-and-excitation in Triton: y = x * gate(fc2(act(fc1(mean over pixels)))).

Pooling and scaling, with the bytes they move and their bound, are in `_channel_attention.py`; what is here handles
[N, C] and [N, R] numbers and the two weights only, 4 * C * R operations an image, three times that in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._channel_attention import channel_sums, scale_channels
from cellops.triton._launch import launch, power_of_2


@triton.jit
def _mean(sums, channel, image, channels, pixels, parts, BLOCK_C: tl.constexpr):
    """Of each channel over an image's pixels."""
    total = tl.zeros([BLOCK_C], tl.float32)
    for part in range(parts):
        total += tl.load(sums + (image * parts + part) * channels + channel, channel < channels, 0.0)
    return total / pixels


@triton.jit
def _squeezed(weight1, bias1, mean, channel, unit, channels, hidden):
    """fc1 of some hidden units before the activation, and their rows of its weight [R, C]."""
    valid = (unit < hidden)[:, None] & (channel < channels)[None, :]
    squeeze = tl.load(weight1 + unit[:, None] * channels + channel[None, :], valid, 0.0).to(tl.float32)
    before = tl.sum(squeeze * mean[None, :], 1)
    if bias1 is not None:
        before += tl.load(bias1 + unit, unit < hidden, 0.0).to(tl.float32)
    return before, squeeze


@triton.jit
def _excitation(weight2, channel, unit, channels, hidden):
    """fc2's weight [R, C] of some hidden units."""
    valid = (unit < hidden)[:, None] & (channel < channels)[None, :]
    return tl.load(weight2 + channel[None, :] * hidden + unit[:, None], valid, 0.0).to(tl.float32)


@triton.jit
def _activated(before, SILU: tl.constexpr):
    if SILU:
        return before * tl.sigmoid(before)
    else:
        return tl.where(before <= 0, 0.0, before)  # NaN stays


@triton.jit
def _logits(
    weight1, bias1, weight2, bias2, mean, channel, channels, hidden,
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight2 @ act(weight1 @ mean + bias1) + bias2."""
    logits = tl.zeros([BLOCK_C], tl.float32)
    if bias2 is not None:
        logits += tl.load(bias2 + channel, channel < channels, 0.0).to(tl.float32)
    for start in range(0, hidden, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        before, _ = _squeezed(weight1, bias1, mean, channel, unit, channels, hidden)
        excite = _excitation(weight2, channel, unit, channels, hidden)
        known = (unit < hidden)[:, None] & (channel < channels)[None, :]
        logits += tl.sum(tl.where(known, excite * _activated(before, SILU)[:, None], 0.0), 0)
    return logits


@triton.jit
def squeeze_excite_scale_kernel(
    sums,  # [N, parts, C] float32
    weight1,  # [R, C]
    bias1,  # [R], or None
    weight2,  # [C, R]
    bias2,  # [C], or None
    scale,  # [N, C] float32
    channels, hidden, pixels, parts,
    SILU: tl.constexpr, HARD: tl.constexpr,
    BLOCK_C: tl.constexpr,  # all channels
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """scale[n] = gate(weight2 @ act(weight1 @ mean[n] + bias1) + bias2), an image for each program."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    mean = _mean(sums, channel, image, channels, pixels, parts, BLOCK_C)
    logits = _logits(weight1, bias1, weight2, bias2, mean, channel, channels, hidden, SILU, BLOCK_C, BLOCK_R)
    if HARD:
        gate = tl.where(logits <= -3, 0.0, tl.where(logits >= 3, 1.0, (logits + 3) / 6))
    else:
        gate = tl.sigmoid(logits)
    tl.store(scale + image * channels + channel, gate, channel < channels)


@triton.jit
def squeeze_excite_backward_kernel(
    sums,  # [N, parts, C] float32: of the input
    products,  # [N, parts, C] float32: of grad_output * input
    weight1,  # [R, C]
    bias1,  # [R], or None
    weight2,  # [C, R]
    bias2,  # [C], or None
    of_channels,  # [4, N, C] float32: the scale, the input's share of the mean's gradient, the mean, grad_logits
    of_units,  # [2, N, R] float32: fc1 behind its activation, the gradient before it
    images, channels, hidden, pixels, parts,
    SILU: tl.constexpr, HARD: tl.constexpr,
    BLOCK_C: tl.constexpr,  # all channels
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """grad_logits = gate' * sum of grad_output * x, grad_mean = weight1^T (act' * weight2^T grad_logits)."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = _mean(sums, channel, image, channels, pixels, parts, BLOCK_C)
    grad_scale = _mean(products, channel, image, channels, 1, parts, BLOCK_C)
    logits = _logits(weight1, bias1, weight2, bias2, mean, channel, channels, hidden, SILU, BLOCK_C, BLOCK_R)
    if HARD:
        gate = tl.where(logits <= -3, 0.0, tl.where(logits >= 3, 1.0, (logits + 3) / 6))
        grad_logits = tl.where((logits > -3) & (logits < 3), grad_scale / 6, 0.0)
    else:
        gate = tl.sigmoid(logits)
        grad_logits = grad_scale * gate * (1 - gate)
    grad_logits = tl.where(known, grad_logits, 0.0)
    grad_mean = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, hidden, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        before, squeeze = _squeezed(weight1, bias1, mean, channel, unit, channels, hidden)
        grad = tl.sum(_excitation(weight2, channel, unit, channels, hidden) * grad_logits[None, :], 1)
        if SILU:
            sigmoid = tl.sigmoid(before)
            grad = grad * sigmoid * (1 + before * (1 - sigmoid))
        else:
            grad = tl.where(before <= 0, 0.0, grad)
        grad = tl.where(unit < hidden, grad, 0.0)
        grad_mean += tl.sum(squeeze * grad[:, None], 0)
        place = image * hidden + unit
        tl.store(of_units + place, _activated(before, SILU), unit < hidden)
        tl.store(of_units + images * hidden + place, grad, unit < hidden)
    place, step = image * channels + channel, images * channels
    tl.store(of_channels + place, gate, known)
    tl.store(of_channels + step + place, grad_mean / pixels, known)
    tl.store(of_channels + 2 * step + place, mean, known)
    tl.store(of_channels + 3 * step + place, grad_logits, known)


def _constants(channels: int, hidden: int, act: str, gate: str) -> dict[str, Any]:
    """All channels at once, and as many hidden units as make 32 weights for each thread of eight warps."""
    block_c = power_of_2(channels, 16)
    block_r = power_of_2(hidden, 1, max(8192 // block_c, 1))
    return {"SILU": act == "silu", "HARD": gate == "hard_sigmoid", "BLOCK_C": block_c, "BLOCK_R": block_r}


def squeeze_excite_forward_triton(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.squeeze_excite`."""
    output, pixels = torch.empty_like(input), input.shape[2] * input.shape[3]
    hidden, channels = weight1.shape[:2]
    constants = _constants(channels, hidden, act, gate)
    sums, _ = channel_sums(input)
    scale = torch.empty(sums.shape[0], channels, dtype=torch.float32, device=input.device)
    tensors, sizes = (sums, weight1, bias1, weight2, bias2, scale), (channels, hidden, pixels, sums.shape[1])
    launch(squeeze_excite_scale_kernel, tuple(scale.shape[:1]), tensors, sizes, **constants, num_warps=8)
    scale_channels(input, scale, None, output)
    return output


def squeeze_excite_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the five tensors. The products of [N, C] and [N, R] matrices are PyTorch's."""
    batch, channels, height, width = input.shape
    hidden = weight1.shape[0]
    sums, products = channel_sums(input, grad_output)
    of_channels = torch.empty(4, batch, channels, dtype=torch.float32, device=input.device)
    of_units = torch.empty(2, batch, hidden, dtype=torch.float32, device=input.device)
    tensors = (sums, products, weight1, bias1, weight2, bias2, of_channels, of_units)
    sizes = (batch, channels, hidden, height * width, sums.shape[1])
    constants = _constants(channels, hidden, act, gate)
    launch(squeeze_excite_backward_kernel, (batch,), tensors, sizes, **constants, num_warps=8)
    scale, share, mean, grad_logits = of_channels
    activated, grad_before = of_units
    grad_input = None
    if wanted[0]:
        grad_input = torch.empty_like(grad_output)
        scale_channels(grad_output, scale, share, grad_input)
    return grad_input, grad_before.T @ mean, grad_before.sum(0), grad_logits.T @ activated, grad_logits.sum(0)

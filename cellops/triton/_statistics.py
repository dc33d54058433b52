"""What stands between the passes of a normalisation by the batch: numbers of the channels from those of the parts.

They are a few thousand numbers, and each of PyTorch's ops on them would take as long as all of it: two or three
microseconds on the GPU, and ten to launch. So each direction has one kernel for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import ceil_div, launch
from cellops.triton._pixels import channel_numbers

CONSTANTS: dict[str, Any] = {"BLOCK_C": 8, "BLOCK_N": 256}
"""Channels and parts of a tile: few of the first, or few programs would read thousands of the second."""


VARYING = ("parts", "part_pixels", "count")
"""Sizes that decide no address: no kernel is compiled for those that are 1 or a multiple of 16."""


@triton.jit
def _parts(start, parts, channel, known, channels, BLOCK_N: tl.constexpr):
    """Places of the channels in some parts, [N, C], which of these there are, and the parts' numbers [N]."""
    part = start + tl.arange(0, BLOCK_N)
    exists = (part < parts)[:, None] & known[None, :]
    return part.to(tl.int64)[:, None] * channels + channel[None, :], exists, part


@triton.jit
def _sizes(sizes, part, parts, part_pixels, count):
    """Pixels of the parts, [N, 1]: as given, or `part_pixels` but for the last."""
    if sizes is None:
        size = tl.minimum(count - part.to(tl.int64) * part_pixels, part_pixels)
        return tl.where(part < parts, size, 0).to(tl.float32)[:, None]
    else:
        return tl.load(sizes + part, part < parts, 0.0)[:, None]


@triton.jit(do_not_specialize=VARYING)
def batch_statistics_kernel(
    means,  # [parts, C] float32
    squares,  # [parts, C] float32: sums of squared distances from the part's mean
    sizes,  # [parts] float32: pixels, or None
    gamma,  # [C], or None for 1
    mean, variance, scale,  # [C] float32
    parts, part_pixels, count, channels, total, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of all parts (Chan et al. 1979), and gamma / deviation."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        place, exists, part = _parts(start, parts, channel, known, channels, BLOCK_N)
        sum += tl.load(means + place, exists, 0.0) * _sizes(sizes, part, parts, part_pixels, count)
    center = tl.sum(sum, 0) / total
    sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        place, exists, part = _parts(start, parts, channel, known, channels, BLOCK_N)
        apart = tl.load(means + place, exists, 0.0) - center[None, :]
        apart *= apart * _sizes(sizes, part, parts, part_pixels, count)
        sum += tl.load(squares + place, exists, 0.0) + tl.where(exists, apart, 0.0)
    spread = tl.sum(sum, 0) / total
    tl.store(mean + channel, center, known)
    tl.store(variance + channel, spread, known)
    tl.store(scale + channel, tl.rsqrt(spread + eps) * channel_numbers(gamma, channel, known, 1.0), known)


@triton.jit
def batch_scale_kernel(
    variance, gamma, scale, channels, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """scale = gamma / deviation, [C]."""
    channel = tl.program_id(0) * (BLOCK_N * BLOCK_C) + tl.arange(0, BLOCK_N * BLOCK_C)
    known = channel < channels
    deviation = tl.load(variance + channel, known, 1.0) + eps
    tl.store(scale + channel, tl.rsqrt(deviation) * channel_numbers(gamma, channel, known, 1.0), known)


@triton.jit(do_not_specialize=VARYING)
def batch_gradients_kernel(
    sums,  # [parts, C] float32: of the gradient to what the activation is given
    products,  # [parts, C] float32: of it times z - mean
    variance, gamma,
    grad_gamma, grad_beta, of_mean, of_apart,  # [C] float32
    parts, channels, total, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients to gamma and beta, and what grad_z loses through mean and deviation.

    grad_z = through * scale - of_mean - (z - mean) * of_apart, with scale = gamma / deviation.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    sum = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    product = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_N):
        place, exists, _ = _parts(start, parts, channel, known, channels, BLOCK_N)
        sum += tl.load(sums + place, exists, 0.0)
        product += tl.load(products + place, exists, 0.0)
    inverse = tl.rsqrt(tl.load(variance + channel, known, 1.0) + eps)
    share = inverse * channel_numbers(gamma, channel, known, 1.0) / tl.maximum(total, 1.0)
    to_beta, to_gamma = tl.sum(sum, 0), tl.sum(product, 0) * inverse
    tl.store(grad_beta + channel, to_beta, known)
    tl.store(grad_gamma + channel, to_gamma, known)
    tl.store(of_mean + channel, to_beta * share, known)
    tl.store(of_apart + channel, to_gamma * inverse * share, known)


def batch_statistics(
    means: Tensor,
    squares: Tensor,
    sizes: Tensor | None,
    part_pixels: int,
    total: int,
    gamma: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and gamma / deviation of each channel, [C] float32; NaN of no pixels.

    Args:
        means: [parts, C] float32.
        squares: [parts, C] float32, sums of squared distances from the part's mean.
        sizes: [parts] float32, the pixels of each; None where all but the last have `part_pixels`.
        part_pixels: see there.
        total: pixels of all parts.
        gamma: [C], None for 1.
        eps: added to the variance.
    """
    parts, channels = means.shape
    mean, variance, scale = (means.new_empty(channels) for _ in range(3))
    tensors = (means, squares, sizes, gamma, mean, variance, scale)
    numbers = (parts, part_pixels, total, channels, float(total), eps)
    launch(batch_statistics_kernel, (ceil_div(channels, CONSTANTS["BLOCK_C"]),), tensors, numbers, **CONSTANTS)
    return mean, variance, scale


def batch_scale(variance: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """gamma / deviation, [C] float32."""
    scale, channels = torch.empty_like(variance), variance.shape[0]
    programs = ceil_div(channels, CONSTANTS["BLOCK_N"] * CONSTANTS["BLOCK_C"])
    launch(batch_scale_kernel, (programs,), (variance, gamma, scale), (channels, eps), **CONSTANTS)
    return scale


def batch_gradients(
    sums: Tensor, products: Tensor, variance: Tensor, gamma: Tensor | None, eps: float, total: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to gamma and beta, and of_mean and of_apart of `batch_gradients_kernel`, each [C] float32.

    Args:
        sums: [parts, C] float32, of the gradient to what the activation is given.
        products: [parts, C] float32, of it times z - mean.
        variance: [C] float32.
        gamma: [C], None for 1.
        eps: added to the variance.
        total: pixels of all parts.
    """
    parts, channels = sums.shape
    grad_gamma, grad_beta, of_mean, of_apart = (sums.new_empty(channels) for _ in range(4))
    tensors = (sums, products, variance, gamma, grad_gamma, grad_beta, of_mean, of_apart)
    numbers = (parts, channels, float(total), eps)
    launch(batch_gradients_kernel, (ceil_div(channels, CONSTANTS["BLOCK_C"]),), tensors, numbers, **CONSTANTS)
    return grad_gamma, grad_beta, of_mean, of_apart

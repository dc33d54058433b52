"""The funnel activation in Triton: y = max(x, gamma * n + beta), n = (z - mean) / deviation, z = dwconv(x, weight).

Evaluation and the call without statistics have mean 0 and deviation 1. z is never stored: every kernel convolves again,
k * k loads for each element, of which all but one hit the first-level cache (16 bytes wide in channels_last).

Passes over the tensor in memory, for a tensor of B bytes (bound on an H200: passes * B / 4.3 TB/s; each element takes
2 * k * k operations, far below what the bytes take):
    forward                     2: read x, write y; that is the floor
    training forward            3: read x for the statistics, then the same; the floor for a tensor beyond the cache
    backward                    3 of B and 2 of float32: the convolution's gradient is written once in float32
    backward with statistics    2 more, for the sums that the statistics' gradients need
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import launch, power_of_2
from cellops.triton._numerics import narrow
from cellops.triton._pixels import Tiles, channel_values, combined_statistics, pixel_elements, tile_elements, tiles


@triton.jit
def _neighbour(image, element, pixel, valid, dy, dx, height, width, pixel_stride):
    """Elements [C, P] that lie dy rows and dx columns further on, 0 outside the image."""
    row, column = pixel // width + dy, pixel % width + dx
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    shifted = image + element + (dy * width + dx) * pixel_stride
    return tl.load(shifted, valid & inside[None, :], 0.0).to(tl.float32)


@triton.jit
def _convolved(
    image,
    element,
    pixel,
    valid,
    weight,
    channel,
    channels,
    height,
    width,
    pixel_stride,
    K: tl.constexpr,
    SIGN: tl.constexpr,
):
    """sum over taps of weight[c, i, j] * image[c] at SIGN * (i - k // 2, j - k // 2); SIGN = -1 for the transpose."""
    sum = tl.zeros(element.shape, tl.float32)
    for tap in tl.range(0, K * K, loop_unroll_factor=K):
        dy, dx = SIGN * (tap // K - K // 2), SIGN * (tap % K - K // 2)
        factor = tl.load(weight + channel * K * K + tap, channel < channels, 0.0).to(tl.float32)
        sum += factor[:, None] * _neighbour(image, element, pixel, valid, dy, dx, height, width, pixel_stride)
    return sum


@triton.jit
def _split(grad, x, other):
    """The gradients of max(x, other): halves where both are equal, all of it to both where one is NaN."""
    shared = tl.where(x == other, grad * 0.5, grad)
    return tl.where(x < other, 0.0, shared), tl.where(x > other, 0.0, shared)


@triton.jit
def frelu_forward_kernel(
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,  # [C] float32, or None for 0
    inverse,  # [C] float32: 1 / deviation, or None for 1
    gamma,  # [C], or None for 1
    beta,  # [C], or None for 0
    output,  # [N, C, H, W]
    height,
    width,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):
    """output = max(x, gamma * (dwconv(x) - mean) * inverse + beta)."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    element = tile_elements(channel, offset, channel_stride)
    known = channel < channels
    valid = known[:, None] & exists[None, :]
    x = tl.load(input + element, valid, 0.0).to(tl.float32)
    z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
    normalized = (z - channel_values(mean, channel, known, 0.0)) * channel_values(inverse, channel, known, 1.0)
    other = normalized * channel_values(gamma, channel, known, 1.0) + channel_values(beta, channel, known, 0.0)
    y = tl.where((x > other) | (x != x), x, other)
    tl.store(output + element, narrow(y, output.dtype.element_ty), valid)


@triton.jit
def frelu_statistics_kernel(
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    means,  # [parts, C] float32
    squares,  # [parts, C] float32: sums of squared distances from the part's mean
    part_pixels,
    height,
    width,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Mean and squared distances of the convolution over a part of the pixels, tile by tile (Chan et al. 1979)."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.zeros([BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_C], tl.float32)
    seen = 0.0
    first = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        element = tile_elements(channel, offset, channel_stride)
        valid = known[:, None] & exists[None, :]
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        size = tl.sum(exists.to(tl.float32), 0)
        share = size / tl.maximum(seen + size, 1.0)
        tile_mean = tl.sum(tl.where(valid, z, 0.0), 1) / tl.maximum(size, 1.0)
        distance = tl.where(valid, z - tile_mean[:, None], 0.0)
        apart = tl.where(size > 0, tile_mean - mean, 0.0)
        square += tl.sum(distance * distance, 1) + apart * apart * seen * share
        mean += apart * share
        seen += size
    row = tl.program_id(0) * channels + channel
    tl.store(means + row, mean, known)
    tl.store(squares + row, square, known)


@triton.jit
def frelu_backward_sums_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,
    inverse,
    gamma,
    beta,
    sums,  # [parts, C] float32: of the gradient that goes through the convolution
    products,  # [parts, C] float32: of it times the normalized convolution
    part_pixels,
    height,
    width,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients to beta and gamma over a part of the pixels."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    product = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    first = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        element = tile_elements(channel, offset, channel_stride)
        valid = known[:, None] & exists[None, :]
        x = tl.load(input + element, valid, 0.0).to(tl.float32)
        grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        normalized = (z - channel_values(mean, channel, known, 0.0)) * channel_values(inverse, channel, known, 1.0)
        other = normalized * channel_values(gamma, channel, known, 1.0) + channel_values(beta, channel, known, 0.0)
        _, through = _split(grad, x, other)
        sum += tl.where(valid, through, 0.0)
        product += tl.where(valid, through * normalized, 0.0)
    row = tl.program_id(0) * channels + channel
    tl.store(sums + row, tl.sum(sum, 1), known)
    tl.store(products + row, tl.sum(product, 1), known)


@triton.jit
def frelu_backward_convolution_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,
    inverse,
    gamma,
    beta,
    grad_beta,  # [C] float32: the sums over all pixels divided by their count, None without statistics
    grad_gamma,  # the same
    grad_convolved,  # [N, C, H, W] float32
    grad_weights,  # [parts, C, TAPS] float32
    part_pixels,
    height,
    width,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    K: tl.constexpr,
    TAPS: tl.constexpr,  # a power of two, no less than K * K
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad_z = (through - grad_beta - normalized * grad_gamma) * gamma * inverse; sums of grad_z * x at each tap."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    tap_sums = tl.zeros([BLOCK_C, TAPS], tl.float32)
    taps = tl.arange(0, TAPS)[None, :]
    first = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        element = tile_elements(channel, offset, channel_stride)
        valid = known[:, None] & exists[None, :]
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        # Loaded after the convolution, whose registers they would take.
        x = tl.load(input + element, valid, 0.0).to(tl.float32)
        grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
        scale = channel_values(inverse, channel, known, 1.0)
        normalized = (z - channel_values(mean, channel, known, 0.0)) * scale
        scale *= channel_values(gamma, channel, known, 1.0)
        other = normalized * channel_values(gamma, channel, known, 1.0) + channel_values(beta, channel, known, 0.0)
        _, through = _split(grad, x, other)
        if grad_beta is not None:
            through -= channel_values(grad_beta, channel, known, 0.0)
            through -= normalized * channel_values(grad_gamma, channel, known, 0.0)
        grad_z = tl.where(valid, through * scale, 0.0)
        tl.store(grad_convolved + element, grad_z, valid)
        for tap in range(K * K):
            dy, dx = tap // K - K // 2, tap % K - K // 2
            moved = _neighbour(input, element, pixel, valid, dy, dx, height, width, pixel_stride)
            tap_sums += tl.where(taps == tap, tl.sum(grad_z * moved, 1)[:, None], 0.0)
    row = (tl.program_id(0) * channels + channel)[:, None] * TAPS + taps
    tl.store(grad_weights + row, tap_sums, known[:, None] & (taps < TAPS))


@triton.jit
def frelu_backward_input_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,
    inverse,
    gamma,
    beta,
    grad_convolved,  # [N, C, H, W] float32
    grad_input,  # [N, C, H, W]
    height,
    width,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad_input = direct + dwconv transposed (grad_z, weight)."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    element = tile_elements(channel, offset, channel_stride)
    known = channel < channels
    valid = known[:, None] & exists[None, :]
    x = tl.load(input + element, valid, 0.0).to(tl.float32)
    grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
    z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
    normalized = (z - channel_values(mean, channel, known, 0.0)) * channel_values(inverse, channel, known, 1.0)
    other = normalized * channel_values(gamma, channel, known, 1.0) + channel_values(beta, channel, known, 0.0)
    direct, _ = _split(grad, x, other)
    back = _convolved(
        grad_convolved, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, -1
    )
    tl.store(grad_input + element, narrow(direct + back, grad_input.dtype.element_ty), valid)


def _sizes(input: Tensor, layout: Tiles) -> tuple[int, ...]:
    return input.shape[2], input.shape[3], *layout.sizes


def _forward(
    input: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    inverse: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
) -> Tensor:
    output, layout = torch.empty_like(input), tiles(input)
    tensors = (input, weight, mean, inverse, gamma, beta, output)
    launch(frelu_forward_kernel, layout.grid, *tensors, *_sizes(input, layout), K=weight.shape[2], **layout.constants)
    return output


def frelu_forward_triton(
    input: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.frelu`."""
    return _forward(input, weight, None, None, scale, shift)


def frelu_batch_norm_forward_triton(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C, H, W], mean and biased variance; arguments as in `cellops.ops.frelu.frelu_batch_norm`."""
    layout = tiles(input)
    means, squares = torch.empty(2, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    sizes = (layout.part_pixels, *_sizes(input, layout))
    tensors = (input, weight, means, squares)
    launch(frelu_statistics_kernel, layout.part_grid, *tensors, *sizes, K=weight.shape[2], **layout.constants)
    mean, variance = combined_statistics(means, squares, layout.total, layout.part_pixels)
    return _forward(input, weight, mean, (variance + eps).rsqrt(), gamma, beta), mean, variance


def _sums(arguments: tuple[Tensor | None, ...], layout: Tiles) -> tuple[Tensor, Tensor]:
    input, weight = arguments[1:3]
    sums, products = torch.empty(2, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    sizes = (layout.part_pixels, *_sizes(input, layout))
    tensors = (*arguments, sums, products)
    launch(frelu_backward_sums_kernel, layout.part_grid, *tensors, *sizes, K=weight.shape[2], **layout.constants)
    return sums.sum(0), products.sum(0)


def _convolution(
    arguments: tuple[Tensor | None, ...], grad_beta: Tensor | None, grad_gamma: Tensor | None, layout: Tiles
) -> tuple[Tensor, Tensor]:
    """Gradients to input and weight."""
    input, weight = arguments[1:3]
    kernel = weight.shape[2]
    taps = power_of_2(kernel * kernel)
    parts = tiles(input, 2048)
    grad_convolved = torch.empty_like(input, dtype=torch.float32)
    grad_weights = torch.empty(parts.parts, parts.channels, taps, dtype=torch.float32, device=input.device)
    launch(
        frelu_backward_convolution_kernel,
        parts.part_grid,
        *(*arguments, grad_beta, grad_gamma, grad_convolved, grad_weights, parts.part_pixels, *_sizes(input, parts)),
        K=kernel,
        TAPS=taps,
        **parts.constants,
        # 16 elements a thread in channels_last, where pixels share the numbers of their channels. In NCHW each has its
        # own masks at every tap, and 16 take up to 226 registers, or fewer and spill: half as many for each thread.
        num_warps=8 if input.is_contiguous() else 4,
    )
    sizes, constants = _sizes(input, layout), {"K": kernel, **layout.constants}
    grad_input = torch.empty_like(input)
    launch(frelu_backward_input_kernel, layout.grid, *arguments, grad_convolved, grad_input, *sizes, **constants)
    return grad_input, grad_weights.sum(0)[:, : kernel * kernel]


def frelu_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu`."""
    layout = tiles(input)
    arguments = (grad_output, input, weight, None, None, scale, shift)
    grad_scale = grad_shift = None
    if (wanted[2] and scale is not None) or (wanted[3] and shift is not None):
        grad_shift, grad_scale = _sums(arguments, layout)
    return *_convolution(arguments, None, None, layout), grad_scale, grad_shift


def frelu_batch_norm_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu_batch_norm`, through the statistics too."""
    layout = tiles(input)
    arguments = (grad_output, input, weight, mean, (var + eps).rsqrt(), gamma, beta)
    grad_beta, grad_gamma = _sums(arguments, layout)
    count = max(layout.total, 1)
    return *_convolution(arguments, grad_beta / count, grad_gamma / count, layout), grad_gamma, grad_beta

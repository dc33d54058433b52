"""What `frelu` and `depthwise_conv2d` share: y = act((z - mean) * scale + shift).

z = dwconv(x, weight); act is one of `_activation.py`'s, or "funnel" for the larger of what it is given and x. With
statistics of the batch, scale is gamma / deviation and shift is beta; without them there is no mean. z is never stored:
every kernel that needs it convolves again, k * k loads for each element, of which all but one hit the first-level cache
(16 bytes wide in channels_last). x itself is read where it is used: without a funnel, the compiler drops the load. The
bytes that each op moves, and its bound, are in the op's own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._activation import activated, slope
from cellops.triton._launch import launch, power_of_2
from cellops.triton._numerics import narrow
from cellops.triton._pixels import (
    Tiles,
    channel_values,
    combined_statistics,
    pixel_elements,
    scales,
    through_statistics,
    tile_elements,
    tiles,
    with_tile,
)


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
def _affine(z, mean, scale, shift, channel, known):
    """z - mean and what the activation is given; an absent tensor counts as 0 (mean, shift) or 1."""
    apart = z - channel_values(mean, channel, known, 0.0)
    return apart, apart * channel_values(scale, channel, known, 1.0) + channel_values(shift, channel, known, 0.0)


@triton.jit
def _split(grad, x, before):
    """The gradients of max(x, before): halves where both are equal, all of it to both where one is NaN."""
    shared = tl.where(x == before, grad * 0.5, grad)
    return tl.where(x < before, 0.0, shared), tl.where(x > before, 0.0, shared)


@triton.jit
def depthwise_forward_kernel(
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,  # [C] float32, or None for 0
    scale,  # [C], or None for 1
    shift,  # [C], or None for 0
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
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """output = act((dwconv(x) - mean) * scale + shift)."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    element = tile_elements(channel, offset, channel_stride)
    known = channel < channels
    valid = known[:, None] & exists[None, :]
    x = tl.load(input + element, valid, 0.0).to(tl.float32)
    z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
    _, before = _affine(z, mean, scale, shift, channel, known)
    if ACTIVATION == "funnel":
        y = tl.where((x > before) | (x != x), x, before)
    else:
        y = activated(before, ACTIVATION)
    tl.store(output + element, narrow(y, output.dtype.element_ty), valid)


@triton.jit
def depthwise_statistics_kernel(
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
    AXIS: tl.constexpr,
):
    """Mean and squared distances of the convolution over a part of the pixels, tile by tile (Chan et al. 1979)."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean = tl.zeros([BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_C], tl.float32)
    seen = 0.0
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        element = tile_elements(channel, offset, channel_stride)
        valid = known[:, None] & exists[None, :]
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        mean, square, seen = with_tile(mean, square, seen, z, valid, tl.sum(exists.to(tl.float32), 0), 1)
    row = tl.program_id(AXIS) * channels + channel
    tl.store(means + row, mean, known)
    tl.store(squares + row, square, known)


@triton.jit
def depthwise_backward_sums_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,
    scale,
    shift,
    sums,  # [parts, C] float32: of the gradient that goes through the convolution
    products,  # [parts, C] float32: of it times z - mean
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
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Sums over a part of the pixels: the gradient to shift, and that to scale."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    product = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        element = tile_elements(channel, offset, channel_stride)
        valid = known[:, None] & exists[None, :]
        if ACTIVATION == "funnel":
            x = tl.load(input + element, valid, 0.0).to(tl.float32)
            grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        apart, before = _affine(z, mean, scale, shift, channel, known)
        if ACTIVATION == "funnel":
            _, through = _split(grad, x, before)
        else:  # loaded before the convolution, the gradient takes a register too many on sm_100
            through = tl.load(grad_output + element, valid, 0.0).to(tl.float32) * slope(before, ACTIVATION)
        sum += tl.where(valid, through, 0.0)
        product += tl.where(valid, through * apart, 0.0)
    row = tl.program_id(AXIS) * channels + channel
    tl.store(sums + row, tl.sum(sum, 1), known)
    tl.store(products + row, tl.sum(product, 1), known)


@triton.jit
def depthwise_backward_convolution_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,
    scale,
    shift,
    of_mean,  # [C] float32: what is taken from grad_z for z's part in the mean, None without statistics
    of_apart,  # [C] float32: what for its part in the deviation, times z - mean
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
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """grad_z = through * scale - of_mean - (z - mean) * of_apart; sums of grad_z * x at each tap."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    tap_sums = tl.zeros([BLOCK_C, TAPS], tl.float32)
    taps = tl.arange(0, TAPS)[None, :]
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        element = tile_elements(channel, offset, channel_stride)
        valid = known[:, None] & exists[None, :]
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        # Loaded after the convolution, whose registers they would take.
        x = tl.load(input + element, valid, 0.0).to(tl.float32)
        grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
        apart, before = _affine(z, mean, scale, shift, channel, known)
        if ACTIVATION == "funnel":
            _, through = _split(grad, x, before)
        else:
            through = grad * slope(before, ACTIVATION)
        grad_z = through * channel_values(scale, channel, known, 1.0)
        if of_mean is not None:
            grad_z -= channel_values(of_mean, channel, known, 0.0)
            grad_z -= apart * channel_values(of_apart, channel, known, 0.0)
        grad_z = tl.where(valid, grad_z, 0.0)
        tl.store(grad_convolved + element, grad_z, valid)
        for tap in range(K * K):
            dy, dx = tap // K - K // 2, tap % K - K // 2
            moved = _neighbour(input, element, pixel, valid, dy, dx, height, width, pixel_stride)
            tap_sums += tl.where(taps == tap, tl.sum(grad_z * moved, 1)[:, None], 0.0)
    row = (tl.program_id(AXIS) * channels + channel)[:, None] * TAPS + taps
    tl.store(grad_weights + row, tap_sums, known[:, None] & (taps < TAPS))


@triton.jit
def depthwise_backward_input_kernel(
    grad_output,  # [N, C, H, W], or None without a funnel: nothing but the convolution's gradient reaches x
    input,  # [N, C, H, W], or None likewise
    weight,  # [C, K, K]
    mean,
    scale,
    shift,
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
    AXIS: tl.constexpr,
):
    """grad_input = dwconv transposed (grad_z, weight), and the gradient of max(x, before) to x itself."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, offset = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    element = tile_elements(channel, offset, channel_stride)
    known = channel < channels
    valid = known[:, None] & exists[None, :]
    if grad_output is not None:
        x = tl.load(input + element, valid, 0.0).to(tl.float32)
        grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
        z = _convolved(input, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, 1)
        _, before = _affine(z, mean, scale, shift, channel, known)
        direct, _ = _split(grad, x, before)
    back = _convolved(
        grad_convolved, element, pixel, valid, weight, channel, channels, height, width, pixel_stride, K, -1
    )
    if grad_output is not None:
        back = direct + back
    tl.store(grad_input + element, narrow(back, grad_input.dtype.element_ty), valid)


def _sizes(input: Tensor, layout: Tiles) -> tuple[int, ...]:
    return input.shape[2], input.shape[3], *layout.sizes


def _output(
    input: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    output, layout = torch.empty_like(input), tiles(input)
    tensors = (input, weight, mean, scale, shift, output)
    constants: dict[str, Any] = {"K": weight.shape[2], "ACTIVATION": activation, **layout.constants}
    launch(depthwise_forward_kernel, layout.grid, *tensors, *_sizes(input, layout), **constants)
    return output


def forward(input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    """act(scale * dwconv(input, weight) + shift), [N, C, H, W]."""
    return _output(input, weight, None, scale, shift, activation)


def batch_norm_forward(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """act(gamma * (z - mean) / deviation + beta), [N, C, H, W]; mean and biased variance [C] of z = dwconv(x)."""
    layout = tiles(input)
    means, squares = torch.empty(2, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    sizes = (layout.part_pixels, *_sizes(input, layout))
    tensors = (input, weight, means, squares)
    launch(depthwise_statistics_kernel, layout.part_grid, *tensors, *sizes, K=weight.shape[2], **layout.constants)
    mean, variance = combined_statistics(means, squares, layout.total, layout.part_pixels)
    _, scale = scales(variance, gamma, eps)
    return _output(input, weight, mean, scale, beta, activation), mean, variance


def _sums(arguments: tuple[Tensor | None, ...], activation: str, layout: Tiles) -> tuple[Tensor, Tensor]:
    """Gradients to shift and scale."""
    input, weight = arguments[1:3]
    sums, products = torch.empty(2, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    tensors = (*arguments, sums, products)
    sizes = (layout.part_pixels, *_sizes(input, layout))
    constants: dict[str, Any] = {"K": weight.shape[2], "ACTIVATION": activation, **layout.constants}
    launch(depthwise_backward_sums_kernel, layout.part_grid, *tensors, *sizes, **constants)
    return sums.sum(0), products.sum(0)


def _convolution(
    arguments: tuple[Tensor | None, ...],
    of_mean: Tensor | None,
    of_apart: Tensor | None,
    activation: str,
    layout: Tiles,
) -> tuple[Tensor, Tensor]:
    """Gradients to input and weight."""
    input, weight = arguments[1:3]
    kernel = weight.shape[2]
    taps = power_of_2(kernel * kernel)
    funnel = activation == "funnel"
    parts = tiles(input, 2048)
    grad_convolved = torch.empty_like(input, dtype=torch.float32)
    grad_weights = torch.empty(parts.parts, parts.channels, taps, dtype=torch.float32, device=input.device)
    launch(
        depthwise_backward_convolution_kernel,
        parts.part_grid,
        *(*arguments, of_mean, of_apart, grad_convolved, grad_weights, parts.part_pixels, *_sizes(input, parts)),
        K=kernel,
        TAPS=taps,
        ACTIVATION=activation,
        **parts.constants,
        # 8 elements a thread. In NCHW each has its own masks at every tap: 16 take up to 226 registers, or spill, as in
        # channels_last the funnel's do.
        num_warps=8,
    )
    grad_input = torch.empty_like(input)
    launch(
        depthwise_backward_input_kernel,
        layout.grid,
        *(arguments if funnel else (None, None, weight, None, None, None)),
        *(grad_convolved, grad_input, *_sizes(input, layout)),
        K=kernel,
        **layout.constants,
        # Of float32 alone a thread takes four numbers, 16 bytes, in 32 registers; of eight one spills in float16.
        num_warps=4 if funnel else 8,
    )
    return grad_input, grad_weights.sum(0)[:, : kernel * kernel]


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `forward`."""
    layout = tiles(input)
    arguments = (grad_output, input, weight, None, scale, shift)
    grad_scale = grad_shift = None
    if (wanted[2] and scale is not None) or (wanted[3] and shift is not None):
        grad_shift, grad_scale = _sums(arguments, activation, layout)
    return *_convolution(arguments, None, None, activation, layout), grad_scale, grad_shift


def batch_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `batch_norm_forward`, through the statistics too."""
    layout = tiles(input)
    inverse, scale = scales(var, gamma, eps)
    arguments = (grad_output, input, weight, mean, scale, beta)
    grad_beta, grad_scale = _sums(arguments, activation, layout)
    grad_gamma, of_mean, of_apart = through_statistics(grad_beta, grad_scale, inverse, scale, layout.total)
    return *_convolution(arguments, of_mean, of_apart, activation, layout), grad_gamma, grad_beta

"""What `frelu` and `depthwise_conv2d` launch; the kernels, and what they compute, are in `_depthwise_kernels.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from cellops.triton._depthwise_kernels import (
    depthwise_backward_convolution_kernel,
    depthwise_backward_input_kernel,
    depthwise_backward_sums_kernel,
    depthwise_forward_kernel,
    depthwise_statistics_kernel,
)
from cellops.triton._launch import ceil_div, launch, multiprocessors, power_of_2
from cellops.triton._statistics import batch_gradients, batch_scale, batch_statistics

THREADS = 128


@dataclass(frozen=True)
class Strips:
    """How images are cut into strips for the lanes, and strips into blocks for programs and parts for sums.

    What is launched is worked out once for all calls of the same sizes.
    """

    columns: int  # of a strip
    rows: int
    across: int  # strips side by side in an image
    of_image: int
    total: int
    image: tuple[int, int]
    channels: int
    image_elements: int
    channel_stride: int
    pixel_stride: int
    block_c: int
    block_p: int
    wide: bool
    parts: int
    part_strips: int  # a multiple of block_p

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' arguments in order."""
        counts = (self.channels, self.across, self.of_image, self.total, self.rows)
        return *self.image, *counts, self.image_elements, self.channel_stride, self.pixel_stride

    @cached_property
    def part_sizes(self) -> tuple[int, ...]:
        """The same of kernels that sum up parts."""
        return self.part_strips, *self.sizes

    @cached_property
    def launched(self) -> dict[str, Any]:
        """What every launch is given by name."""
        constants = {"COLUMNS": self.columns, "BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "WIDE": self.wide}
        return {"channels_together": self.channel_stride == 1, **constants}

    @cached_property
    def ragged(self) -> bool:
        """Whether some strips reach beyond their image."""
        return self.image[0] % self.rows > 0 or self.image[1] % self.columns > 0

    @cached_property
    def grid(self) -> tuple[int, int]:
        """A program for each block of strips."""
        return ceil_div(self.total, self.block_p), ceil_div(self.channels, self.block_c)

    @cached_property
    def part_grid(self) -> tuple[int, int]:
        """A program for each part."""
        return self.parts, ceil_div(self.channels, self.block_c)


def strips(image: Tensor, kernel: int, most: int = 4, columns: int = 4) -> Strips:
    """Strips for an image [N, C, H, W], dense in either memory format.

    Neighbouring lanes have neighbouring channels, or neighbouring strips in NCHW. A lane has as many elements of a
    pixel as leave its weights and sums in registers: four for 3x3, one for 7x7 (larger windows spill).

    Strips are as long as the image is high, cut in halves until there are four programs for each multiprocessor, or
    strips of four rows: K - 1 more rows than a strip has are read. Sums take about twelve programs for each
    multiprocessor, over parts that depend on sizes alone: the order of additions is fixed.

    Args:
        image: what is convolved.
        kernel: the window's size.
        most: elements of a pixel for each lane.
        columns: of a strip in channels_last; two in NCHW.
    """
    return _strips(image.shape, image.is_contiguous(), multiprocessors(image.device), kernel, most, columns)


@lru_cache(maxsize=4096)
def _strips(shape: tuple[int, ...], nchw: bool, side_by_side: int, kernel: int, most: int, columns: int) -> Strips:
    batch, channels, height, width = shape
    elements = THREADS * min(most, 4 if kernel <= 3 else 2 if kernel <= 5 else 1)
    if nchw:
        strides, columns, elements = (height * width, 1), 2, THREADS * min(most, 2)
        across = ceil_div(width, columns)
        block_p = power_of_2(batch * across * ceil_div(height, 4), 16, elements)
        block_c = power_of_2(channels, 1, elements // block_p)
    else:
        strides, block_c = (1, channels), power_of_2(channels, 16, 64)
        across = ceil_div(width, columns)
        block_p = elements // block_c
    blocks_c, rows = ceil_div(channels, block_c), max(height, 1)
    wanted = 4 * side_by_side
    while rows > 4 and ceil_div(batch * across * ceil_div(height, rows), block_p) * blocks_c < wanted:
        rows = ceil_div(rows, 2)
    of_image = across * ceil_div(height, rows)
    total = batch * of_image
    part_blocks = ceil_div(ceil_div(total, block_p), ceil_div(3 * wanted, blocks_c))
    part_strips = max(part_blocks, 1) * block_p
    return Strips(
        columns=columns,
        rows=rows,
        across=across,
        of_image=of_image,
        total=total,
        image=(height, width),
        channels=channels,
        image_elements=channels * height * width,
        channel_stride=strides[0],
        pixel_stride=strides[1],
        block_c=block_c,
        block_p=block_p,
        wide=math.prod(shape) >= 2**31 or total + part_strips >= 2**31,  # the last part may end beyond
        parts=ceil_div(total, part_strips),
        part_strips=part_strips,
    )


def _output(
    input: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
) -> Tensor:
    output, layout = torch.empty_like(input), strips(input, weight.shape[2])
    tensors = (input, weight, mean, scale, shift, output)
    constants: dict[str, Any] = {"K": weight.shape[2], "ACTIVATION": activation, **layout.launched}
    launch(depthwise_forward_kernel, layout.grid, tensors, layout.sizes, **constants)
    return output


def forward(input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str) -> Tensor:
    """act(scale * dwconv(input, weight) + shift), [N, C, H, W]."""
    return _output(input, weight, None, scale, shift, activation)


def batch_norm_forward(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """act(gamma * (z - mean) / deviation + beta), [N, C, H, W]; mean and biased variance [C] of z = dwconv(x)."""
    layout = strips(input, weight.shape[2])
    means, squares = torch.empty(2, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    sizes = torch.empty(layout.parts, dtype=torch.float32, device=input.device)
    tensors = (input, weight, means, squares, sizes)
    constants = {"K": weight.shape[2], **layout.launched}
    launch(depthwise_statistics_kernel, layout.part_grid, tensors, layout.part_sizes, **constants)
    total = input.shape[0] * input.shape[2] * input.shape[3]
    mean, variance, scale = batch_statistics(means, squares, sizes, layout.part_strips, total, gamma, eps)
    return _output(input, weight, mean, scale, beta, activation), mean, variance


def _sums(arguments: tuple[Tensor | None, ...], activation: str) -> Tensor:
    """Gradients to shift and scale, [2, parts, C]."""
    input, weight = arguments[1:3]
    layout = strips(input, weight.shape[2])
    sums = torch.empty(2, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    tensors = (*arguments, *sums)
    constants: dict[str, Any] = {"K": weight.shape[2], "ACTIVATION": activation, **layout.launched}
    launch(depthwise_backward_sums_kernel, layout.part_grid, tensors, layout.part_sizes, **constants)
    return sums


def _convolution(
    arguments: tuple[Tensor | None, ...], of_mean: Tensor | None, of_apart: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """Gradients to input and weight."""
    input, weight = arguments[1:3]
    kernel, funnel = weight.shape[2], activation == "funnel"
    # A lane has the sums of all taps and a window of the input besides.
    parts = strips(input, kernel, 2, 4) if kernel <= 3 else strips(input, kernel, 1, 2)
    grad_convolved = torch.empty_like(input, dtype=torch.float32)
    grad_weights = torch.empty(parts.parts, parts.channels, kernel * kernel, dtype=torch.float32, device=input.device)
    tensors = (*arguments, of_mean, of_apart, grad_convolved, grad_weights)
    constants: dict[str, Any] = {"K": kernel, "ACTIVATION": activation, "RAGGED": parts.ragged, **parts.launched}
    launch(depthwise_backward_convolution_kernel, parts.part_grid, tensors, parts.part_sizes, **constants)
    layout = strips(input, kernel, 2 if funnel else 4)  # a funnel's has two windows, and rows of three tensors ahead
    grad_input = torch.empty_like(input)
    # Without a funnel nothing but the convolution's gradient reaches the input.
    tensors = arguments if funnel else (None, None, weight, None, None, None)
    constants = {"K": kernel, **layout.launched}
    tensors = (*tensors, grad_convolved, grad_input)
    launch(depthwise_backward_input_kernel, layout.grid, tensors, layout.sizes, **constants)
    return grad_input, grad_weights.sum(0)


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
    arguments = (grad_output, input, weight, None, scale, shift)
    grad_scale = grad_shift = None
    if (wanted[2] and scale is not None) or (wanted[3] and shift is not None):
        grad_shift, grad_scale = (part.sum(0) for part in _sums(arguments, activation))  # tensors of their own
    return *_convolution(arguments, None, None, activation), grad_scale, grad_shift


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
    arguments = (grad_output, input, weight, mean, batch_scale(var, gamma, eps), beta)
    total = input.shape[0] * input.shape[2] * input.shape[3]
    sums, products = _sums(arguments, activation)
    grad_gamma, grad_beta, of_mean, of_apart = batch_gradients(sums, products, var, gamma, eps, total)
    return *_convolution(arguments, of_mean, of_apart, activation), grad_gamma, grad_beta

"""Grouped 1x1 convolution with what follows it, in Triton: y = shuffle(act(gamma * n + beta)).

n = (z - mean) / deviation and z = conv(x, weight), group by group; the call without statistics has mean 0 and deviation
1. z is never stored: every kernel multiplies again, 2 * C/G operations for each output, which the tensor cores do far
faster than memory delivers.

Passes over memory for x of B bytes and y of as many (bound on an H200: passes * B / 4.3 TB/s):
    forward                     2: read x, write y; that is the floor
    training forward            3: read x for the statistics, then the same
    backward                    5: x and grad_output for the input's gradient, which is written; both for the weight's
    backward with statistics    2 more, for the sums that the statistics' gradients need (without: for scale and shift)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops.triton._group_conv1x1 import (
    group_conv1x1_backward_input_kernel,
    group_conv1x1_backward_sums_kernel,
    group_conv1x1_backward_weight_kernel,
    group_conv1x1_forward_kernel,
    group_conv1x1_statistics_kernel,
)
from cellops.triton._launch import ceil_div, dot_precision, launch, multiprocessors, power_of_2
from cellops.triton._statistics import batch_gradients, batch_scale, batch_statistics


class _Geometry(NamedTuple):
    """A call by its sizes, and its blocks; `sizes` are the kernels' arguments in order."""

    sizes: tuple[int, ...]
    total: int  # pixels of all images
    out_channels: int
    in_blocks: int  # of all groups
    out_blocks: int
    block_p: int
    constants: dict[str, Any]

    @property
    def launched(self) -> dict[str, Any]:
        """What every launch is given by name. In channels_last groups share lines: 16 halves are 32 bytes of 128."""
        return {"channels_together": self.constants["LAST"], **self.constants}

    def parts(self, programs: int, device: torch.device, more: int = 1) -> tuple[int, int]:
        """Parts of the pixels, and pixels of each, where a kernel has `programs` for each part."""
        wanted = ceil_div(4 * more * multiprocessors(device), programs)
        part_pixels = max(ceil_div(ceil_div(self.total, self.block_p), wanted), 1) * self.block_p
        return ceil_div(self.total, part_pixels), part_pixels


def _geometry(input: Tensor, weight: Tensor, groups: int) -> _Geometry:
    """Tiles of 64 or 128 pixels and up to 64 channels of a group: 16-byte loads where it has 8 of a half type."""
    return _geometry_of(input.shape, weight.shape, input.is_contiguous(), input.element_size(), groups, dot_precision())


@lru_cache(maxsize=4096)
def _geometry_of(
    input: tuple[int, ...], weight: tuple[int, ...], nchw: bool, element_size: int, groups: int, precision: str
) -> _Geometry:
    batch, channels, height, width = input
    out_channels, group_in, pixels = weight[0], weight[1], height * width
    group_out = out_channels // groups
    if nchw:
        strides = (pixels, 1, pixels, 1)
    else:
        strides = (1, channels, 1, out_channels)
    block_o, block_c = power_of_2(group_out, 16, 64), power_of_2(group_in, 16, 64)
    block_p = 128 if max(block_o, block_c) <= 32 and element_size == 2 else 64  # 128 of float32 spill
    wide = batch * max(channels, out_channels, 2) * pixels >= 2**31  # the last part may end beyond
    return _Geometry(
        sizes=(batch * pixels, pixels, channels, out_channels, groups, group_in, group_out, *strides),
        total=batch * pixels,
        out_channels=out_channels,
        in_blocks=groups * ceil_div(group_in, block_c),
        out_blocks=groups * ceil_div(group_out, block_o),
        block_p=block_p,
        constants={
            "IN_BLOCKS": ceil_div(group_in, block_c),
            "OUT_BLOCKS": ceil_div(group_out, block_o),
            "BLOCK_P": block_p,
            "BLOCK_O": block_o,
            "BLOCK_C": block_c,
            "PRECISION": precision,
            "LAST": not nchw,
            "WIDE": wide,
        },
    )


def _forward(
    tensors: tuple[Tensor | None, ...], geometry: _Geometry, groups: int, activation: str, shuffle: bool
) -> Tensor:
    input = tensors[0]
    shape = (input.shape[0], geometry.out_channels, *input.shape[2:])
    memory_format = torch.contiguous_format if input.is_contiguous() else torch.channels_last
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    grid = (ceil_div(geometry.total, geometry.block_p), geometry.out_blocks)
    settings: dict[str, Any] = {"ACTIVATION": activation, "SHUFFLE": shuffle}
    launch(group_conv1x1_forward_kernel, grid, (*tensors, output), geometry.sizes, **settings, **geometry.launched)
    return output


def group_conv1x1_forward_triton(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    activation: str,
    shuffle: bool,
) -> Tensor:
    """[N, O, H, W]; arguments as in `cellops.group_conv1x1`."""
    tensors = (input, weight, None, scale, shift)
    return _forward(tensors, _geometry(input, weight, groups), groups, activation, shuffle)


def group_conv1x1_batch_norm_forward_triton(
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    groups: int,
    activation: str,
    shuffle: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, O, H, W], mean and biased variance; arguments as in `group_conv1x1_batch_norm`."""
    geometry = _geometry(input, weight, groups)
    parts, part_pixels = geometry.parts(geometry.out_blocks, input.device)
    means, squares = torch.empty(2, parts, geometry.out_channels, dtype=torch.float32, device=input.device)
    grid, sizes = (parts, geometry.out_blocks), (part_pixels, *geometry.sizes)
    launch(group_conv1x1_statistics_kernel, grid, (input, weight, means, squares), sizes, **geometry.launched)
    mean, variance, scale = batch_statistics(means, squares, None, part_pixels, geometry.total, gamma, eps)
    tensors = (input, weight, mean, scale, beta)
    return _forward(tensors, geometry, groups, activation, shuffle), mean, variance


def _sums(tensors: tuple[Tensor | None, ...], geometry: _Geometry, settings: dict[str, Any]) -> Tensor:
    """Gradients to shift and scale, [2, parts, O]."""
    device = tensors[1].device
    parts, part_pixels = geometry.parts(geometry.out_blocks, device)
    sums = torch.empty(2, parts, geometry.out_channels, dtype=torch.float32, device=device)
    grid, sizes = (parts, geometry.out_blocks), (part_pixels, *geometry.sizes)
    constants = {**settings, **geometry.launched}
    warps = 8 if constants["BLOCK_O"] == 64 else 4  # two sums of 32 numbers a thread spill
    launch(group_conv1x1_backward_sums_kernel, grid, (*tensors, *sums), sizes, num_warps=warps, **constants)
    return sums


def _convolution(
    tensors: tuple[Tensor | None, ...], geometry: _Geometry, settings: dict[str, Any], wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to input and weight, those that are wanted."""
    input, weight = tensors[1:3]
    constants = {**settings, **geometry.launched}
    grad_input = grad_weight = None
    if wanted[0]:
        grad_input = torch.empty_like(input)
        grid = (ceil_div(geometry.total, geometry.block_p), geometry.in_blocks)
        launch(group_conv1x1_backward_input_kernel, grid, (*tensors, grad_input), geometry.sizes, **constants)
    if wanted[1]:
        programs = geometry.in_blocks * geometry.out_blocks // geometry.sizes[4]
        # A product of 16x16 is no work for four warps, and 64 pixels of more channels, or of float32, spill.
        widest = max(constants["BLOCK_O"], constants["BLOCK_C"])
        constants["BLOCK_P"] = 64 if widest == 16 and input.element_size() == 2 else 32
        geometry, warps = geometry._replace(block_p=constants["BLOCK_P"]), 1 if widest == 16 else 4
        parts, part_pixels = geometry.parts(programs, input.device, 4 // warps)
        grad_weights = torch.empty(parts, *weight.shape[:2], dtype=torch.float32, device=input.device)
        grid, tensors, sizes = (parts, programs), (*tensors, grad_weights), (part_pixels, *geometry.sizes)
        launch(group_conv1x1_backward_weight_kernel, grid, tensors, sizes, num_warps=warps, **constants)
        grad_weight = grad_weights.sum(0)
    return grad_input, grad_weight


def group_conv1x1_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    activation: str,
    shuffle: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `group_conv1x1`."""
    geometry = _geometry(input, weight, groups)
    settings = {"ACTIVATION": activation, "SHUFFLE": shuffle}
    tensors = (grad_output, input, weight, None, scale, shift)
    grad_scale = grad_shift = None
    if (wanted[2] and scale is not None) or (wanted[3] and shift is not None):
        grad_shift, grad_scale = (part.sum(0) for part in _sums(tensors, geometry, settings))  # tensors of their own
    return *_convolution((*tensors, None, None), geometry, settings, wanted), grad_scale, grad_shift


def group_conv1x1_batch_norm_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    groups: int,
    activation: str,
    shuffle: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `group_conv1x1_batch_norm`, through the statistics too."""
    geometry = _geometry(input, weight, groups)
    settings = {"ACTIVATION": activation, "SHUFFLE": shuffle}
    tensors = (grad_output, input, weight, mean, batch_scale(var, gamma, eps), beta)
    sums, products = _sums(tensors, geometry, settings)
    grad_gamma, grad_beta, *of_statistics = batch_gradients(sums, products, var, gamma, eps, geometry.total)
    return *_convolution((*tensors, *of_statistics), geometry, settings, wanted), grad_gamma, grad_beta

"""The funnel activation in CUDA C++ (csrc/cuda/frelu.h): the tiles its kernels take, and what is left to small tensors.

The batch's statistics come from sums over a fixed number of parts that depends on the sizes alone, added up in float64:
results are the same from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _native
from cellops.cuda._launch import launch, storage

SHARED_BYTES = 48 << 10
"""Of a block's shared memory: what every device has."""

THREADS = 128
BLOCKS = 528
"""Blocks that sum up: four for each of an H200's multiprocessors."""


class Tile(NamedTuple):
    """What a block takes at a time."""

    channels: int
    rows: int
    columns: int


def tile_of(input: Tensor, kernel: int, backward: bool) -> Tile | None:
    """The largest tile of 64 channels x 64 pixels (channels_last) or 2048 pixels (NCHW) that fits in shared memory.

    None where not even one pixel's window does.
    """
    channels, height, width = input.shape[1:]
    pack = 16 // input.element_size()
    if input.is_contiguous():
        rows, columns = min(-(-height // 8) * 8, 32), min(-(-width // pack) * pack, 64)
        block = min(_power_of_2_within(max(2048 // (rows * columns), 1)), _power_of_2(channels), 64)
    else:
        rows, columns, block = min(height, 8), min(width, 8), min(_power_of_2(channels), 64)
    while _shared_bytes(input, Tile(block, rows, columns), kernel, backward) > SHARED_BYTES:
        if block > 1:
            block //= 2
        elif rows > 1:
            rows = -(-rows // 2)
        elif columns > 1:
            columns = -(-columns // 2)
        else:
            return None
    return Tile(block, rows, columns)


def refuses(shapes: Sequence[Any], dtype: torch.dtype, channels_last: bool) -> str | None:
    """Why the kernels cannot take these sizes; what backward cannot is not begun by forward."""
    input = _without_data(shapes[0], dtype, channels_last)
    tile = tile_of(input, shapes[1][2], backward=True)
    if tile is None:
        return "with backward, the window of its weight does not fit in 48 KiB of shared memory"
    if _tiles(input, tile) * -(-shapes[0][1] // tile.channels) >= 2**31:
        return "its CUDA kernels take fewer than 2^31 tiles"
    return None


def _without_data(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """For what is found from an input's sizes."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def _tiles(input: Tensor, tile: Tile) -> int:
    """Of one block of channels."""
    batch, _, height, width = input.shape
    return batch * -(-height // tile.rows) * -(-width // tile.columns)


def _shared_bytes(input: Tensor, tile: Tile, kernel: int, backward: bool) -> int:
    """What csrc/cuda/frelu.h asks for; it checks this again."""

    def elements(halo: int, pack: int) -> int:
        height = tile.rows + 2 * halo
        if not input.is_contiguous():
            return height * (tile.columns + 2 * halo) * tile.channels
        before = -(-halo // pack) * pack
        return tile.channels * height * (-(-(before + tile.columns + halo) // pack) * pack)

    half, size = kernel // 2, input.element_size()
    if not backward:
        return max(elements(half, 16 // size) * size, 3 * THREADS * 4)
    return -(-elements(2 * half, 16 // size) // 8) * 8 * size + 4 * (elements(half, 1) + elements(0, 1) + THREADS)


def _power_of_2(size: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(size - 1, 0).bit_length()


def _power_of_2_within(size: int) -> int:
    """The largest that is no more."""
    return 1 << (size.bit_length() - 1)


def _params(input: Tensor, weight: Tensor, backward: bool = False) -> tuple[Any, int]:
    """The library's parameters, and the number of parts."""
    return _params_of(input.shape, not input.is_contiguous(), input.dtype, weight.shape[2], backward)


@lru_cache(maxsize=4096)
def _params_of(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, kernel: int, backward: bool
) -> tuple[Any, int]:
    batch, channels, height, width = shape
    input = _without_data(shape, dtype, channels_last)
    tile = tile_of(input, kernel, backward)
    if tile is None:
        raise ValueError(
            f"weight must have a window that fits in {SHARED_BYTES >> 10} KiB of shared memory with backend='cuda', "
            f"got {kernel} x {kernel}"
        )
    parts = max(min(_tiles(input, tile), BLOCKS // -(-channels // tile.channels)), 1)
    params = _native.library().FreluTileParams(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        kernel=kernel,
        channel_block=tile.channels,
        rows=tile.rows,
        columns=tile.columns,
        parts=parts,
        dtype=storage(input),
        channels_last=not input.is_contiguous(),
    )
    return params, parts


def _wide(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()


def _forward(input: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    output = torch.empty_like(input)
    launch("frelu_forward", _params(input, weight)[0], input, weight, mean, scale, shift, output)
    return output


def frelu_forward_cuda(
    input: Tensor, weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.frelu`, the input dense in either memory format."""
    return _forward(input, weight, None, _wide(scale), _wide(shift))


def frelu_batch_norm_forward_cuda(
    input: Tensor, weight: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[N, C, H, W], mean and biased variance; arguments as in `cellops.ops.frelu.frelu_batch_norm`."""
    params, parts = _params(input, weight)
    found = input.new_zeros(parts, 3, input.shape[1], dtype=torch.float32)
    launch("frelu_statistics", params, input, weight, found)
    counts, means, squares = found.double().unbind(1)
    count = input.numel() // input.shape[1]
    center = (counts * means).sum(0) / count
    mean = center.float()
    variance = ((squares + counts * (means - center).square()).sum(0) / count).float()
    scale = (variance + eps).rsqrt() * (1.0 if gamma is None else gamma.float())
    return _forward(input, weight, mean, scale, _wide(beta)), mean, variance


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    affine: tuple[Tensor | None, ...],
    by: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    """The input's gradient; and [C, k * k + 2], gradients of the taps and the two sums of the gradient through.

    Args:
        affine: mean, scale and shift.
        by: what the statistics add to the convolution's gradient, a factor of (convolution - mean) and a constant.
    """
    params, parts = _params(input, weight, backward=True)
    grad_input = torch.empty_like(input)
    sums = input.new_zeros(parts, input.shape[1], weight[0].numel() + 2, dtype=torch.float32)
    launch("frelu_backward", params, grad_output, input, weight, *affine, *by, grad_input, sums)
    return grad_input, sums.sum(0)


def frelu_backward_cuda(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the tensors of `frelu`."""
    grad_input, sums = _backward(grad_output, input, weight, (None, _wide(scale), _wide(shift)))
    return grad_input, sums[:, :-2], sums[:, -1].clone(), sums[:, -2].clone()  # tensors of their own


def frelu_batch_norm_backward_cuda(
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
    inverse = (var + eps).rsqrt()
    affine = (mean, inverse * (1.0 if gamma is None else gamma.float()), _wide(beta))
    params, parts = _params(input, weight)
    sums = input.new_zeros(parts, 2, input.shape[1], dtype=torch.float32)
    launch("frelu_sums", params, grad_output, input, weight, *affine, sums)
    grad_beta, products = sums.sum(0)
    count = max(input.numel() // input.shape[1], 1)
    by = (-affine[1] * inverse.square() * products / count, -affine[1] * grad_beta / count)
    grad_input, taps = _backward(grad_output, input, weight, affine, by)
    return grad_input, taps[:, :-2], products * inverse, grad_beta

"""Deformable convolution in Triton: what is launched, with which blocks. The kernels are in `_deform_conv2d_*.py`.

With P = N * OH * OW output pixels and E bytes an element, forward does 2 * P * O * C/G * taps operations in products
and about 8 * P * C * taps in blending. It must move E * (N*C*H*W + P*O + 3 * P * taps * D + weight) bytes; it reads
four corners for every sample, 4 * E * P * taps * C bytes, nearly all of which hit the caches, once for every BLOCK_O
output channels. At 32,64,56,64 in bfloat16 that is 7.4 GFLOP of products, 10 us at 780 TFLOP/s, and 31 MB, 7 us at
4.3 TB/s, beside 462 MB through the first-level caches, 16 us at 128 bytes a clock (1.7 GHz) for each of an H200's 132
multiprocessors: the caches are the bound.
Backward multiplies twice as much, gathers twice (for the weight, and for offset and mask) and adds four corners for
every sample to the input's gradient in float32: 925 MB of additions at the L2 cache, the bound of backward there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops.triton._deform_conv2d_backward import (
    deform_conv2d_backward_data_kernel,
    deform_conv2d_backward_input_kernel,
    deform_conv2d_backward_weight_kernel,
)
from cellops.triton._deform_conv2d_forward import deform_conv2d_depthwise_forward_kernel, deform_conv2d_forward_kernel
from cellops.triton._launch import (
    Limits,
    ceil_div,
    dot_precision,
    image_slices,
    launch,
    limits_of,
    multiprocessors,
    power_of_2,
)

SCRATCH_BYTES = 4 << 20
"""Images that must be copied (NCHW ones, and float32 gradients of others) are taken this many bytes at a time."""

CHUNK_BYTES = 64
"""Of channels that four threads gather at a time: `_deform_conv2d.py` says why. Half of it in float32, depthwise and
for 128 output channels, where some kernels would spill."""

Pair = Sequence[int]


class Blocks(NamedTuple):
    """A configuration: pixels, output channels and input channels of a program's step, and how it is compiled."""

    p: int
    o: int
    c: int
    num_warps: int
    num_stages: int

    @property
    def compiled(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@cache
def forward_blocks(group_out: int, segment: int, element_size: int, limits: Limits) -> Blocks:
    """As many output channels as there are, up to 256: the input is sampled again for each further block of them.

    64 pixels: up to 64 output channels of a half type three programs then have room beside each other on an H200. 128
    for 128 of them, and with 16 channels: there fewer spill on a B200. One stage: a second one would copy the corners
    to shared memory by instructions that pass by the first-level cache, where nearly all of them are. 64 bytes of
    channels at a time, 128 where there are few sums.

    Args:
        group_out: output channels of a group.
        segment: input channels that share a group and an offset group.
        element_size: bytes of the storage type.
        limits: of the device.
    """
    block_o = power_of_2(group_out, 16, 256 if element_size == 2 and not limits.small else 128)
    block_c = power_of_2(segment, 16, (128 if block_o * element_size <= 128 else 64) // element_size)
    many = block_o * element_size == 256 and element_size == 2
    return Blocks(128 if many or block_c * element_size == 32 else 64, block_o, block_c, 8, 1)


@cache
def backward_blocks(group_out: int, segment: int, element_size: int, limits: Limits) -> Blocks:
    """Blocks of the gradients to input, offset and mask: a tile of gradients, four corners and their sums at a time.

    Half the input channels in float32, whose product is three: more spills. One stage: two spill on a B200.
    """
    block_c = power_of_2(segment, 16, 64 // element_size if limits.small or element_size == 4 else 128 // element_size)
    return _blocks(64, power_of_2(group_out, 16, (64 if limits.small else 128) // element_size), block_c)


@cache
def weight_blocks(group_out: int, segment: int, element_size: int, limits: Limits) -> Blocks:
    """Blocks of the gradient to the weight; the samples are taken again for each further block of output channels.

    One stage, as in forward; half the pixels with 128 output channels, or they spill. Four warps for these on an
    H100's or B200's kind, where they spill nothing with 64 channels: 723 instructions for 32 elements, not 872.
    """
    block_c, block_o = power_of_2(segment, 16, 128 // element_size), power_of_2(group_out, 16, 256 // element_size)
    blocks = _blocks(64 if element_size == 4 or block_o > 64 else 128, block_o, block_c)
    return blocks._replace(num_warps=4) if block_o > 64 and block_c == 64 and not limits.small else blocks


def _blocks(p: int, o: int, c: int) -> Blocks:
    """Two threads for each pixel; twice as many with more than 64 output channels, or they spill."""
    return Blocks(p, o, c, 8 if o > 64 else p // 16, 1)


def _chunk(input: Tensor, blocks: Blocks, geometry: _Geometry) -> int:
    """Channels of a chunk."""
    half = input.dtype == torch.float32 or geometry.depthwise or blocks.p == blocks.o == 128
    return min(CHUNK_BYTES // (1 + half) // input.element_size(), blocks.c)


class _Geometry(NamedTuple):
    """A call by its sizes; `sizes` are the kernels' arguments in order."""

    sizes: tuple[int, ...]
    conv: tuple[int, ...]
    total: int  # output pixels
    groups: int
    offset_groups: int
    group_in: int
    group_out: int
    segment: int
    depthwise: bool
    wide: bool

    @property
    def taps(self) -> int:
        return self.conv[0] * self.conv[1]

    @property
    def channels(self) -> int:
        return self.groups * self.group_in

    @property
    def constants(self) -> dict[str, Any]:
        return {"CONV": self.conv, "WIDE": self.wide}


def _strides(shape: Pair, nchw: bool) -> tuple[int, int, int]:
    """Of an image, a channel and a pixel, for a tensor that is dense in one of the two memory formats."""
    channels, pixels = shape[1], shape[2] * shape[3]
    return (channels * pixels, pixels, 1) if nchw else (channels * pixels, 1, channels)


def _geometry(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, output: Tensor, conv: tuple[int, ...]
) -> _Geometry:
    of_offset, of_output = (offset.shape, offset.is_contiguous()), (output.shape, output.is_contiguous())
    of_mask = None if mask is None else (mask.shape, mask.is_contiguous())
    return _geometry_of(input.shape, weight.shape, of_offset, of_output, of_mask, conv)


@lru_cache(maxsize=4096)
def _geometry_of(
    input: Pair,
    weight: Pair,
    offset: tuple[Pair, bool],
    output: tuple[Pair, bool],
    mask: tuple[Pair, bool] | None,
    conv: tuple[int, ...],
) -> _Geometry:
    """The same, once for all calls of the same shapes; the others' with whether they are NCHW."""
    batch, channels, height, width = input
    out_channels, group_in, *kernel = weight
    offset_shape, out_height, out_width = offset[0], *offset[0][2:]
    groups, offset_groups = channels // group_in, offset_shape[1] // (2 * kernel[0] * kernel[1])
    offset_channels, count = channels // offset_groups, batch * out_height * out_width
    segment = offset_channels if group_in == 1 else math.gcd(group_in, offset_channels)
    sizes = (
        *(count, height, width, channels, out_height, out_width, out_channels, group_in, out_channels // groups),
        *(offset_channels, segment, channels * height * width),
        *_strides(*offset),
        *((0, 0, 0) if mask is None else _strides(*mask)),
        *_strides(*output)[1:],
    )
    shapes = (input, offset_shape, output[0], () if mask is None else mask[0])
    wide = any(math.prod(shape) >= 2**31 for shape in shapes)
    group_out = out_channels // groups
    return _Geometry(
        sizes, (*kernel, *conv), count, groups, offset_groups, group_in, group_out, segment, group_in == 1, wide
    )


def _image_chunks(batch: int, image_bytes: int) -> Iterator[slice]:
    """Slices of the batch of up to `SCRATCH_BYTES`, or of a sixteenth of it where that is more."""
    size = max(SCRATCH_BYTES // max(image_bytes, 1), batch // 16, 1)
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _part(tensor: Tensor | None, images: slice) -> Tensor | None:
    """Some images of a tensor; itself where they are all, as a view of it takes longer to make than a small launch."""
    return tensor if tensor is None or images == slice(0, tensor.shape[0]) else tensor[images]


def deform_conv2d_forward_triton(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    """[N, O, OH, OW]; arguments as in `cellops.deform_conv2d`."""
    batch, conv = input.shape[0], (*stride, *padding, *dilation)
    in_place = input.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format if input.is_contiguous() else torch.channels_last
    shape = (batch, weight.shape[0], *offset.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    weight = _channels_last(weight)
    image_bytes = math.prod(input.shape[1:]) * input.element_size()
    for images in [slice(0, batch)] if in_place else _image_chunks(batch, image_bytes):
        given = (_channels_last(_part(input, images)), _part(offset, images), _part(mask, images))
        tensors = (*given, weight, bias, _part(output, images))
        _forward(tensors, _geometry(*tensors[:2], weight, tensors[2], tensors[5], conv))
    return output


def _forward(tensors: tuple[Tensor | None, ...], geometry: _Geometry) -> None:
    input, weight = tensors[0], tensors[3]
    group_out, segment = geometry.group_out, geometry.segment
    if geometry.depthwise:
        block_o = power_of_2(segment * group_out, 16, 64)
        block_p = 4096 // input.element_size() // block_o
        grid = (ceil_div(geometry.total, block_p), geometry.offset_groups * ceil_div(segment * group_out, block_o))
        constants = {"BLOCK_P": block_p, "BLOCK_O": block_o, **geometry.constants}
        launch(deform_conv2d_depthwise_forward_kernel, grid, tensors, geometry.sizes, **constants)
        return
    blocks = forward_blocks(group_out, segment, input.element_size(), limits_of(input.device))
    launch(
        deform_conv2d_forward_kernel,
        (ceil_div(geometry.total, blocks.p), geometry.groups * ceil_div(group_out, blocks.o)),
        tensors,
        geometry.sizes,
        **geometry.constants,
        SEGMENTS=weight.shape[1] // segment,
        BLOCKS=ceil_div(segment, blocks.c),
        BLOCK_P=blocks.p,
        BLOCK_O=blocks.o,
        BLOCK_C=blocks.c,
        CHUNK=_chunk(input, blocks, geometry),
        PRECISION=dot_precision(),
        **blocks.compiled,
    )


def deform_conv2d_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to (input, offset, weight, bias, mask), each only where `wanted`.

    The input's is added up in float32, and without atomics under `torch.use_deterministic_algorithms(True)`.
    """
    want_input, want_offset, want_weight, want_bias, want_mask = wanted
    want_mask = want_mask and mask is not None
    batch, conv = input.shape[0], (*stride, *padding, *dilation)
    deterministic = torch.are_deterministic_algorithms_enabled()
    repacked = _channels_last(weight)
    grad_input = torch.empty_like(input) if want_input else None
    grad_offset = torch.empty_like(offset) if want_offset else None
    grad_mask = torch.empty_like(mask) if want_mask else None
    grad_weight = torch.zeros(weight.shape[0], weight[0].numel(), dtype=torch.float32, device=input.device)

    in_place = input.is_contiguous(memory_format=torch.channels_last)
    adds_in_place = in_place and input.dtype == torch.float32
    scattered = want_input and not deterministic
    image_bytes = math.prod(input.shape[1:]) * max(input.element_size(), 4 * scattered)
    whole = in_place and (adds_in_place or not scattered)
    if want_weight and in_place:
        geometry = _geometry(input, offset, repacked, mask, grad_output, conv)
        grad_weight = _grad_weight(grad_output, input, offset, mask, geometry)
    for images in [slice(0, batch)] if whole else _image_chunks(batch, image_bytes):
        tensors = (_channels_last(_part(input, images)), _part(offset, images), _part(mask, images))
        grad = _part(grad_output, images)
        geometry = _geometry(*tensors[:2], repacked, tensors[2], grad, conv)
        if want_weight and not in_place:
            grad_weight += _grad_weight(grad, *tensors, geometry)
        sums = None
        if scattered:
            sums = grad_input[images].zero_() if adds_in_place else torch.zeros_like(tensors[0], dtype=torch.float32)
        if scattered:
            _grad_data((grad, *tensors, repacked, sums, None, None), geometry)
        if want_offset or want_mask:
            results = (None, _part(grad_offset, images), _part(grad_mask, images))
            _grad_data((grad, *tensors, repacked, *results), geometry)
        if want_input and deterministic:
            _grad_input((grad, *tensors, repacked, grad_input[images]), geometry)
        elif scattered and not adds_in_place:
            grad_input[images].copy_(sums)

    grad_weight = grad_weight.view(weight.shape[0], *weight.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)
    grad_bias = grad_output.sum((0, 2, 3), dtype=torch.float32) if want_bias else None
    return grad_input, grad_offset, grad_weight if want_weight else None, grad_bias, grad_mask


def _grad_data(tensors: tuple[Tensor | None, ...], geometry: _Geometry) -> None:
    """Gradients to offset and mask, and to the input by atomics."""
    blocks = backward_blocks(
        geometry.group_out, geometry.segment, tensors[1].element_size(), limits_of(tensors[1].device)
    )
    if blocks.c > 16 and (geometry.depthwise or tensors[5] is not None):
        blocks = blocks._replace(num_warps=8)  # four spill, or nearly
    launch(
        deform_conv2d_backward_data_kernel,
        (ceil_div(geometry.total, blocks.p), geometry.taps * geometry.offset_groups),
        tensors,
        geometry.sizes,
        **geometry.constants,
        SEGMENTS=geometry.channels // geometry.offset_groups // geometry.segment,
        BLOCKS=ceil_div(geometry.segment, blocks.c),
        BLOCK_P=blocks.p,
        BLOCK_O=blocks.o,
        BLOCK_C=blocks.c,
        CHUNK=_chunk(tensors[1], blocks, geometry),
        DEPTHWISE=geometry.depthwise,
        PRECISION=dot_precision(),
        **blocks.compiled,
    )


def _grad_input(tensors: tuple[Tensor | None, ...], geometry: _Geometry) -> None:
    """The gradient to the input without atomics."""
    grad_input = tensors[-1]
    batch, _, height, width = grad_input.shape
    blocks = backward_blocks(
        geometry.group_out, geometry.segment, grad_input.element_size(), limits_of(grad_input.device)
    )
    block_c, block_q = 32, 64  # with eight warps: more of either spills
    block_p = 32 if grad_input.dtype == torch.float32 else 64
    segment_blocks = ceil_div(geometry.segment, block_c)
    of_image, of_channels = ceil_div(height * width, block_q), geometry.channels // geometry.segment * segment_blocks
    for images in image_slices(batch, of_image, of_channels):
        grad, input, offset, mask, weight, target = tensors
        parts = (grad[images], input[images], offset[images], _part(mask, images), weight, target[images])
        launch(
            deform_conv2d_backward_input_kernel,
            (parts[0].shape[0] * of_image, of_channels),
            parts,
            (*_strides(grad_input.shape, grad_input.is_contiguous())[1:], *geometry.sizes),
            **geometry.constants,
            BLOCKS=segment_blocks,
            BLOCK_P=block_p,
            BLOCK_Q=block_q,
            BLOCK_O=blocks.o,
            BLOCK_C=block_c,
            DEPTHWISE=geometry.depthwise,
            PRECISION=dot_precision(),
            num_warps=4 if geometry.depthwise and block_p == 32 else 8,  # without a product few samples need no eight
        )


def _grad_weight(
    grad_output: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, geometry: _Geometry
) -> Tensor:
    """[O, taps * C / G] in float32: sums over parts of the pixels, added in their order."""
    blocks = weight_blocks(geometry.group_out, geometry.segment, input.element_size(), limits_of(input.device))
    segment_blocks = ceil_div(geometry.segment, blocks.c)
    out_blocks = geometry.group_out if geometry.depthwise else ceil_div(geometry.group_out, blocks.o)
    programs = geometry.taps * out_blocks * geometry.channels // geometry.segment * segment_blocks
    size = geometry.groups * geometry.group_out * geometry.taps * geometry.group_in
    parts = max(min(ceil_div(2 * multiprocessors(input.device), programs), 2 * SCRATCH_BYTES // (4 * size)), 1)
    part_pixels = ceil_div(ceil_div(geometry.total, parts), blocks.p) * blocks.p
    parts = ceil_div(geometry.total, part_pixels) if part_pixels else 0
    rows = geometry.groups * geometry.group_out
    grad_weights = torch.empty(parts, rows, size // rows, dtype=torch.float32, device=input.device)
    launch(
        deform_conv2d_backward_weight_kernel,
        (parts, programs),
        (grad_output, input, offset, mask, grad_weights),
        (part_pixels, *geometry.sizes),
        **geometry.constants,
        BLOCKS=segment_blocks,
        BLOCK_P=blocks.p,
        BLOCK_O=blocks.o,
        BLOCK_C=blocks.c,
        CHUNK=_chunk(input, blocks, geometry),
        DEPTHWISE=geometry.depthwise,
        PRECISION=dot_precision(),
        **blocks.compiled,
    )
    return grad_weights.sum(0)

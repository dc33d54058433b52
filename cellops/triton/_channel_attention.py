"""What `squeeze_excite` and `eca` share: sums over the pixels, and y = x * factor of the channel.

Bytes: forward must read and write the input once, and reads it twice: for the sums and to scale it. The scaling goes
through the images from the last to the first, so that those summed last are still in the L2 cache, all of a batch that
fits in it. Images in chunks that do, each summed and scaled before the next, move less and took longer: for 411 MB an
H200 needed 17 times three launches and 0.52 ms, where three launches at its rate need 0.29 ms. Backward reads input and
grad_output once, grad_output again, and writes the gradient: four passes where three are the floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import ceil_div, launch, multiprocessors, power_of_2
from cellops.triton._numerics import narrow


@triton.jit
def channel_sums_kernel(
    input,  # [N, C, P]
    grad_output,  # [N, C, P], or None
    sums,  # [N, parts, C] float32
    products,  # [N, parts, C] float32, None without grad_output
    channels,
    pixels,
    parts,
    part_pixels,  # a multiple of BLOCK_P
    channel_stride,
    pixel_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """sums[n, part, c] = sum over the part's pixels of input[n, c, p]; products of grad_output * input."""
    index = tl.program_id(AXIS)
    image, part = index // parts, index % parts
    if WIDE:
        part = part.to(tl.int64)
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = image.to(tl.int64) * channels * pixels
    sum_of_inputs = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_of_products = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(part * part_pixels, (part + 1) * part_pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        element = _elements(channel, pixel, channel_stride, pixel_stride, WIDE)
        valid = (channel < channels)[:, None] & (pixel < pixels)[None, :]
        x = tl.load(input + base + element, valid, 0.0).to(tl.float32)
        sum_of_inputs += x
        if grad_output is not None:
            sum_of_products += tl.load(grad_output + base + element, valid, 0.0).to(tl.float32) * x
    row = index.to(tl.int64) * channels + channel
    tl.store(sums + row, tl.sum(sum_of_inputs, 1), channel < channels)
    if grad_output is not None:
        tl.store(products + row, tl.sum(sum_of_products, 1), channel < channels)


@triton.jit
def scale_channels_kernel(
    input,  # [N, C, P]
    factor,  # [N, C] float32
    addend,  # [N, C] float32, or None
    output,  # [N, C, P]
    channels,
    pixels,
    channel_stride,
    pixel_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """output[n, c, p] = input[n, c, p] * factor[n, c] + addend[n, c]. The last pixels, read last, come first."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    tile = tl.num_programs(AXIS) - 1 - tl.program_id(AXIS)
    image = (tile // blocks).to(tl.int64)
    pixel = tile % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = image * channels * pixels
    element = _elements(channel, pixel, channel_stride, pixel_stride, WIDE)
    valid = (channel < channels)[:, None] & (pixel < pixels)[None, :]
    row = image * channels + channel
    y = tl.load(input + base + element, valid, 0.0).to(tl.float32)
    y = y * tl.load(factor + row, channel < channels, 0.0)[:, None]
    if addend is not None:
        y += tl.load(addend + row, channel < channels, 0.0)[:, None]
    tl.store(output + base + element, narrow(y, output.dtype.element_ty), valid)


@triton.jit
def _elements(channel, pixel, channel_stride, pixel_stride, WIDE: tl.constexpr):
    """Offsets [BLOCK_C, BLOCK_P] within an image; 64 bits where it has 2^31 elements or more."""
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    return channel[:, None] * channel_stride + pixel[None, :] * pixel_stride


@dataclass(frozen=True)
class _Layout:
    """How images of [C, P] are stored, the blocks that one is taken in, and the parts that it is summed in."""

    batch: int

    channels: int
    pixels: int
    strides: tuple[int, int]
    block_c: int
    block_p: int
    wide: bool
    parts: int
    part_pixels: int  # a multiple of block_p

    @cached_property
    def grid(self) -> tuple[int, int]:
        """A program for each block of each image."""
        return self.batch * ceil_div(self.pixels, self.block_p), ceil_div(self.channels, self.block_c)

    @cached_property
    def part_grid(self) -> tuple[int, int]:
        """A program for each part of each image."""
        return self.batch * self.parts, ceil_div(self.channels, self.block_c)

    @cached_property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "WIDE": self.wide}


def _layout(images: Tensor) -> _Layout:
    """Blocks of 64 bytes for each of 128 threads, in loads of 16 as far as the layout allows.

    That is 16 numbers a thread in float32; of twice as many some spill. An image is cut into parts where there are too
    few images to fill the device.
    """
    return _layout_of(images.shape, images.is_contiguous(), images.element_size(), multiprocessors(images.device))


@lru_cache(maxsize=4096)
def _layout_of(shape: tuple[int, ...], nchw: bool, element_size: int, side_by_side: int) -> _Layout:
    batch, channels, height, width = shape
    pixels, elements = height * width, 8192 // element_size
    if nchw:
        strides, block_p = (pixels, 1), power_of_2(pixels, 16, 1024)
        block_c = power_of_2(channels, 1, elements // block_p)
    else:
        strides, block_c = (1, channels), power_of_2(channels, 16, 128)
        block_p = power_of_2(pixels, 1, elements // block_c)
    parts = ceil_div(4 * side_by_side, max(batch, 1) * ceil_div(channels, block_c))
    part_pixels = ceil_div(ceil_div(pixels, block_p), parts) * block_p
    wide = max(channels, 2) * pixels >= 2**31  # the last part may end beyond the image
    parts = ceil_div(pixels, part_pixels)
    return _Layout(batch, channels, pixels, strides, block_c, block_p, wide, parts, part_pixels)


def channel_sums(input: Tensor, grad_output: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over the parts of each image's pixels, [N, parts, C] in float32: of input, of grad_output * input.

    The parts are added in their order.
    """
    layout = _layout(input)
    sums = torch.empty(layout.batch, layout.parts, layout.channels, dtype=torch.float32, device=input.device)
    products = None if grad_output is None else torch.empty_like(sums)
    sizes = (layout.channels, layout.pixels, layout.parts, layout.part_pixels, *layout.strides)
    # Of two float32 images a thread takes 8 numbers each. Of 16 that it loads one by one, the vectorizer of Triton
    # 3.9's LLVM dies for sm_90, and the process with it.
    warps = 8 if grad_output is not None and input.element_size() == 4 else 4
    tensors = (input, grad_output, sums, products)
    launch(channel_sums_kernel, layout.part_grid, tensors, sizes, **layout.constants, num_warps=warps)
    return sums, products


def scale_channels(input: Tensor, factor: Tensor, addend: Tensor | None, output: Tensor) -> None:
    """output = input * factor + addend; factor and addend are [N, C] in float32."""
    layout = _layout(input)
    sizes = (layout.channels, layout.pixels, *layout.strides)
    launch(scale_channels_kernel, layout.grid, (input, factor, addend, output), sizes, **layout.constants)

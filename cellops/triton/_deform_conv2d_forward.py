"""The forward kernels of deformable convolution: an implicit matrix product, and a direct one for depthwise weights.

    y[p, o] = bias[o] + sum over taps t, channels c: column[p, t, c] * weight[o, t, c]

No column is ever stored: a program owns BLOCK_P output pixels and BLOCK_O output channels, samples BLOCK_C channels of
one tap, four corners in 16-byte loads from a channels-last image, blends them in float32, rounds them to the storage
type and multiplies at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cellops.triton._deform_conv2d import (
    chunks,
    column_values,
    corners,
    locate,
    mask_values,
    output_pixels,
    shares,
    widen,
)
from cellops.triton._numerics import dot, narrow


@triton.jit
def deform_conv2d_forward_kernel(
    input,  # [N, H, W, C]
    offset,  # [N, D * taps * 2, OH, OW]
    mask,  # [N, D * taps, OH, OW], or None
    weight,  # [O, taps, C / G]
    bias,  # [O], or None
    output,  # [N, O, OH, OW]
    count,  # N * OH * OW
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    group_in,  # C / G
    group_out,  # O / G
    offset_channels,  # C / D
    segment,  # channels that share both groups
    image_elements,  # H * W * C
    offset_image_stride,
    offset_channel_stride,
    offset_pixel_stride,
    mask_image_stride,
    mask_channel_stride,
    mask_pixel_stride,
    output_channel_stride,
    output_pixel_stride,
    CONV: tl.constexpr,
    SEGMENTS: tl.constexpr,  # of one group
    BLOCKS: tl.constexpr,  # of one segment
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = index < count
    image, pixel, row, column = output_pixels(index, out_height, out_width, WIDE)
    out_blocks = tl.cdiv(group_out, BLOCK_O)
    group = tl.program_id(1 - AXIS) // out_blocks
    out = tl.program_id(1 - AXIS) % out_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    out_known = out < group_out
    out += group * group_out
    offset_base = image * offset_image_stride + pixel * offset_pixel_stride
    mask_base = image * mask_image_stride + pixel * mask_pixel_stride
    input_base = image * image_elements

    sum = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for step in range(CONV[0] * CONV[1] * SEGMENTS):
        tap, group_channel = step // SEGMENTS, step % SEGMENTS * segment
        first = group * group_in + group_channel
        offset_group = first // offset_channels
        top, left, down, right, unknown = locate(
            offset, offset_base, offset_channel_stride, exists, row, column, tap, offset_group, height, width, CONV
        )
        factor = mask_values(mask, mask_base, mask_channel_stride, exists, tap, offset_group, CONV)
        elements, valid = corners(input_base, top, left, height, width, channels, WIDE)
        weights = shares(down, right, factor)
        for block in range(BLOCKS):
            within = block * BLOCK_C + chunks(BLOCK_C, CHUNK)
            columns = column_values(input + first, elements, valid, weights, unknown, within, within < segment)
            columns = narrow(columns, input.dtype.element_ty).permute(1, 0, 2).reshape(BLOCK_P, BLOCK_C)
            within = block * BLOCK_C + tl.arange(0, BLOCK_C)
            kernel = tl.load(
                weight + (out[None, :] * (CONV[0] * CONV[1]) + tap) * group_in + (group_channel + within)[:, None],
                (within < segment)[:, None] & out_known[None, :],
                0.0,
            )
            sum = dot(columns, kernel, sum, PRECISION)
    if bias is not None:
        sum += tl.load(bias + out, out_known, 0.0).to(tl.float32)[None, :]
    element = image * out_height * out_width * out_channels + pixel * output_pixel_stride
    tl.store(
        output + element[:, None] + out.to(element.dtype)[None, :] * output_channel_stride,
        narrow(sum, output.dtype.element_ty),
        exists[:, None] & out_known[None, :],
    )


@triton.jit
def deform_conv2d_depthwise_forward_kernel(
    input,  # [N, H, W, C]
    offset,  # [N, D * taps * 2, OH, OW]
    mask,  # [N, D * taps, OH, OW], or None
    weight,  # [O, taps]
    bias,  # [O], or None
    output,  # [N, O, OH, OW]
    count,  # N * OH * OW
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    group_in,  # 1
    group_out,  # O / C
    offset_channels,  # C / D
    segment,  # C / D
    image_elements,  # H * W * C
    offset_image_stride,
    offset_channel_stride,
    offset_pixel_stride,
    mask_image_stride,
    mask_channel_stride,
    mask_pixel_stride,
    output_channel_stride,
    output_pixel_stride,
    CONV: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Each output channel sums the taps of one input channel: nothing to multiply as matrices."""
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = index < count
    image, pixel, row, column = output_pixels(index, out_height, out_width, WIDE)
    out_blocks = tl.cdiv(segment * group_out, BLOCK_O)
    offset_group = tl.program_id(1 - AXIS) // out_blocks
    out = tl.program_id(1 - AXIS) % out_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    known = out < segment * group_out
    out += offset_group * segment * group_out
    offset_base = image * offset_image_stride + pixel * offset_pixel_stride
    mask_base = image * mask_image_stride + pixel * mask_pixel_stride
    input_base = image * image_elements

    sum = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    for tap in range(CONV[0] * CONV[1]):
        top, left, down, right, unknown = locate(
            offset, offset_base, offset_channel_stride, exists, row, column, tap, offset_group, height, width, CONV
        )
        factor = mask_values(mask, mask_base, mask_channel_stride, exists, tap, offset_group, CONV)
        elements, valid = corners(input_base, top, left, height, width, channels, WIDE)
        weights = shares(down, right, factor)
        columns = column_values(input, elements, valid, weights, unknown, (out // group_out)[None, :], known[None, :])
        columns = narrow(columns, input.dtype.element_ty).reshape(BLOCK_P, BLOCK_O)
        kernel = tl.load(weight + out * (CONV[0] * CONV[1]) + tap, known, 0.0).to(tl.float32)
        sum += widen(columns) * kernel[None, :]
    if bias is not None:
        sum += tl.load(bias + out, known, 0.0).to(tl.float32)[None, :]
    element = image * out_height * out_width * out_channels + pixel * output_pixel_stride
    tl.store(
        output + element[:, None] + out.to(element.dtype)[None, :] * output_channel_stride,
        narrow(sum, output.dtype.element_ty),
        exists[:, None] & known[None, :],
    )

"""The backward kernels of deformable convolution. Columns and their gradients exist in a program's registers alone.

grad_column[p, t, c] = sum over o: grad_output[p, o] * weight[o, t, c]
grad_weight[o, t, c] = sum over p: grad_output[p, o] * column[p, t, c]
"""

from __future__ import annotations

import triton
import triton.language as tl

from cellops.triton._deform_conv2d import (
    chunks,
    column_values,
    corner_values,
    corners,
    locate,
    mask_values,
    output_pixels,
    shares,
    widen,
)
from cellops.triton._numerics import dot, narrow


@triton.jit
def grad_columns(
    grad_output,
    base,
    exists,
    weight,
    tap,
    group,
    group_channel,
    known,
    group_in,
    group_out,
    channel_stride,
    TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients [P, C] of one tap's columns, before the mask. Depthwise, `group_channel` counts all channels."""
    sum = tl.zeros([base.shape[0], group_channel.shape[0]], tl.float32)
    for start in range(0, group_out, 1 if DEPTHWISE else BLOCK_O):
        if DEPTHWISE:
            out = (group_channel * group_out + start).to(base.dtype)
            valid = exists[:, None] & known[None, :]
            grad = tl.load(grad_output + base[:, None] + out[None, :] * channel_stride, valid, 0.0).to(tl.float32)
            sum += grad * tl.load(weight + out * TAPS + tap, known, 0.0).to(tl.float32)[None, :]
        else:
            out = start + tl.arange(0, BLOCK_O)
            out_known = out < group_out
            out = (out + group * group_out).to(base.dtype)
            valid = exists[:, None] & out_known[None, :]
            grad = tl.load(grad_output + base[:, None] + out[None, :] * channel_stride, valid, 0.0)
            element = (out[:, None] * TAPS + tap) * group_in + group_channel[None, :]
            kernel = tl.load(weight + element, out_known[:, None] & known[None, :], 0.0)
            sum = dot(grad, kernel, sum, PRECISION)
    return sum


@triton.jit
def deform_conv2d_backward_data_kernel(
    grad_output,  # [N, O, OH, OW]
    input,  # [N, H, W, C]
    offset,  # [N, D * taps * 2, OH, OW]
    mask,  # [N, D * taps, OH, OW], or None
    weight,  # [O, taps, C / G]
    grad_input,  # [N, H, W, C] float32, added to; None where not wanted
    grad_offset,  # as offset; None where not wanted
    grad_mask,  # as mask; None where not wanted
    count,
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    group_in,
    group_out,
    offset_channels,
    segment,
    image_elements,
    offset_image_stride,
    offset_channel_stride,
    offset_pixel_stride,
    mask_image_stride,
    mask_channel_stride,
    mask_pixel_stride,
    output_channel_stride,
    output_pixel_stride,
    CONV: tl.constexpr,
    SEGMENTS: tl.constexpr,  # of one offset group
    BLOCKS: tl.constexpr,  # of one segment
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Gradients to offset and mask, or to the input, of one tap of one offset group at BLOCK_P output pixels.

    With s_k the corners and w_k their weights, all sums being over the channels of the offset group:
        grad_mask = sum of grad_column * (sum over k: w_k * s_k)
        grad_y = mask * sum of grad_column * (sum over k: dw_k/dy * s_k), grad_x likewise
        grad_input at corner k += mask * w_k * grad_column, by float32 additions in memory
    """
    TAPS: tl.constexpr = CONV[0] * CONV[1]
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = index < count
    image, pixel, row, column = output_pixels(index, out_height, out_width, WIDE)
    tap, offset_group = tl.program_id(1 - AXIS) % TAPS, tl.program_id(1 - AXIS) // TAPS
    offset_base = image * offset_image_stride + pixel * offset_pixel_stride
    mask_base = image * mask_image_stride + pixel * mask_pixel_stride
    input_base = image * image_elements
    grad_base = image * out_height * out_width * out_channels + pixel * output_pixel_stride
    top, left, down, right, unknown = locate(
        offset, offset_base, offset_channel_stride, exists, row, column, tap, offset_group, height, width, CONV
    )
    factor = mask_values(mask, mask_base, mask_channel_stride, exists, tap, offset_group, CONV)
    elements, valid = corners(input_base, top, left, height, width, channels, WIDE)
    weights = shares(down, right, factor)
    inside = valid[0] | valid[1] | valid[2] | valid[3]

    # Of grad_column * s at each corner: added up by each thread, and over the threads of a pixel behind the loop.
    sum00 = tl.zeros([BLOCK_P, CHUNK], tl.float32)
    sum01 = tl.zeros([BLOCK_P, CHUNK], tl.float32)
    sum10 = tl.zeros([BLOCK_P, CHUNK], tl.float32)
    sum11 = tl.zeros([BLOCK_P, CHUNK], tl.float32)
    for step in range(SEGMENTS * BLOCKS):
        first = offset_group * offset_channels + step // BLOCKS * segment
        group = first // group_in
        within = step % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
        columns = grad_columns(
            grad_output,
            grad_base,
            exists,
            weight,
            tap,
            group,
            first + within if DEPTHWISE else first + within - group * group_in,
            within < segment,
            group_in,
            group_out,
            output_channel_stride,
            TAPS,
            BLOCK_O,
            DEPTHWISE,
            PRECISION,
        )
        if grad_offset is not None or grad_mask is not None:
            grad = columns.reshape(BLOCK_P, BLOCK_C // CHUNK, CHUNK).permute(1, 0, 2)
            within = step % BLOCKS * BLOCK_C + chunks(BLOCK_C, CHUNK)
            known = within < segment
            sum00 += tl.sum(grad * corner_values(input + first, elements[0], valid[0], within, known), 0)
            sum01 += tl.sum(grad * corner_values(input + first, elements[1], valid[1], within, known), 0)
            sum10 += tl.sum(grad * corner_values(input + first, elements[2], valid[2], within, known), 0)
            value = corner_values(input + first, elements[3], valid[3], within, known)
            sum11 += tl.sum(grad * value, 0)
        if grad_input is not None:
            # In a layout of their own: 16 bytes for each lane, neighbours beside each other, so that a sector of
            # 32 bytes is added to once. The corners' layout gives a lane 32 bytes in float32: twice.
            within = step % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
            for corner in tl.static_range(4):
                places = (grad_input + first + elements[corner])[:, None] + within[None, :]
                tl.atomic_add(
                    tl.max_contiguous(places, [1, 4]),
                    columns * weights[corner][:, None],
                    valid[corner][:, None] & (within < segment)[None, :],
                    sem="relaxed",
                )

    sum00, sum01, sum10, sum11 = tl.sum(sum00, 1), tl.sum(sum01, 1), tl.sum(sum10, 1), tl.sum(sum11, 1)
    if grad_mask is not None:
        sampled = (sum00 * (1 - right) + sum01 * right) * (1 - down) + (sum10 * (1 - right) + sum11 * right) * down
        sampled = tl.where(unknown, float("nan"), tl.where(inside, sampled, 0.0))
        target = grad_mask + mask_base + (offset_group * TAPS + tap).to(mask_base.dtype) * mask_channel_stride
        tl.store(target, narrow(sampled, grad_mask.dtype.element_ty), exists)
    if grad_offset is not None:
        grad_y = ((sum10 - sum00) * (1 - right) + (sum11 - sum01) * right) * factor
        grad_x = ((sum01 - sum00) * (1 - down) + (sum11 - sum10) * down) * factor
        first = ((offset_group * TAPS + tap) * 2).to(offset_base.dtype)
        target = grad_offset + offset_base + first * offset_channel_stride
        tl.store(target, narrow(tl.where(inside, grad_y, 0.0), grad_offset.dtype.element_ty), exists)
        grad_x = narrow(tl.where(inside, grad_x, 0.0), grad_offset.dtype.element_ty)
        tl.store(target + offset_channel_stride, grad_x, exists)


@triton.jit
def deform_conv2d_backward_input_kernel(
    grad_output,  # [N, O, OH, OW]
    input,  # [N, H, W, C]; not read
    offset,  # [N, D * taps * 2, OH, OW]
    mask,  # [N, D * taps, OH, OW], or None
    weight,  # [O, taps, C / G]
    grad_input,  # [N, C, H, W]
    grad_channel_stride,
    grad_pixel_stride,
    count,
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    group_in,
    group_out,
    offset_channels,
    segment,
    image_elements,
    offset_image_stride,
    offset_channel_stride,
    offset_pixel_stride,
    mask_image_stride,
    mask_channel_stride,
    mask_pixel_stride,
    output_channel_stride,
    output_pixel_stride,
    CONV: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The input's gradient without atomics: a program owns BLOCK_Q input pixels and takes the samples in a fixed order.

        grad_input[q, c] = sum over t, p: share[q, p] * grad_column[p, t, c]

    share is the mask times the bilinear weight of p's sample at q. Blocks of samples without one in the rows of q are
    passed over; the others' gradients are multiplied again for every program that they reach, three to four times for
    offsets of a few pixels.
    """
    TAPS: tl.constexpr = CONV[0] * CONV[1]
    tiles = tl.cdiv(height * width, BLOCK_Q)
    image = tl.program_id(AXIS) // tiles
    own = tl.program_id(AXIS) % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    own_row, own_column = own // width, own % width
    first_row = tl.program_id(AXIS) % tiles * BLOCK_Q // width
    last_row = (tl.program_id(AXIS) % tiles * BLOCK_Q + BLOCK_Q - 1) // width
    if WIDE:
        image, own = image.to(tl.int64), own.to(tl.int64)
    within = tl.program_id(1 - AXIS) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    known = within < segment
    first = tl.program_id(1 - AXIS) // BLOCKS * segment
    channel = first + within
    offset_group, group = first // offset_channels, first // group_in
    group_channel = channel if DEPTHWISE else channel - group * group_in

    sum = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
    for tap in range(TAPS):
        for start in range(0, out_height * out_width, BLOCK_P):
            pixel = start + tl.arange(0, BLOCK_P)
            exists = pixel < out_height * out_width
            row, column = pixel // out_width, pixel % out_width
            if WIDE:
                pixel = pixel.to(tl.int64)
            offset_base = image * offset_image_stride + pixel * offset_pixel_stride
            top, left, down, right, _ = locate(
                offset, offset_base, offset_channel_stride, exists, row, column, tap, offset_group, height, width, CONV
            )
            inside = (top >= -1) & (top < height) & (left >= -1) & (left < width)
            near = inside & (top + 1 >= first_row) & (top <= last_row)
            if tl.max(near.to(tl.int32), 0) > 0:
                mask_base = image * mask_image_stride + pixel * mask_pixel_stride
                factor = mask_values(mask, mask_base, mask_channel_stride, exists, tap, offset_group, CONV)
                below, beside = own_row[:, None] - top[None, :], own_column[:, None] - left[None, :]
                share = tl.where(below == 0, 1 - down[None, :], tl.where(below == 1, down[None, :], 0.0))
                share *= tl.where(beside == 0, 1 - right[None, :], tl.where(beside == 1, right[None, :], 0.0))
                share = tl.where(inside[None, :], share * factor[None, :], 0.0)
                grad_base = image * out_height * out_width * out_channels + pixel * output_pixel_stride
                grad = grad_columns(
                    grad_output,
                    grad_base,
                    exists,
                    weight,
                    tap,
                    group,
                    group_channel,
                    known,
                    group_in,
                    group_out,
                    output_channel_stride,
                    TAPS,
                    BLOCK_O,
                    DEPTHWISE,
                    PRECISION,
                )
                sum = dot(share, tl.where(inside[:, None], grad, 0.0), sum, "tf32x3")
    element = image * image_elements + own * grad_pixel_stride
    tl.store(
        grad_input + element[:, None] + channel.to(element.dtype)[None, :] * grad_channel_stride,
        narrow(sum, grad_input.dtype.element_ty),
        (own < height * width)[:, None] & known[None, :],
    )


@triton.jit
def deform_conv2d_backward_weight_kernel(
    grad_output,  # [N, O, OH, OW]
    input,  # [N, H, W, C]
    offset,  # [N, D * taps * 2, OH, OW]
    mask,  # [N, D * taps, OH, OW], or None
    grad_weights,  # [parts, O, taps, C / G] float32
    part_pixels,  # a multiple of BLOCK_P
    count,
    height,
    width,
    channels,
    out_height,
    out_width,
    out_channels,
    group_in,
    group_out,
    offset_channels,
    segment,
    image_elements,
    offset_image_stride,
    offset_channel_stride,
    offset_pixel_stride,
    mask_image_stride,
    mask_channel_stride,
    mask_pixel_stride,
    output_channel_stride,
    output_pixel_stride,
    CONV: tl.constexpr,
    BLOCKS: tl.constexpr,  # of one segment
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Gradients of BLOCK_O x BLOCK_C weights of one tap over a part of the pixels; parts are added in their order."""
    TAPS: tl.constexpr = CONV[0] * CONV[1]
    tap = tl.program_id(1 - AXIS) % TAPS
    out_blocks = group_out if DEPTHWISE else tl.cdiv(group_out, BLOCK_O)
    out_block = tl.program_id(1 - AXIS) // TAPS % out_blocks
    block = tl.program_id(1 - AXIS) // TAPS // out_blocks
    within = block % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    known = within < segment
    first = block // BLOCKS * segment
    channel = first + within
    offset_group, group = first // offset_channels, first // group_in
    if DEPTHWISE:
        out = channel * group_out + out_block
        sum = tl.zeros([BLOCK_C], tl.float32)
    else:
        out = out_block * BLOCK_O + tl.arange(0, BLOCK_O)
        out_known = out < group_out
        out += group * group_out
        sum = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)

    start = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for step in range(0, part_pixels, BLOCK_P):
        index = start + step + tl.arange(0, BLOCK_P)
        exists = index < count
        image, pixel, row, column = output_pixels(index, out_height, out_width, WIDE)
        offset_base = image * offset_image_stride + pixel * offset_pixel_stride
        top, left, down, right, unknown = locate(
            offset, offset_base, offset_channel_stride, exists, row, column, tap, offset_group, height, width, CONV
        )
        mask_base = image * mask_image_stride + pixel * mask_pixel_stride
        factor = mask_values(mask, mask_base, mask_channel_stride, exists, tap, offset_group, CONV)
        elements, valid = corners(image * image_elements, top, left, height, width, channels, WIDE)
        weights = shares(down, right, factor)
        place = block % BLOCKS * BLOCK_C + chunks(BLOCK_C, CHUNK)
        columns = column_values(input + first, elements, valid, weights, unknown, place, place < segment)
        columns = narrow(columns, input.dtype.element_ty).permute(1, 0, 2).reshape(BLOCK_P, BLOCK_C)
        base = image * out_height * out_width * out_channels + pixel * output_pixel_stride
        place = out.to(base.dtype) * output_channel_stride
        if DEPTHWISE:
            valid = exists[:, None] & known[None, :]
            grad = tl.load(grad_output + base[:, None] + place[None, :], valid, 0.0)
            sum += tl.sum(widen(grad) * widen(columns), 0)
        else:
            valid = out_known[:, None] & exists[None, :]
            grad = tl.load(grad_output + base[None, :] + place[:, None], valid, 0.0)
            sum = dot(grad, columns, sum, PRECISION)

    if DEPTHWISE:
        tl.store(grad_weights + (tl.program_id(AXIS) * out_channels + out) * TAPS + tap, sum, known)
    else:
        element = ((tl.program_id(AXIS) * out_channels + out[:, None]) * TAPS + tap) * group_in
        element += (channel - group * group_in)[None, :]
        tl.store(grad_weights + element, sum, out_known[:, None] & known[None, :])

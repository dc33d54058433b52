"""The kernels of the grouped 1x1 convolution: a program multiplies the channels of one group, pixel by pixel.

before = (z - mean) * scale + shift throughout; with statistics of the batch, scale is gamma / deviation and shift is
beta. An absent tensor counts as 0 (mean, shift) or 1.

They are bound by the instructions as much as by memory (27 for an element of two bytes that is read and written), so
    - how many blocks a group has is a constant: for one, the usual case, no loop is left (22 an element to 11);
    - sums and statistics stay in registers, one for each element of a tile, and are added up behind the loop;
    - a gradient of float32 times a half type takes two TF32 products in place of three (`_dot_exact`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from cellops.triton._activation import activated, slope
from cellops.triton._numerics import dot, narrow
from cellops.triton._pixels import channel_numbers


@triton.jit
def _row(values, out, known, ABSENT: tl.constexpr):
    """Numbers of the output channels as a row, ABSENT for an absent tensor."""
    return channel_numbers(values, out, known, ABSENT)[None, :]


@triton.jit
def _affine(z, mean, scale, shift, out, known):
    """z - mean and before, [P, O]."""
    apart = z - _row(mean, out, known, 0.0)
    return apart, apart * _row(scale, out, known, 1.0) + _row(shift, out, known, 0.0)


@triton.jit
def _pixels(
    index, image_pixels, channels, out_channels, pixel_stride, out_pixel_stride, LAST: tl.constexpr, WIDE: tl.constexpr
):
    """Offsets [P] of the pixels' first channel in input and output; LAST, in channels_last: without a division."""
    if LAST:
        return index * channels, index * out_channels
    image, pixel = index // image_pixels, index % image_pixels
    if WIDE:
        image, pixel = image.to(tl.int64), pixel.to(tl.int64)
    base = image * image_pixels
    return base * channels + pixel * pixel_stride, base * out_channels + pixel * out_pixel_stride


@triton.jit
def _elements(place, channel, channel_stride):
    """Offsets [P, C] of channels, in the bits that the pixels' have: a single image may have 2^31 elements."""
    return place[:, None] + channel.to(place.dtype)[None, :] * channel_stride


@triton.jit
def _convolved(
    input,
    place,
    exists,
    weight,
    group,
    out,
    known,
    group_in,
    channel_stride,
    IN_BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z [P, O] of one group's output channels `out`."""
    sum = tl.zeros([place.shape[0], out.shape[0]], tl.float32)
    for block in range(IN_BLOCKS):
        channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = channel < group_in
        element = _elements(place, group * group_in + channel, channel_stride)
        x = tl.load(input + element, exists[:, None] & inside[None, :], 0.0)
        kernel = tl.load(weight + out[None, :] * group_in + channel[:, None], inside[:, None] & known[None, :], 0.0)
        sum = dot(x, kernel, sum, PRECISION)
    return sum


@triton.jit
def _dot_exact(left, right, sum, RIGHT: tl.constexpr, PRECISION: tl.constexpr):
    """sum + left @ right in float32, where `right` was read as RIGHT, and left is float32.

    A half type's numbers are TF32 numbers, so that `right` needs no second part: two products in place of three.
    """
    if RIGHT == tl.float32 or PRECISION != "tf32x3":
        return dot(left, right, sum, PRECISION)
    else:
        high = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # without TF32's last 13 bits
        rest = dot(left - high, right, tl.zeros(sum.shape, tl.float32), "tf32")
        # Infinities: inf - inf, and 0 * inf. The other product has them.
        return dot(high, right, sum + tl.where(rest == rest, rest, 0.0), "tf32")


@triton.jit
def _shuffled(out, groups, group_out, SHUFFLE: tl.constexpr):
    """Where the output channels stand in the output."""
    if SHUFFLE:
        return out % group_out * groups + out // group_out
    else:
        return out


@triton.jit
def _grad_of_affine(
    grad_output,
    out_place,
    exists,
    out,
    known,
    out_channel_stride,
    groups,
    group_out,
    before,
    ACTIVATION: tl.constexpr,
    SHUFFLE: tl.constexpr,
):
    """The gradient [P, O] to what the activation was given."""
    element = _elements(out_place, _shuffled(out, groups, group_out, SHUFFLE), out_channel_stride)
    valid = exists[:, None] & known[None, :]
    grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32)
    return tl.where(valid, grad * slope(before, ACTIVATION), 0.0)


@triton.jit
def _grad_convolved(
    grad_output,
    out_place,
    input,
    place,
    exists,
    weight,
    mean,
    scale,
    shift,
    of_mean,
    of_apart,
    group,
    out,
    known,
    group_in,
    channel_stride,
    out_channel_stride,
    groups,
    group_out,
    ACTIVATION: tl.constexpr,
    SHUFFLE: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_z = grad * scale - of_mean - (z - mean) * of_apart, [P, O]."""
    z = _convolved(
        input, place, exists, weight, group, out, known, group_in, channel_stride, IN_BLOCKS, BLOCK_C, PRECISION
    )
    apart, before = _affine(z, mean, scale, shift, out, known)
    grad = _grad_of_affine(
        grad_output, out_place, exists, out, known, out_channel_stride, groups, group_out, before, ACTIVATION, SHUFFLE
    )
    grad *= _row(scale, out, known, 1.0)
    if of_mean is not None:
        grad -= _row(of_mean, out, known, 0.0) + apart * _row(of_apart, out, known, 0.0)
    return tl.where(exists[:, None] & known[None, :], grad, 0.0)


@triton.jit
def group_conv1x1_forward_kernel(
    input, weight, mean, scale, shift,
    output,  # [N, O, H, W]
    count, image_pixels, channels, out_channels, groups, group_in, group_out,
    channel_stride, pixel_stride, out_channel_stride, out_pixel_stride,
    ACTIVATION: tl.constexpr, SHUFFLE: tl.constexpr, IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """output = shuffle(act((z - mean) * scale + shift))."""
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = index < count
    place, out_place = _pixels(index, image_pixels, channels, out_channels, pixel_stride, out_pixel_stride, LAST, WIDE)
    group = tl.program_id(1 - AXIS) // OUT_BLOCKS
    out = tl.program_id(1 - AXIS) % OUT_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    known = out < group_out
    out += group * group_out
    z = _convolved(
        input, place, exists, weight, group, out, known, group_in, channel_stride, IN_BLOCKS, BLOCK_C, PRECISION
    )
    _, before = _affine(z, mean, scale, shift, out, known)
    element = _elements(out_place, _shuffled(out, groups, group_out, SHUFFLE), out_channel_stride)
    y = narrow(activated(before, ACTIVATION), output.dtype.element_ty)
    tl.store(output + element, y, exists[:, None] & known[None, :])


@triton.jit
def group_conv1x1_statistics_kernel(
    input, weight,
    means,  # [parts, O] float32
    squares,  # [parts, O] float32: sums of squared distances from the part's mean
    part_pixels,
    count, image_pixels, channels, out_channels, groups, group_in, group_out,
    channel_stride, pixel_stride, out_channel_stride, out_pixel_stride,
    IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Mean and squared distances of z over a part of the pixels.

    Each row of the tiles keeps its own (Welford 1962); they are put together at the end (Chan et al. 1979).
    """
    group = tl.program_id(1 - AXIS) // OUT_BLOCKS
    out = tl.program_id(1 - AXIS) % OUT_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    known = out < group_out
    out += group * group_out
    mean = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    square = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists = index < count
        place, _ = _pixels(index, image_pixels, channels, out_channels, pixel_stride, out_pixel_stride, LAST, WIDE)
        z = _convolved(
            input, place, exists, weight, group, out, known, group_in, channel_stride, IN_BLOCKS, BLOCK_C, PRECISION
        )
        apart = tl.where(exists[:, None], z - mean, 0.0)
        mean += apart * (1.0 / (start // BLOCK_P + 1))
        square += apart * (z - mean)
    seen = tl.cdiv(count - first - tl.arange(0, BLOCK_P), BLOCK_P)  # by each row of the tiles
    seen = tl.minimum(tl.maximum(seen, 0), part_pixels // BLOCK_P).to(tl.float32)[:, None]
    total_mean = tl.sum(mean * (seen / tl.sum(seen, 0)), 0)
    apart = mean - total_mean[None, :]
    row = tl.program_id(AXIS) * out_channels + out
    tl.store(means + row, total_mean, known)
    tl.store(squares + row, tl.sum(square + apart * apart * seen, 0), known)


@triton.jit
def group_conv1x1_backward_sums_kernel(
    grad_output, input, weight, mean, scale, shift,
    sums,  # [parts, O] float32: of the gradient before the activation
    products,  # [parts, O] float32: of it times z - mean
    part_pixels,
    count, image_pixels, channels, out_channels, groups, group_in, group_out,
    channel_stride, pixel_stride, out_channel_stride, out_pixel_stride,
    ACTIVATION: tl.constexpr, SHUFFLE: tl.constexpr, IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Gradients to shift and scale over a part of the pixels."""
    group = tl.program_id(1 - AXIS) // OUT_BLOCKS
    out = tl.program_id(1 - AXIS) % OUT_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    known = out < group_out
    out += group * group_out
    sum = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    product = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists = index < count
        place, out_place = _pixels(
            index, image_pixels, channels, out_channels, pixel_stride, out_pixel_stride, LAST, WIDE
        )
        z = _convolved(
            input, place, exists, weight, group, out, known, group_in, channel_stride, IN_BLOCKS, BLOCK_C, PRECISION
        )
        apart, before = _affine(z, mean, scale, shift, out, known)
        grad = _grad_of_affine(
            grad_output,
            out_place,
            exists,
            out,
            known,
            out_channel_stride,
            groups,
            group_out,
            before,
            ACTIVATION,
            SHUFFLE,
        )
        sum += grad
        product += tl.where(exists[:, None], grad * apart, 0.0)
    row = tl.program_id(AXIS) * out_channels + out
    tl.store(sums + row, tl.sum(sum, 0), known)
    tl.store(products + row, tl.sum(product, 0), known)


@triton.jit
def group_conv1x1_backward_input_kernel(
    grad_output, input, weight, mean, scale, shift, of_mean, of_apart,
    grad_input,  # [N, C, H, W]
    count, image_pixels, channels, out_channels, groups, group_in, group_out,
    channel_stride, pixel_stride, out_channel_stride, out_pixel_stride,
    ACTIVATION: tl.constexpr, SHUFFLE: tl.constexpr, IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """grad_input[p, c] = sum over o of grad_z[p, o] * weight[o, c]."""
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists = index < count
    place, out_place = _pixels(index, image_pixels, channels, out_channels, pixel_stride, out_pixel_stride, LAST, WIDE)
    group = tl.program_id(1 - AXIS) // IN_BLOCKS
    channel = tl.program_id(1 - AXIS) % IN_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < group_in
    sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for block in range(OUT_BLOCKS):
        out = block * BLOCK_O + tl.arange(0, BLOCK_O)
        known = out < group_out
        out += group * group_out
        grad = _grad_convolved(
            grad_output,
            out_place,
            input,
            place,
            exists,
            weight,
            mean,
            scale,
            shift,
            of_mean,
            of_apart,
            group,
            out,
            known,
            group_in,
            channel_stride,
            out_channel_stride,
            groups,
            group_out,
            ACTIVATION,
            SHUFFLE,
            IN_BLOCKS,
            BLOCK_C,
            PRECISION,
        )
        kernel = tl.load(weight + out[:, None] * group_in + channel[None, :], known[:, None] & inside[None, :], 0.0)
        sum = _dot_exact(grad, kernel.to(tl.float32), sum, weight.dtype.element_ty, PRECISION)
    element = _elements(place, group * group_in + channel, channel_stride)
    tl.store(grad_input + element, narrow(sum, grad_input.dtype.element_ty), exists[:, None] & inside[None, :])


@triton.jit
def group_conv1x1_backward_weight_kernel(
    grad_output, input, weight, mean, scale, shift, of_mean, of_apart,
    grad_weights,  # [parts, O, C / G] float32
    part_pixels,
    count, image_pixels, channels, out_channels, groups, group_in, group_out,
    channel_stride, pixel_stride, out_channel_stride, out_pixel_stride,
    ACTIVATION: tl.constexpr, SHUFFLE: tl.constexpr, IN_BLOCKS: tl.constexpr, OUT_BLOCKS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """grad_weight[o, c] = sum over p of grad_z[p, o] * x[p, c], over a part of the pixels."""
    group = tl.program_id(1 - AXIS) // (IN_BLOCKS * OUT_BLOCKS)
    channel = tl.program_id(1 - AXIS) % IN_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < group_in
    out = tl.program_id(1 - AXIS) // IN_BLOCKS % OUT_BLOCKS * BLOCK_O + tl.arange(0, BLOCK_O)
    known = out < group_out
    out += group * group_out
    sum = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists = index < count
        place, out_place = _pixels(
            index, image_pixels, channels, out_channels, pixel_stride, out_pixel_stride, LAST, WIDE
        )
        grad = _grad_convolved(
            grad_output,
            out_place,
            input,
            place,
            exists,
            weight,
            mean,
            scale,
            shift,
            of_mean,
            of_apart,
            group,
            out,
            known,
            group_in,
            channel_stride,
            out_channel_stride,
            groups,
            group_out,
            ACTIVATION,
            SHUFFLE,
            IN_BLOCKS,
            BLOCK_C,
            PRECISION,
        )
        element = _elements(place, group * group_in + channel, channel_stride)
        x = tl.load(input + element, exists[:, None] & inside[None, :], 0.0).to(tl.float32)
        sum = _dot_exact(tl.trans(grad), x, sum, input.dtype.element_ty, PRECISION)
    element = (tl.program_id(AXIS) * out_channels + out[:, None]) * group_in + channel[None, :]
    tl.store(grad_weights + element, sum, known[:, None] & inside[None, :])

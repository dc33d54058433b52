"""The kernels of `frelu` and `depthwise_conv2d`: y = act((z - mean) * scale + shift), z = dwconv(x, weight).

act is one of `_activation.py`'s, or "funnel" for the larger of what it is given and x. With statistics of the batch,
scale is gamma / deviation and shift is beta; without them there is no mean. z is never stored: each kernel that needs
it convolves again.

What bounds a depthwise convolution on a GPU is not its bytes but its instructions: an H200 issues 27 for each bfloat16
element in the time in which that is read and written, and 9 of them are the products. A pixel by itself loads and
widens 9 neighbours, finds out for each whether it lies in the image, and loads 9 weights: 104 instructions. So a lane
walks down a strip of the image, COLUMNS pixels wide, with the weight in registers: of each row of the input it loads
COLUMNS + K - 1 values, which add to K rows of the output at once, and while it works on them the next row is on its
way. Where a strip lies is worked out once: 24 instructions an element (channels_last, strips of 56 rows).
"""

from __future__ import annotations

import triton
import triton.language as tl

from cellops.triton._activation import activated, slope
from cellops.triton._numerics import narrow
from cellops.triton._pixels import channel_values, tile_elements

VARYING = ("rows", "across", "of_image", "count", "height", "part_strips")
"""Sizes that do not decide how addresses are aligned: a kernel compiled for each that is 1 or a multiple of 16 is no
faster, and images of many sizes would need a hundred of them."""


@triton.jit
def _strips(
    index, count, rows, across, of_image, image_elements, height, width, pixel_stride, COLUMNS, WIDE: tl.constexpr
):
    """Strips numbered over all images, as the functions below take them, and the offsets of their first pixels [P]."""
    image, strip = index // of_image, index % of_image
    row, column = strip // across * rows, strip % across * COLUMNS
    if WIDE:
        image, row = image.to(tl.int64), row.to(tl.int64)
        width, pixel_stride = tl.cast(width, tl.int64), tl.cast(pixel_stride, tl.int64)
    place = image * image_elements + (row * width + column) * pixel_stride
    return (index < count, row, column, height, width, pixel_stride), place


@triton.jit
def _inside(strips, known, i, J: tl.constexpr):
    """Whether the pixel i rows and J columns on from each strip's first is one of the image, [C, P]."""
    exists, row, column, height, width, _ = strips
    exists = exists & (row + i >= 0) & (row + i < height)
    return known[:, None] & (exists & (column + J >= 0) & (column + J < width))[None, :]


@triton.jit
def _step(strips, i, J: tl.constexpr):
    """How many elements on that is."""
    _, _, _, _, width, pixel_stride = strips
    return (i * width + J) * pixel_stride


@triton.jit
def _row_of(pointer, strips, known, i, K: tl.constexpr, COLUMNS: tl.constexpr):
    """COLUMNS + K - 1 values [C, P]: each strip's row i and what the window sees beside it; 0 outside the image.

    `_inside` and `_step` are written out: a call for every value doubles the interpreter's time.
    """
    exists, row, column, height, width, pixel_stride = strips
    exists = exists & (row + i >= 0) & (row + i < height)
    values = ()
    for j in tl.static_range(COLUMNS + K - 1):
        inside = exists & (column + (j - K // 2) >= 0) & (column + (j - K // 2) < width)
        step = (i * width + (j - K // 2)) * pixel_stride
        values = values + (tl.load(pointer + step, known[:, None] & inside[None, :], 0.0),)
    return values


@triton.jit
def _grads_before(pointer, strips, known, zero, K: tl.constexpr, COLUMNS: tl.constexpr):
    """The strip's row of gradients that a loop over rows begins with: with K = 1 its first, else none yet."""
    if K == 1:
        return _row_of(pointer, strips, known, 0, 1, COLUMNS)
    else:
        return (zero.to(pointer.dtype.element_ty),) * COLUMNS


@triton.jit
def _taps(weight, channel, known, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The weight's taps row by row, K * K of [C, 1] in float32; from the last to the first for the transpose."""
    taps = ()
    for tap in tl.static_range(K * K):
        place = channel * (K * K) + (K * K - 1 - tap if TRANSPOSED else tap)
        taps = taps + (tl.load(weight + place, known, 0.0).to(tl.float32)[:, None],)
    return taps


@triton.jit
def _with_row(sums, values, taps, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of K rows of the output, K * COLUMNS of [C, P] from the upper row on, with the input's row below them."""
    wide, added = (), ()
    for j in tl.static_range(COLUMNS + K - 1):
        wide = wide + (values[j].to(tl.float32),)
    for at in tl.static_range(K * COLUMNS):
        sum = sums[at]
        for j in tl.static_range(K):
            sum += taps[(K - 1 - at // COLUMNS) * K + j] * wide[at % COLUMNS + j]
        added = added + (sum,)
    return added


@triton.jit
def _from(tensors, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of the tensors, from the one numbered FIRST on."""
    chosen = ()
    for at in tl.static_range(COUNT):
        chosen = chosen + (tensors[FIRST + at],)
    return chosen


@triton.jit
def _moved_on(sums, zero, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of K rows without the first of them, which is done, and with one that begins."""
    return _from(sums, COLUMNS, (K - 1) * COLUMNS) + (zero,) * COLUMNS


@triton.jit
def _affine(z, mean, scale, shift):
    """z - mean and what the activation is given."""
    apart = z - mean
    return apart, apart * scale + shift


@triton.jit
def _columns(mean, scale, shift, channel, known):
    """Numbers of the channels, [C, 1], for registers; an absent tensor counts as 0 (mean, shift) or 1."""
    return (
        channel_values(mean, channel, known, 0.0),
        channel_values(scale, channel, known, 1.0),
        channel_values(shift, channel, known, 0.0),
    )


@triton.jit
def _split(grad, x, before):
    """The gradients of max(x, before): halves where both are equal, all of it to both where one is NaN."""
    shared = tl.where(x == before, grad * 0.5, grad)
    return tl.where(x < before, 0.0, shared), tl.where(x > before, 0.0, shared)


@triton.jit
def _own(values, K: tl.constexpr, COLUMNS: tl.constexpr):
    """The strip's own pixels of a row, in float32."""
    own = ()
    for b in tl.static_range(COLUMNS):
        own = own + (values[K // 2 + b].to(tl.float32),)
    return own


@triton.jit
def _through(grad, x, before, ACTIVATION: tl.constexpr):
    """The gradient to what the activation, or the funnel, is given."""
    if ACTIVATION == "funnel":
        _, through = _split(grad, x, before)
        return through
    else:
        return grad * slope(before, ACTIVATION)


@triton.jit(do_not_specialize=VARYING)
def depthwise_forward_kernel(
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,  # [C] float32, or None for 0
    scale,  # [C], or None for 1
    shift,  # [C], or None for 0
    output,  # [N, C, H, W]
    height, width, channels, across, of_image, count, rows, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """output = act((dwconv(x) - mean) * scale + shift)."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    strips, place = _strips(
        index, count, rows, across, of_image, image_elements, height, width, pixel_stride, COLUMNS, WIDE
    )
    element = tile_elements(channel, place, channel_stride)
    mean, scale, shift = _columns(mean, scale, shift, channel, known)
    taps = _taps(weight, channel, known, K, False)
    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sums = (zero,) * (K * COLUMNS)
    held = (zero,) * (K // 2 * COLUMNS)  # the strip's own pixels of rows whose output is not done
    ahead = _row_of(input + element, strips, known, -(K // 2), K, COLUMNS)
    for i in range(-(K // 2), rows + K // 2):
        values = ahead
        ahead = _row_of(input + element, strips, known, i + 1, K, COLUMNS)
        sums = _with_row(sums, values, taps, K, COLUMNS)
        held = held + _own(values, K, COLUMNS)
        done = i - K // 2
        if done >= 0:
            for b in tl.static_range(COLUMNS):
                _, before = _affine(sums[b], mean, scale, shift)
                if ACTIVATION == "funnel":
                    y = tl.maximum(held[b], before, propagate_nan=tl.PropagateNan.ALL)
                else:
                    y = activated(before, ACTIVATION)
                to = output + element + _step(strips, done, b)
                inside = _inside(strips, known, done, b)
                tl.store(to, narrow(y, output.dtype.element_ty), inside)
        held = _from(held, COLUMNS, K // 2 * COLUMNS)
        sums = _moved_on(sums, zero, K, COLUMNS)


@triton.jit(do_not_specialize=VARYING)
def depthwise_statistics_kernel(
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    means,  # [parts, C] float32
    squares,  # [parts, C] float32: sums of squared distances from the part's mean
    sizes,  # [parts] float32: pixels
    part_strips,
    height, width, channels, across, of_image, count, rows, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Mean and squared distances of the convolution over a part of the strips: each lane's own, then all lanes'.

    A strip's are sums of distances from its first pixel, whose own distance from the mean is at most the deviation
    times the root of the pixels: that many roundings may be lost and no more. Strips are joined as in Chan et al. 1979.
    """
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    taps = _taps(weight, channel, known, K, False)
    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    mean, square, seen = zero, zero, tl.zeros([BLOCK_P], tl.float32)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_strips
    for start in range(0, part_strips, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        strips, place = _strips(
            index, count, rows, across, of_image, image_elements, height, width, pixel_stride, COLUMNS, WIDE
        )
        pointer = input + tile_elements(channel, place, channel_stride)
        first_pixel, distance, squared = zero, zero, zero
        sums = (zero,) * (K * COLUMNS)
        ahead = _row_of(pointer, strips, known, -(K // 2), K, COLUMNS)
        for i in range(-(K // 2), rows + K // 2):
            values = ahead
            ahead = _row_of(pointer, strips, known, i + 1, K, COLUMNS)
            sums = _with_row(sums, values, taps, K, COLUMNS)
            done = i - K // 2
            if done >= 0:
                first_pixel = tl.where(done == 0, sums[0], first_pixel)
                for b in tl.static_range(COLUMNS):
                    apart = tl.where(_inside(strips, known, done, b), sums[b] - first_pixel, 0.0)
                    distance += apart
                    squared += apart * apart
            sums = _moved_on(sums, zero, K, COLUMNS)
        exists, row, column, _, _, _ = strips
        size = tl.minimum(rows, height - row) * tl.minimum(COLUMNS, width - column)
        size = tl.where(exists, size, 0).to(tl.float32)
        apart = distance / tl.maximum(size, 1.0)[None, :]
        squared = tl.maximum(squared - distance * apart, 0.0, propagate_nan=tl.PropagateNan.ALL)
        share = (size / tl.maximum(seen + size, 1.0))[None, :]
        apart = tl.where(size[None, :] > 0, first_pixel + apart - mean, 0.0)
        mean += apart * share
        square += squared + apart * apart * seen[None, :] * share
        seen += size
    size = tl.sum(seen, 0)
    total = tl.sum(mean * seen[None, :], 1) / tl.maximum(size, 1.0)
    apart = mean - total[:, None]
    place = tl.program_id(AXIS) * channels + channel
    tl.store(means + place, total, known)
    tl.store(squares + place, tl.sum(square + apart * apart * seen[None, :], 1), known)
    tl.store(sizes + tl.program_id(AXIS), size)


@triton.jit(do_not_specialize=VARYING)
def depthwise_backward_sums_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    weight,  # [C, K, K]
    mean,
    scale,
    shift,
    sums_of_grad,  # [parts, C] float32: of the gradient that goes through the convolution
    products,  # [parts, C] float32: of it times z - mean
    part_strips,
    height, width, channels, across, of_image, count, rows, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the strips: the gradient to shift, and that to scale."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean, scale, shift = _columns(mean, scale, shift, channel, known)
    taps = _taps(weight, channel, known, K, False)
    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum, product = zero, zero
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_strips
    for start in range(0, part_strips, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        strips, place = _strips(
            index, count, rows, across, of_image, image_elements, height, width, pixel_stride, COLUMNS, WIDE
        )
        element = tile_elements(channel, place, channel_stride)
        sums = (zero,) * (K * COLUMNS)
        held = (zero,) * (K // 2 * COLUMNS)
        ahead = _row_of(input + element, strips, known, -(K // 2), K, COLUMNS)
        for i in range(-(K // 2), rows + K // 2):
            done = i - K // 2
            grads = (zero.to(grad_output.dtype.element_ty),) * COLUMNS
            if done >= 0:  # on their way while z is added up
                grads = _row_of(grad_output + element, strips, known, done, 1, COLUMNS)
            values = ahead
            ahead = _row_of(input + element, strips, known, i + 1, K, COLUMNS)
            sums = _with_row(sums, values, taps, K, COLUMNS)
            held = held + _own(values, K, COLUMNS)
            if done >= 0:
                for b in tl.static_range(COLUMNS):
                    inside = _inside(strips, known, done, b)
                    apart, before = _affine(sums[b], mean, scale, shift)
                    through = _through(grads[b].to(tl.float32), held[b], before, ACTIVATION)
                    sum += tl.where(inside, through, 0.0)
                    product += tl.where(inside, through * apart, 0.0)
            held = _from(held, COLUMNS, K // 2 * COLUMNS)
            sums = _moved_on(sums, zero, K, COLUMNS)
    place = tl.program_id(AXIS) * channels + channel
    tl.store(sums_of_grad + place, tl.sum(sum, 1), known)
    tl.store(products + place, tl.sum(product, 1), known)


@triton.jit
def _with_products(
    tap_sums, grad, window, inside, B: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr
):
    """Sums for each tap with the gradient of one pixel times the input beside it; `window` has K rows of that."""
    added = ()
    for tap in tl.static_range(K * K):
        product = grad * window[tap // K * (COLUMNS + K - 1) + B + tap % K].to(tl.float32)
        if RAGGED:  # an infinite value times the 0 of a pixel that there is not would be NaN
            product = tl.where(inside, product, 0.0)
        added = added + (tap_sums[tap] + product,)
    return added


@triton.jit(do_not_specialize=VARYING)
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
    grad_weights,  # [parts, C, K * K] float32
    part_strips,
    height, width, channels, across, of_image, count, rows, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    RAGGED: tl.constexpr,  # some strips reach beyond the image
    WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """grad_z = through * scale - of_mean - (z - mean) * of_apart; sums of grad_z * x at each tap, in registers."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    mean, scale, shift = _columns(mean, scale, shift, channel, known)
    taps = _taps(weight, channel, known, K, False)
    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if of_mean is not None:
        mean_share = channel_values(of_mean, channel, known, 0.0)
        apart_share = channel_values(of_apart, channel, known, 0.0)
    tap_sums = (zero,) * (K * K)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_strips
    for start in range(0, part_strips, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        strips, place = _strips(
            index, count, rows, across, of_image, image_elements, height, width, pixel_stride, COLUMNS, WIDE
        )
        element = tile_elements(channel, place, channel_stride)
        sums = (zero,) * (K * COLUMNS)
        window = (zero.to(input.dtype.element_ty),) * ((K - 1) * (COLUMNS + K - 1))  # the last rows of the input
        ahead = _row_of(input + element, strips, known, -(K // 2), K, COLUMNS)
        for i in range(-(K // 2), rows + K // 2):
            done = i - K // 2
            grads = (zero.to(grad_output.dtype.element_ty),) * COLUMNS
            if done >= 0:  # on their way while z is added up
                grads = _row_of(grad_output + element, strips, known, done, 1, COLUMNS)
            window = window + ahead
            ahead = _row_of(input + element, strips, known, i + 1, K, COLUMNS)
            sums = _with_row(sums, _from(window, (K - 1) * (COLUMNS + K - 1), COLUMNS + K - 1), taps, K, COLUMNS)
            if done >= 0:
                for b in tl.static_range(COLUMNS):
                    inside = _inside(strips, known, done, b)
                    step = _step(strips, done, b)
                    grad = grads[b].to(tl.float32)
                    x = window[K // 2 * (COLUMNS + K - 1) + b + K // 2].to(tl.float32)
                    apart, before = _affine(sums[b], mean, scale, shift)
                    grad_z = _through(grad, x, before, ACTIVATION) * scale
                    if of_mean is not None:
                        grad_z -= mean_share + apart * apart_share
                    grad_z = tl.where(inside, grad_z, 0.0)
                    tl.store(grad_convolved + element + step, grad_z, inside)
                    tap_sums = _with_products(tap_sums, grad_z, window, inside, b, K, COLUMNS, RAGGED)
            window = _from(window, COLUMNS + K - 1, (K - 1) * (COLUMNS + K - 1))
            sums = _moved_on(sums, zero, K, COLUMNS)
    place = (tl.program_id(AXIS) * channels + channel) * (K * K)
    for tap in tl.static_range(K * K):
        tl.store(grad_weights + place + tap, tl.sum(tap_sums[tap], 1), known)


@triton.jit(do_not_specialize=VARYING)
def depthwise_backward_input_kernel(
    grad_output,  # [N, C, H, W], or None without a funnel: nothing but the convolution's gradient reaches x
    input,  # [N, C, H, W], or None likewise
    weight,  # [C, K, K]
    mean,
    scale,
    shift,
    grad_convolved,  # [N, C, H, W] float32
    grad_input,  # [N, C, H, W]
    height, width, channels, across, of_image, count, rows, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """grad_input = dwconv transposed (grad_z, weight), and the gradient of max(x, before) to x itself."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    strips, place = _strips(
        index, count, rows, across, of_image, image_elements, height, width, pixel_stride, COLUMNS, WIDE
    )
    element = tile_elements(channel, place, channel_stride)
    zero = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    back = (zero,) * (K * COLUMNS)
    back_taps = _taps(weight, channel, known, K, True)
    if grad_output is not None:
        mean, scale, shift = _columns(mean, scale, shift, channel, known)
        taps = _taps(weight, channel, known, K, False)
        sums = (zero,) * (K * COLUMNS)
        held = (zero,) * (K // 2 * COLUMNS)
        inputs_ahead = _row_of(input + element, strips, known, -(K // 2), K, COLUMNS)
        grads_ahead = _grads_before(grad_output + element, strips, known, zero, K, COLUMNS)
    ahead = _row_of(grad_convolved + element, strips, known, -(K // 2), K, COLUMNS)
    for i in range(-(K // 2), rows + K // 2):
        values = ahead
        ahead = _row_of(grad_convolved + element, strips, known, i + 1, K, COLUMNS)
        back = _with_row(back, values, back_taps, K, COLUMNS)
        done = i - K // 2
        if grad_output is not None:
            values, grads = inputs_ahead, grads_ahead
            inputs_ahead = _row_of(input + element, strips, known, i + 1, K, COLUMNS)
            if (done >= -1) & (done + 1 < rows):
                grads_ahead = _row_of(grad_output + element, strips, known, done + 1, 1, COLUMNS)
            sums = _with_row(sums, values, taps, K, COLUMNS)
            held = held + _own(values, K, COLUMNS)
        if done >= 0:
            for b in tl.static_range(COLUMNS):
                inside = _inside(strips, known, done, b)
                step = _step(strips, done, b)
                grad_x = back[b]
                if grad_output is not None:
                    _, before = _affine(sums[b], mean, scale, shift)
                    direct, _ = _split(grads[b].to(tl.float32), held[b], before)
                    grad_x += direct
                tl.store(grad_input + element + step, narrow(grad_x, grad_input.dtype.element_ty), inside)
        back = _moved_on(back, zero, K, COLUMNS)
        if grad_output is not None:
            held = _from(held, COLUMNS, K // 2 * COLUMNS)
            sums = _moved_on(sums, zero, K, COLUMNS)

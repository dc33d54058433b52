"""Deformable convolution with its sampling in CUDA C++ (csrc/cuda/deform_conv2d.h) and its products by torch.

Tiles of whole rows of output pixels: forward samples columns into scratch and multiplies them with the weight.
Backward multiplies grad_output with the weight, which gives the columns' gradients, scatters them to the input's and
replaces them by the columns, of which it makes the weight's. Scratch is a tile of columns: 4 MiB or a 32nd of all, or a
row where that is more; beside it the images that must be copied: NCHW ones, float32 gradients of half types, and
gradients in fixed point.

Shapes: P pixels of a tile, G column groups, K taps; a column is [K, C / G]. Depthwise, all channels are one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _native
from cellops.cuda._fixed_point import exponents_for, largest_finite, round_sums
from cellops.cuda._launch import launch, storage

SCRATCH_BYTES = 4 << 20
"""Of columns, and of images that must be copied; more where there are many, see `_Call`."""

MOST_SAMPLES = (1 << 27) - 1
"""Of a tile: the kernels number 32 threads for each in 32 bits."""

Pair = Sequence[int]


class _Call(NamedTuple):
    """The images that are taken at once: the tensors as the kernels read them, and what the products need."""

    input: Tensor  # [n, C, H, W], channels_last
    offset: Tensor
    mask: Tensor | None
    weights: Tensor  # [G, O / G, K * C / G]; depthwise [O / C, K, C]
    conv: tuple[int, ...]  # kernel, stride, padding, dilation, vertical before horizontal
    depthwise: bool
    tile: int  # pixels

    @property
    def groups(self) -> int:
        """Of a column."""
        return 1 if self.depthwise else self.weights.shape[0]

    @property
    def taps(self) -> int:
        return self.conv[0] * self.conv[1]

    def columns(self) -> Tensor:
        """Scratch for a tile's columns."""
        return self.input.new_empty(self.tile * self.taps * self.input.shape[1])

    def tiles(self) -> Iterator[slice]:
        """The output pixels of all images."""
        count = self.input.shape[0] * self.offset.shape[2] * self.offset.shape[3]
        for start in range(0, count, self.tile):
            yield slice(start, min(start + self.tile, count))

    def of_tile(self, columns: Tensor, pixels: slice) -> Tensor:
        """The scratch as a tile's columns [G, P, K * C / G]; depthwise [P, K, C]."""
        count, channels = pixels.stop - pixels.start, self.input.shape[1]
        shape = (count, self.taps, channels) if self.depthwise else (self.groups, count, -1)
        return columns[: count * self.taps * channels].view(shape)

    def params(self, pixels: slice) -> Any:
        """The library's parameters for a tile."""
        names = ("kernel", "stride", "pad", "dilation")
        pairs = {f"{name}_{axis}": self.conv[2 * i + j] for i, name in enumerate(names) for j, axis in _AXES}
        return _native.library().DeformConv2dTileParams(
            in_channels=self.input.shape[1],
            in_height=self.input.shape[2],
            in_width=self.input.shape[3],
            out_height=self.offset.shape[2],
            out_width=self.offset.shape[3],
            **pairs,
            offset_groups=self.offset.shape[1] // (2 * self.taps),
            column_groups=self.groups,
            first=pixels.start,
            count=pixels.stop - pixels.start,
            dtype=storage(self.input),
            offset_dtype=storage(self.offset),
            offset_channels_last=not self.offset.is_contiguous(),
            mask_channels_last=self.mask is not None and not self.mask.is_contiguous(),
        )

    def sample(self, columns: Tensor, pixels: slice) -> None:
        """Fill the scratch with a tile's columns."""
        launch("deform_conv2d_columns", self.params(pixels), self.input, self.offset, self.mask, columns)


_AXES = ((0, "height"), (1, "width"))


def _calls(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, conv: tuple[int, ...], copied_bytes: int
) -> Iterator[tuple[slice, _Call]]:
    """The call in ranges of images; `copied_bytes` of an image's copies, 0 where it is read and added to in place."""
    batch, channels = input.shape[:2]
    out_channels, group_in, *kernel = weight.shape
    depthwise = group_in == 1
    taps = kernel[0] * kernel[1]
    if depthwise:
        weights = weight.reshape(channels, -1, taps).permute(1, 2, 0).contiguous()
    else:
        groups = channels // group_in
        weights = weight.reshape(groups, out_channels // groups, group_in, taps).transpose(2, 3).flatten(2)
    column_bytes = taps * channels * input.element_size()
    count = batch * offset.shape[2] * offset.shape[3]
    width = offset.shape[3]
    tile = min(max(SCRATCH_BYTES // column_bytes, count // 32), MOST_SAMPLES // (offset.shape[1] // 2))
    tile = max(tile // max(width, 1), 1) * max(width, 1)
    size = max(SCRATCH_BYTES // copied_bytes, batch // 16, 1) if copied_bytes else max(batch, 1)
    for start in range(0, batch, size):
        images = slice(start, min(start + size, batch))
        part = None if mask is None else mask[images]
        pixels = (images.stop - start) * offset.shape[2] * offset.shape[3]
        yield (
            images,
            _Call(
                input[images].contiguous(memory_format=torch.channels_last),
                offset[images],
                part,
                weights,
                (*kernel, *conv),
                depthwise,
                min(tile, pixels),
            ),
        )


def _rows(images: Tensor) -> Tensor:
    """[pixels of all images, channels]; a view of channels_last images."""
    return images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])


def refuses(shapes: Sequence[Any], dtype: torch.dtype, channels_last: bool) -> str | None:
    """Why the kernels cannot take these sizes: they number output pixels in 32 bits, and the samples of a tile."""
    _, channels, height, width = shapes[1]
    too_many = height * width >= 2**32 or width * channels // 2 > MOST_SAMPLES
    return "its CUDA kernels take images of fewer than 2^32 output pixels, rows of 2^27 samples" if too_many else None


def deform_conv2d_forward_cuda(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    mask: Tensor | None,
) -> Tensor:
    """[N, O, OH, OW]; arguments as in `cellops.deform_conv2d`, each dense in either memory format."""
    in_place = input.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.contiguous_format if input.is_contiguous() else torch.channels_last
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format)
    copied = 0 if in_place else input[:1].numel() * input.element_size()
    columns: Tensor | None = None  # of the first images, which are the most
    for images, call in _calls(input, offset, weight, mask, (*stride, *padding, *dilation), copied):
        direct = output[images].is_contiguous(memory_format=torch.channels_last)
        result = output[images] if direct else torch.empty_like(output[images], memory_format=torch.channels_last)
        rows, columns = _rows(result), call.columns() if columns is None else columns
        for pixels in call.tiles():
            call.sample(columns, pixels)
            tile = call.of_tile(columns, pixels)
            if call.depthwise:
                products = torch.stack([(tile.float() * taps).sum(1) for taps in call.weights.float()], 2)
            else:
                products = torch.bmm(tile, call.weights.transpose(1, 2)).transpose(0, 1)
            rows[pixels] = products.flatten(1).to(rows.dtype)
        if bias is not None:
            rows += bias
        if not direct:
            output[images].copy_(result)
        call = result = rows = None  # before those of the next images are made
    return output


def deform_conv2d_backward_cuda(
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

    The input's is added up by atomics, in float32, and under `torch.use_deterministic_algorithms(True)` in fixed point.
    """
    want_input, want_offset, want_weight, want_bias, want_mask = wanted
    want_mask = want_mask and mask is not None
    fixed = want_input and torch.are_deterministic_algorithms_enabled()
    grad_input = torch.empty_like(input) if want_input else None
    grad_offset = torch.empty_like(offset) if want_offset else None
    grad_mask = torch.empty_like(mask) if want_mask else None
    grad_weight: Tensor | None = None
    columns: Tensor | None = None  # of the first images, which are the most
    in_place = input.is_contiguous(memory_format=torch.channels_last)
    adds_in_place = in_place and input.dtype == torch.float32 and not fixed
    copied = 0 if adds_in_place or (in_place and not want_input) else (8 if fixed else 4) * input[:1].numel()
    for images, call in _calls(input, offset, weight, mask, (*stride, *padding, *dilation), copied):
        rows, columns = _rows(grad_output[images]), call.columns() if columns is None else columns
        exponents = _exponents(grad_output[images], weight, call) if fixed else None
        sums = None
        if want_input:
            dtype = torch.int64 if fixed else torch.float32
            sums = grad_input[images] if adds_in_place else torch.empty_like(call.input, dtype=dtype)
            sums.zero_()
        shifts, factors = (None if one is None else one[images] for one in (grad_offset, grad_mask))
        found = _gradients(call, rows, columns, exponents, sums, shifts, factors, want_weight)
        if found is not None:
            grad_weight = found if grad_weight is None else grad_weight + found
        if fixed:
            result = grad_input[images] if in_place else torch.empty_like(call.input)
            round_sums(sums, exponents, result)
            if not in_place:
                grad_input[images].copy_(result)
        elif want_input and not adds_in_place:
            grad_input[images].copy_(sums)
        call = sums = rows = None  # before those of the next images are made
    if want_weight:
        grad_weight = torch.zeros_like(weight) if grad_weight is None else _as_weight(grad_weight, weight)
    grad_bias = grad_output.sum((0, 2, 3), dtype=torch.float32) if want_bias else None
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask


def _gradients(
    call: _Call,
    rows: Tensor,
    columns: Tensor,
    exponents: Tensor | None,
    sums: Tensor | None,
    grad_offset: Tensor | None,
    grad_mask: Tensor | None,
    want_weight: bool,
) -> Tensor | None:
    """Add to `sums`, the input's gradient, and write those of offset and mask; return the weight's of these images.

    `exponents` are there for sums in fixed point, `columns` is scratch, and `rows` are those of grad_output.
    """
    grad_weight: Tensor | None = None
    wants_corners = exponents is not None or grad_offset is not None or grad_mask is not None
    for pixels in call.tiles():
        params, grad, tile = call.params(pixels), rows[pixels], call.of_tile(columns, pixels)
        if sums is not None or wants_corners:
            _grad_columns(call, grad, tile)
        if sums is not None and exponents is None:
            launch("deform_conv2d_scatter", params, call.offset, call.mask, columns, sums)
        if wants_corners:
            targets = (exponents, None if exponents is None else sums, grad_offset, grad_mask)
            tensors = (call.input, call.offset, call.mask, columns, *targets, columns if want_weight else None)
            launch("deform_conv2d_corners", params, *tensors)
        if want_weight:
            if not wants_corners:
                call.sample(columns, pixels)
            found = _grad_weights(call, grad, tile)
            grad_weight = found if grad_weight is None else grad_weight + found
    return grad_weight


def _exponents(grad_output: Tensor, weight: Tensor, call: _Call) -> Tensor:
    """Of the gradients to the images: a column's gradient is a sum over output channels, then times the mask."""
    out_channels, group_in = weight.shape[:2]
    groups = call.input.shape[1] // group_in
    sizes = weight.float().nan_to_num(0.0, 0.0, 0.0).abs().unflatten(0, (groups, out_channels // groups))
    twice = 2 * sizes.sum(1).amax((2, 3)).flatten()  # of each input channel, with room for rounding
    factors = [largest_finite(grad_output, (1, 2, 3))[:, None], twice.clamp(max=torch.finfo(torch.float32).max)]
    if call.mask is not None:
        factors.append(largest_finite(call.mask, (1, 2, 3))[:, None])
    return exponents_for(call.taps * grad_output.shape[2] * grad_output.shape[3], *factors)


def _by_group(call: _Call, grad: Tensor) -> Tensor:
    """A tile's rows of grad_output [P, O] as [G, P, O / G]; depthwise [P, C, O / C] in float32."""
    if call.depthwise:
        return grad.float().unflatten(1, (call.input.shape[1], -1))
    return grad.unflatten(1, (call.groups, -1)).transpose(0, 1)


def _grad_columns(call: _Call, grad: Tensor, columns: Tensor) -> None:
    """Write the gradients of a tile's columns."""
    if not call.depthwise:
        torch.bmm(_by_group(call, grad), call.weights, out=columns)
        return
    by_channel = _by_group(call, grad)
    columns.copy_(sum(by_channel[:, None, :, i] * taps for i, taps in enumerate(call.weights.float())))


def _grad_weights(call: _Call, grad: Tensor, columns: Tensor) -> Tensor:
    """A tile's part of the gradient to `call.weights`, in float32."""
    by_group = _by_group(call, grad)
    if not call.depthwise:
        return torch.bmm(by_group.transpose(1, 2), columns).float()
    wide = columns.float()
    return torch.stack([(wide * by_group[:, None, :, i]).sum(0) for i in range(by_group.shape[2])])


def _as_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `call.weights` in the order of the weight."""
    taps = weight.shape[2] * weight.shape[3]
    if weight.shape[1] == 1:
        return gradient.permute(2, 0, 1).reshape(weight.shape)
    return gradient.unflatten(2, (taps, -1)).transpose(2, 3).reshape(weight.shape)

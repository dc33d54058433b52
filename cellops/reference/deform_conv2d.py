"""Deformable convolution v1/v2 (Dai et al. 2017, Zhu et al. 2019) in eager PyTorch, sampling as torchvision does.

    output[n, o, p] = bias[o] + sum over c, k of  weight[o, c, k] * mask[n, g, k, p] * sample(input[n, c], y, x)
    y[n, g, k, p] = oy * stride - padding + i * dilation + dy[n, g, k, p]         x likewise, g = offset group of c

with p = (oy, ox) an output pixel and k = (i, j) a tap. `sample` is bilinear. A point with y < -1, y >= H, x < -1 or
x >= W, so also an infinite or huge one, samples 0; a corner outside the image counts as 0. Derivatives to y and x are
right derivatives (floor convention), at the borders too. A NaN coordinate makes the sample NaN and gives no gradient to
input and offset.

Shapes: N batch, C in_channels, O out_channels, G groups, D offset groups, K taps, P output pixels.
Forward and backward are made of differentiable PyTorch ops: higher orders, forward mode, vmap and tracing work through
them. Coordinates and samples are float32 for half types; columns are rounded to the storage type before the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class _Corner(NamedTuple):
    valid: Tensor  # [N, D, K, P] the point is inside and this corner lies in the image
    pixel: Tensor  # [N, D, K, P] flat index, 0 where not valid
    weight: Tensor  # [N, D, K, P] wy * wx
    weight_dy: Tensor  # derivative of the weight to y
    weight_dx: Tensor


class _Points(NamedTuple):
    corners: list[_Corner]
    inside: Tensor  # [N, D, K, P]
    nan: Tensor  # [N, D, K, P]


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _points(
    offset: Tensor,
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> _Points:
    """Corners, weights and weight derivatives of every sampled point."""
    height, width = image
    batch, offset_channels, out_height, out_width = offset.shape
    taps, pixels = kernel[0] * kernel[1], out_height * out_width
    groups = offset_channels // (2 * taps)
    shift = offset.to(dtype).reshape(batch, groups, taps, 2, pixels)

    def positions(axis: int, size: int) -> tuple[Tensor, Tensor]:
        start = torch.arange(size, device=offset.device) * stride[axis] - padding[axis]
        tap = torch.arange(kernel[axis], device=offset.device) * dilation[axis]
        return start, tap

    (start_y, tap_y), (start_x, tap_x) = positions(0, out_height), positions(1, out_width)
    grid = (kernel[0], kernel[1], out_height, out_width)
    base_y = (tap_y[:, None, None, None] + start_y[:, None]).expand(grid).reshape(taps, pixels)
    base_x = (tap_x[:, None, None] + start_x).expand(grid).reshape(taps, pixels)
    y, x = base_y.to(dtype) + shift[:, :, :, 0], base_x.to(dtype) + shift[:, :, :, 1]

    inside = (y >= -1) & (y < height) & (x >= -1) & (x < width)
    nan = y.isnan() | x.isnan()
    y, x = torch.where(inside, y, 0.0), torch.where(inside, x, 0.0)
    top, left = y.detach().floor(), x.detach().floor()
    fraction_y, fraction_x = y - top, x - left
    top, left = top.long(), left.long()

    corners = []
    for row, weight_y, sign_y in ((top, 1 - fraction_y, -1), (top + 1, fraction_y, 1)):
        for column, weight_x, sign_x in ((left, 1 - fraction_x, -1), (left + 1, fraction_x, 1)):
            valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(valid, row * width + column, 0)
            corners.append(_Corner(valid, index, weight_y * weight_x, sign_y * weight_x, sign_x * weight_y))
    return _Points(corners, inside, nan)


def _gather(planes: Tensor, corner: _Corner) -> Tensor:
    """Pixel of every channel at a corner, exactly 0 outside the image: [N, D, C/D, H*W] -> [N, D, C/D, K, P]."""
    batch, groups, channels, _ = planes.shape
    taps, pixels = corner.pixel.shape[-2:]
    index = corner.pixel.reshape(batch, groups, 1, taps * pixels).expand(-1, -1, channels, -1)
    values = planes.gather(-1, index).reshape(batch, groups, channels, taps, pixels)
    return torch.where(corner.valid.unsqueeze(2), values, 0.0)


def _sample(planes: Tensor, points: _Points) -> Tensor:
    """Bilinear samples [N, D, C/D, K, P]."""
    first, *others = points.corners
    sampled = _gather(planes, first) * first.weight.unsqueeze(2)
    for corner in others:
        sampled = sampled + _gather(planes, corner) * corner.weight.unsqueeze(2)
    return torch.where(points.nan.unsqueeze(2), float("nan"), sampled)


class _Sizes(NamedTuple):
    planes: tuple[int, int, int, int]  # [N, D, C/D, H*W]
    columns: tuple[int, int, int, int]  # [N, G, C/G*K, P]
    samples: tuple[int, int, int, int, int]  # [N, D, C/D, K, P]
    points: tuple[int, int, int, int]  # [N, D, K, P]
    weight: tuple[int, int, int]  # [G, O/G, C/G*K]


def _sizes(input: Tensor, offset: Tensor, weight: Tensor) -> _Sizes:
    batch, channels, height, width = input.shape
    out_channels, group_channels, kernel_height, kernel_width = weight.shape
    taps, pixels = kernel_height * kernel_width, offset.shape[2] * offset.shape[3]
    groups, offset_groups = channels // group_channels, offset.shape[1] // (2 * taps)
    offset_channels = channels // offset_groups
    return _Sizes(
        planes=(batch, offset_groups, offset_channels, height * width),
        columns=(batch, groups, group_channels * taps, pixels),
        samples=(batch, offset_groups, offset_channels, taps, pixels),
        points=(batch, offset_groups, taps, pixels),
        weight=(groups, out_channels // groups, group_channels * taps),
    )


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution; the arguments must be valid (`cellops.deform_conv2d` checks them).

    Args:
        input: [N, C, H, W].
        offset: [N, D*K*2, OH, OW] in pixels, offset-group-major, taps row-major, (dy, dx) per tap.
        weight: [O, C/G, KH, KW].
        bias: [O], or None.
        stride, padding, dilation: (vertical, horizontal).
        mask: [N, D*K, OH, OW], or None for ones.

    Returns:
        [N, O, OH, OW], contiguous.
    """
    sizes = _sizes(input, offset, weight)
    dtype = _compute_dtype(input.dtype)
    points = _points(offset, input.shape[2:], weight.shape[2:], stride, padding, dilation, dtype)
    sampled = _sample(input.to(dtype).reshape(sizes.planes), points)
    if mask is not None:
        sampled = sampled * mask.to(dtype).reshape(sizes.points).unsqueeze(2)
    columns = sampled.to(input.dtype).reshape(sizes.columns)
    output = (weight.reshape(sizes.weight) @ columns).reshape(input.shape[0], weight.shape[0], *offset.shape[2:])
    return output if bias is None else output + bias.reshape(-1, 1, 1)


def deform_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Tensor | None,
    wanted: Sequence[bool] = (True, True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to (input, offset, weight, bias, mask), each only where `wanted`, None elsewhere.

    Args:
        grad_output: [N, O, OH, OW]; the other arguments as in `deform_conv2d`.
        wanted: one flag per gradient, in the order of the result.
    """
    want_input, want_offset, want_weight, want_bias, want_mask = wanted
    want_mask = want_mask and mask is not None
    sizes = _sizes(input, offset, weight)
    dtype = _compute_dtype(input.dtype)
    planes = input.to(dtype).reshape(sizes.planes)
    points = _points(offset, input.shape[2:], weight.shape[2:], stride, padding, dilation, dtype)
    modulation = None if mask is None else mask.to(dtype).reshape(sizes.points).unsqueeze(2)
    grad_rows = grad_output.reshape(sizes.columns[0], *sizes.weight[:2], sizes.columns[3])
    sampled = _sample(planes, points) if want_weight or want_mask else None
    grad_input = grad_offset = grad_weight = grad_bias = grad_mask = None

    if want_bias:
        grad_bias = grad_output.sum((0, 2, 3), dtype=dtype).to(grad_output.dtype)
    if want_weight:
        columns = (sampled if modulation is None else sampled * modulation).to(input.dtype).reshape(sizes.columns)
        rows, columns = grad_rows.permute(1, 2, 0, 3).flatten(2), columns.permute(1, 0, 3, 2).flatten(1, 2)
        grad_weight = (rows @ columns).reshape(weight.shape)
    if not (want_input or want_offset or want_mask):
        return grad_input, grad_offset, grad_weight, grad_bias, grad_mask

    grad_sampled = (weight.reshape(sizes.weight).transpose(1, 2) @ grad_rows).to(dtype).reshape(sizes.samples)
    if want_mask:
        grad_mask = torch.where(points.inside | points.nan, (grad_sampled * sampled).sum(2), 0.0)
        grad_mask = grad_mask.to(mask.dtype).reshape(mask.shape)
    if modulation is not None:
        grad_sampled = grad_sampled * modulation
    if want_offset:
        grad_y = grad_x = grad_sampled.new_zeros(())
        for corner in points.corners:
            products = (grad_sampled * _gather(planes, corner)).sum(2)
            grad_y, grad_x = grad_y + products * corner.weight_dy, grad_x + products * corner.weight_dx
        grad_offset = torch.where(points.inside.unsqueeze(3), torch.stack((grad_y, grad_x), 3), 0.0)
        grad_offset = grad_offset.to(offset.dtype).reshape(offset.shape)
    if want_input:
        grad_planes = torch.zeros_like(planes)
        for corner in points.corners:
            values = torch.where(corner.valid.unsqueeze(2), grad_sampled * corner.weight.unsqueeze(2), 0.0).flatten(3)
            index = corner.pixel.flatten(2).unsqueeze(2).expand_as(values)
            grad_planes = grad_planes.scatter_add(-1, index, values)
        grad_input = grad_planes.to(input.dtype).reshape(input.shape)
    return grad_input, grad_offset, grad_weight, grad_bias, grad_mask

"""Every channel sampled at its own offsets (the layer of HQNet) in eager PyTorch.

    output[n, c, h, w] = bilinear sample of input[n, c] at (h + dy, w + dx), coordinates clamped to the image

Values and first derivatives are those of `grid_sample(mode="bilinear", padding_mode="border", align_corners=True)` on
the matching grid: a coordinate has its right derivative inside the image, at whole numbers too, and none where it is
clamped or exactly at a bound. A NaN coordinate makes the sample NaN and gives no gradient to input and offset.

Forward and backward are made of differentiable PyTorch ops: higher orders, forward mode, vmap and tracing work through
them. Coordinates and samples are float32 for half types.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("planar", "interleaved")


class _Corner(NamedTuple):
    value: Tensor  # [N, C, P], exactly 0 outside the image
    pixel: Tensor  # [N, C, P] flat index, 0 where not valid
    valid: Tensor  # [N, C, P] lies in the image
    weight: Tensor  # [N, C, P] wy * wx
    weight_dy: Tensor  # derivative of the weight to y
    weight_dx: Tensor


class _Points(NamedTuple):
    corners: list[_Corner]
    known: Tensor  # [N, C, P] neither coordinate is NaN
    free_y: Tensor  # [N, C, P] y has a derivative
    free_x: Tensor


def _points(input: Tensor, offset: Tensor, layout: str) -> _Points:
    """Corners, weights and weight derivatives of every point; P = H * W pixels."""
    batch, channels, height, width = input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if layout == "planar":
        dy, dx = offset.to(dtype).reshape(batch, channels, 2, height, width).unbind(2)
    else:
        dy, dx = offset.to(dtype).reshape(batch, channels, height, width, 2).unbind(4)
    y = torch.arange(height, device=offset.device, dtype=dtype).unsqueeze(1) + dy
    x = torch.arange(width, device=offset.device, dtype=dtype) + dx
    known = ~(y.isnan() | x.isnan())

    def clamped(coordinate: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        free = (coordinate > 0) & (coordinate < size - 1) & known
        coordinate = torch.where(free, coordinate, coordinate.detach().clamp(0, size - 1))
        coordinate = torch.where(known, coordinate, 0.0)
        first = coordinate.detach().floor()
        return free.flatten(2), first.long().flatten(2), (coordinate - first).flatten(2)

    free_y, top, bottom = clamped(y, height)
    free_x, left, right = clamped(x, width)
    planes, corners = input.to(dtype).flatten(2), []
    for row, weight_y, sign_y in ((top, 1 - bottom, -1), (top + 1, bottom, 1)):
        for column, weight_x, sign_x in ((left, 1 - right, -1), (left + 1, right, 1)):
            valid = (row < height) & (column < width)
            pixel = torch.where(valid, row * width + column, 0)
            value = torch.where(valid, planes.gather(-1, pixel), 0.0)
            corners.append(_Corner(value, pixel, valid, weight_y * weight_x, sign_y * weight_x, sign_x * weight_y))
    return _Points(corners, known.flatten(2), free_y, free_x)


def offset_sample2d(input: Tensor, offset: Tensor, layout: str = "planar") -> Tensor:
    """Sample; the arguments must be valid (`cellops.offset_sample2d` checks them).

    Args:
        input: [N, C, H, W].
        offset: [N, 2C, H, W] in pixels.
        layout: "planar": channels 2c and 2c + 1 are dy and dx of channel c. "interleaved": the tensor, contiguous in
            NCHW order, is seen as [N, C, H, W, 2].
    """
    points = _points(input, offset, layout)
    first, *others = points.corners
    output = first.value * first.weight
    for corner in others:
        output = output + corner.value * corner.weight
    return torch.where(points.known, output, float("nan")).to(input.dtype).reshape(input.shape)


def offset_sample2d_backward(
    grad_output: Tensor, input: Tensor, offset: Tensor, layout: str = "planar"
) -> tuple[Tensor, Tensor]:
    """Gradients to input and offset; arguments as in `offset_sample2d`, grad_output [N, C, H, W]."""
    points = _points(input, offset, layout)
    grad = torch.where(points.known, grad_output.to(points.corners[0].weight.dtype).flatten(2), 0.0)
    grad_planes = grad_y = grad_x = torch.zeros_like(grad)
    for corner in points.corners:
        products = grad * corner.value
        grad_y, grad_x = grad_y + products * corner.weight_dy, grad_x + products * corner.weight_dx
        grad_planes = grad_planes.scatter_add(-1, corner.pixel, torch.where(corner.valid, grad * corner.weight, 0.0))
    pair = (torch.where(points.free_y, grad_y, 0.0), torch.where(points.free_x, grad_x, 0.0))
    grad_offset = torch.stack(pair, 2 if layout == "planar" else 3)
    return grad_planes.to(input.dtype).reshape(input.shape), grad_offset.to(offset.dtype).reshape(offset.shape)

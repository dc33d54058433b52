"""The ops of cellops in operators of the ONNX standard: PyTorch's own ops where they have them, and DeformConv.

For evaluation: what `torch.onnx` is given has no gradients and no batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
}


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is not None:
        x = x * scale.to(x.dtype)[:, None, None]
    return x if shift is None else x + shift.to(x.dtype)[:, None, None]


def eca(input: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """A convolution over the means of the channels."""
    mean = input.mean((2, 3)).unsqueeze(1)
    gate = F.conv1d(mean, weight, padding=weight.shape[-1] // 2).sigmoid()
    return input * gate.transpose(1, 2).unsqueeze(-1)


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
    backend: str | None = None,
) -> Tensor:
    """Two 1x1 convolutions of the means of the channels."""
    hidden = ACTIVATIONS[act](F.conv2d(input.mean((2, 3), keepdim=True), weight1, bias1))
    return input * ACTIVATIONS[gate](F.conv2d(hidden, weight2, bias2))


def frelu(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The larger of a value and a depthwise convolution around it."""
    return torch.maximum(input, _depthwise(input, weight, scale, shift))


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    backend: str | None = None,
) -> Tensor:
    """A depthwise convolution and an activation."""
    return ACTIVATIONS[activation](_depthwise(input, weight, scale, shift))


def _depthwise(input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    bias = shift if scale is None and shift is not None and shift.dtype == weight.dtype else None
    convolved = F.conv2d(input, weight, bias, padding=weight.shape[-1] // 2, groups=input.shape[1])
    return convolved if bias is not None else _affine(convolved, scale, shift)


def group_conv1x1(
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    activation: str,
    shuffle: bool,
    backend: str | None = None,
) -> Tensor:
    """A grouped convolution, an activation, and the channels of the groups taken in turns."""
    bias = shift if scale is None and shift is not None and shift.dtype == weight.dtype else None
    output = F.conv2d(input, weight, bias, groups=groups)
    output = ACTIVATIONS[activation](output if bias is not None else _affine(output, scale, shift))
    if not shuffle:
        return output
    return output.unflatten(1, (groups, output.shape[1] // groups)).transpose(1, 2).flatten(1, 2)


def spatial_attention(
    input: Tensor, weight: Tensor, bias: Tensor | None, mode: str, backend: str | None = None
) -> Tensor:
    """The sigmoid of a convolution of the channels, or of their maximum and mean."""
    seen = input
    if mode == "pool":
        seen = torch.cat([input.amax(1, keepdim=True), input.mean(1, keepdim=True)], dim=1)
    return input * F.conv2d(seen, weight, bias, padding=weight.shape[-1] // 2).sigmoid()


def offset_sample2d(input: Tensor, offset: Tensor, layout: str, backend: str | None = None) -> Tensor:
    """GridSample over images of one channel."""
    height, width = input.shape[2:]
    planes = input.reshape(-1, 1, height, width)
    if layout == "planar":
        dy, dx = offset.reshape(-1, 2, height, width).unbind(1)
    else:
        dy, dx = offset.reshape(-1, height, width, 2).unbind(3)
    rows, columns = (torch.arange(size, device=input.device, dtype=offset.dtype) for size in (height, width))
    y = (dy + rows[:, None]) * (2 / max(height - 1, 1)) - 1
    x = (dx + columns) * (2 / max(width - 1, 1)) - 1
    grid = torch.stack([x, y], dim=-1).to(input.dtype)
    return F.grid_sample(planes, grid, padding_mode="border", align_corners=True).reshape(input.shape)


def decompositions() -> dict[Any, Callable]:
    """For `ExportedProgram.run_decompositions`: every op but `deform_conv2d`, which ONNX has."""
    rules = (eca, squeeze_excite, frelu, depthwise_conv2d, group_conv1x1, spatial_attention, offset_sample2d)
    return {getattr(torch.ops.cellops, rule.__name__).default: rule for rule in rules}


def translations() -> dict[Any, Callable]:
    """For `torch.onnx.export(custom_translation_table=...)`: deformable convolutions."""
    from onnxscript import opset20

    def node(input: Any, offset: Any, weight: Any, bias: Any, mask: Any, *sizes: int) -> Any:
        kernel, (*stride, pad_y, pad_x, dilation_y, dilation_x) = [int(size) for size in weight.shape[2:]], sizes
        return opset20.DeformConv(
            input,
            weight,
            offset,
            bias,
            mask,
            kernel_shape=kernel,
            strides=stride,
            pads=[pad_y, pad_x, pad_y, pad_x],
            dilations=[dilation_y, dilation_x],
            group=int(input.shape[1]) // int(weight.shape[1]),
            offset_group=int(offset.shape[1]) // (2 * kernel[0] * kernel[1]),
        )

    def cellops(
        input: Any,
        offset: Any,
        weight: Any,
        bias: Any = None,
        mask: Any = None,
        stride_height: int = 1,
        stride_width: int = 1,
        pad_height: int = 0,
        pad_width: int = 0,
        dilation_height: int = 1,
        dilation_width: int = 1,
        backend: str | None = None,
    ) -> Any:
        sizes = (stride_height, stride_width, pad_height, pad_width, dilation_height, dilation_width)
        return node(input, offset, weight, bias, mask, *sizes)

    return {torch.ops.cellops.deform_conv2d.default: cellops}

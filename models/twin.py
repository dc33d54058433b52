"""The plain twin of a network: the same parameters under the same names, computed by PyTorch's own ops.

Every module of cellops in it becomes what a user would write without the library, so one network serves as its own
yardstick in tests and benchmarks. Needs torchvision for deformable convolutions.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cellops

Network = TypeVar("Network", bound=nn.Module)


class _DeformConv2d(cellops.DeformConv2d):
    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        from torchvision.ops import deform_conv2d

        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


class _DeformConv2dPack(cellops.DeformConv2dPack):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        predicted = self.conv_offset(input)
        if not self.modulated:
            return _DeformConv2d.forward(self, input, predicted)
        offset, mask = predicted.split((self.offset_channels, self.offset_channels // 2), dim=1)
        return _DeformConv2d.forward(self, input, offset, mask.sigmoid())


class _ConvOffset2d(cellops.ConvOffset2d):
    def forward(self, input: Tensor) -> Tensor:
        batch, channels, height, width = input.shape
        offset, planes = self.conv(input), input.reshape(batch * channels, 1, height, width)
        if offset.element_size() == 2:  # too few digits for coordinates
            offset = offset.float()
        if self.layout == "planar":
            offset = offset.reshape(batch * channels, 2, height, width).permute(0, 2, 3, 1)
        else:
            offset = offset.contiguous().reshape(batch * channels, height, width, 2)
        rows, columns = (torch.arange(size, device=input.device, dtype=offset.dtype) for size in (height, width))
        here = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        last = torch.tensor([max(height - 1, 1), max(width - 1, 1)], device=input.device)
        grid = (2 * (here + offset) / last - 1).flip(-1)
        sampled = F.grid_sample(planes.to(grid.dtype), grid, padding_mode="border", align_corners=True)
        return sampled.to(input.dtype).reshape(input.shape)


class _FReLU(cellops.FReLU):
    def forward(self, input: Tensor) -> Tensor:
        convolved = self.conv_frelu(input)
        return torch.maximum(input, convolved if self.bn_frelu is None else self.bn_frelu(convolved))


class _DepthwiseConv2d(cellops.DepthwiseConv2d):
    def forward(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        return _ACTIVATIONS[self.activation](output if self.bn is None else self.bn(output))


_ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hard_sigmoid": F.hardsigmoid}
_ACTIVATIONS |= {"gelu": F.gelu, "hardswish": F.hardswish, "sigmoid": torch.sigmoid}


class _SqueezeExcite(cellops.SqueezeExcite):
    def forward(self, input: Tensor) -> Tensor:
        hidden = _ACTIVATIONS[self.act](self.fc1(input.mean((2, 3), keepdim=True)))
        return input * _ACTIVATIONS[self.gate](self.fc2(hidden))


class _EfficientChannelAttention(cellops.EfficientChannelAttention):
    def forward(self, input: Tensor) -> Tensor:
        gate = self.conv(input.mean((2, 3)).unsqueeze(1)).sigmoid()
        return input * gate.reshape(input.shape[0], -1, 1, 1)


class _SpatialAttention(cellops.SpatialAttention):
    def forward(self, input: Tensor) -> Tensor:
        seen = input
        if self.mode == "pool":
            seen = torch.cat([input.amax(1, keepdim=True), input.mean(1, keepdim=True)], dim=1)
        return input * self.conv(seen).sigmoid()


class _GroupConv1x1(cellops.GroupConv1x1):
    def forward(self, input: Tensor) -> Tensor:
        output = self.conv(input)
        if self.bn is not None:
            output = self.bn(output)
        output = _ACTIVATIONS[self.activation](output)
        return F.channel_shuffle(output, self.groups) if self.shuffle else output


PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    plain.__mro__[1]: plain
    for plain in (
        _DeformConv2d,
        _DeformConv2dPack,
        _ConvOffset2d,
        _FReLU,
        _DepthwiseConv2d,
        _SqueezeExcite,
        _EfficientChannelAttention,
        _SpatialAttention,
        _GroupConv1x1,
    )
}
"""Each module of cellops and its plain form."""


def plain_twin(network: Network) -> Network:
    """A copy of the network, weights and buffers included, in which no op of cellops runs."""
    twin = copy.deepcopy(network)
    for module in twin.modules():
        if type(module) in PLAIN:
            module.__class__ = PLAIN[type(module)]
    return twin

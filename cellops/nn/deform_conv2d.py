"""The modules of `deform_conv2d`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from cellops.ops._registration import integer
from cellops.ops.deform_conv2d import deform_conv2d, pair


class DeformConv2d(nn.Module):
    """Deformable convolution with a learned weight; stands in for `torchvision.ops.DeformConv2d`.

    Arguments, initialisation and `state_dict` (`weight`, `bias`) are torchvision's.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size, stride, padding, dilation: an integer or (vertical, horizontal), in pixels.
        groups: G, a divisor of C and O.
        bias: whether to add a learned bias.

    Raises:
        ValueError: `groups` does not divide both channel counts, a size is neither an integer nor a pair, or too small,
            or a number of channels or groups is no integer.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        in_channels, out_channels = integer("in_channels", in_channels), integer("out_channels", out_channels)
        groups = integer("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels < 1 or channels % groups:
                raise ValueError(f"{name} must be a multiple of groups = {groups}, got {channels}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = pair("kernel_size", kernel_size)
        self.stride = pair("stride", stride)
        self.padding = pair("padding", padding)
        self.dilation = pair("dilation", dilation)
        for name in ("kernel_size", "stride", "dilation"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Conv2d` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve `input` at shifted points.

        Args:
            input: [N, C, H, W].
            offset: [N, D*KH*KW*2, OH, OW] in pixels, (dy, dx) per tap, taps row-major, D offset groups.
            mask: [N, D*KH*KW, OH, OW], or None.

        Returns:
            [N, O, OH, OW]. Errors are those of `cellops.deform_conv2d`.
        """
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        return text


class DeformConv2dPack(DeformConv2d):
    """Deformable convolution that predicts its own offsets, and masks if `modulated`; stands in for mmcv's packs.

    The child `conv_offset`, a convolution of the same geometry, starts at zero: the layer starts as a dense convolution
    (with `modulated`, of half the weight). The first two thirds of its channels are the offset, the sigmoid of the last
    third is the mask. Weights of mmcv's `DeformConv2dPack` load with `modulated=False, bias=False`, those of its
    `ModulatedDeformConv2dPack` with the defaults; the older keys `<name>_offset.*` beside `<name>.weight` load too.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as for `DeformConv2d`.
        offset_groups: D, the number of groups of channels that have offsets (and masks) of their own; a divisor of C.
        modulated: whether to predict masks (v2).

    Raises:
        ValueError: `groups` or `offset_groups` does not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        offset_groups: int = 1,
        bias: bool = True,
        modulated: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        offset_groups = integer("offset_groups", offset_groups)
        if offset_groups < 1 or in_channels % offset_groups:
            raise ValueError(f"in_channels must be a multiple of offset_groups = {offset_groups}, got {in_channels}")
        self.offset_groups = offset_groups
        self.modulated = modulated
        self.offset_channels = 2 * offset_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset = nn.Conv2d(
            in_channels,
            self.offset_channels // 2 * (3 if modulated else 2),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        self._reset_offset()
        _rename_old_keys_in_parents()

    def reset_parameters(self) -> None:
        """Draw weight and bias as `nn.Conv2d` does, and set those of `conv_offset` to zero."""
        super().reset_parameters()
        if "conv_offset" in self._modules:  # not yet where the parent constructs
            self._reset_offset()

    def _reset_offset(self) -> None:
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """[N, C, H, W] -> [N, O, OH, OW]."""
        predicted = self.conv_offset(input)
        if not self.modulated:
            return super().forward(input, predicted)
        offset, mask = predicted.split((self.offset_channels, self.offset_channels // 2), dim=1)
        return super().forward(input, offset, mask.sigmoid())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}, modulated={self.modulated}"


_old_keys_hook: Any = None


def _rename_old_keys_in_parents() -> None:
    """Hook the loading of modules that will hold a pack.

    Old keys lie beside the pack's own, and `load_state_dict` shows a module only keys below its own name.
    """
    global _old_keys_hook
    if _old_keys_hook is None:
        _old_keys_hook = register_module_module_registration_hook(_hook_parent)


def _hook_parent(*arguments: Any) -> None:
    """Take parent, name and child, as one: Dynamo may compile this hook, and looks at each module that has a name.

    Compiled autograd registers a module in a parent that is not complete yet.
    """
    if isinstance(arguments[2], DeformConv2dPack):
        load_old_keys(arguments[0])


def load_old_keys(parent: nn.Module) -> None:
    """Let a module that holds packs load their old keys; those that are constructed see to it themselves."""
    parent.register_load_state_dict_pre_hook(_rename_old_keys)


def _rename_old_keys(parent: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, child in parent.named_children():
        if not isinstance(child, DeformConv2dPack):
            continue
        if f"{name}_offset" in parent._modules:  # a layer of that name has these keys itself
            continue
        for parameter in ("weight", "bias"):
            old, new = f"{prefix}{name}_offset.{parameter}", f"{prefix}{name}.conv_offset.{parameter}"
            if old in state_dict and new not in state_dict:
                state_dict[new] = state_dict.pop(old)

"""The module of `spatial_attention`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellops.nn import _children, _compiled
from cellops.ops._registration import integer
from cellops.ops.spatial_attention import spatial_attention
from cellops.reference.spatial_attention import MODES


class SpatialAttention(nn.Module):
    """Spatial attention: `sigmoid(conv(x)) * x` with one map for all channels, or CBAM's (Woo et al. 2018).

    The child `conv` has a bias in both modes. Where a network's convolution has none, set `conv.bias` to None; where a
    BatchNorm of one channel follows it, as in CBAM's own code, fold that into weight and bias. "pool" takes the
    maximum's weights first: weights of timm's `SpatialAttn` need `weight.flip(1)`. It is called where it is not what it
    was made as or has hooks.

    Args:
        channels: C; "conv" needs it, "pool" takes any number of channels.
        kernel_size: odd; None for 1 with "conv" and 7 with "pool".
        mode: what the convolution sees: "conv", the channels; "pool", their maximum and their mean.

    Raises:
        ValueError: `mode` is unknown, `kernel_size` is even or less than 1, `channels` is missing for "conv", or one of
            both is no integer.
    """

    def __init__(self, channels: int | None = None, kernel_size: int | None = None, mode: str = "conv") -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if kernel_size is None:
            kernel_size = 1 if mode == "conv" else 7
        kernel_size = integer("kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        if mode == "pool":
            channels = 2
        elif channels is None:
            raise ValueError("channels must be given for mode='conv', got None")
        channels = integer("channels", channels)
        self.mode = mode
        self.conv = nn.Conv2d(channels, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.spatial_attention`."""
        plain = _children.are_plain(self.conv) and _children.keeps_size(self.conv) and self.conv.groups == 1
        name = f"spatial_attention {self.mode}"
        if not plain or (_compiled.stands_back(name, input, self) and self._takes(input)):
            seen = input
            if self.mode == "pool":
                seen = torch.cat([input.amax(1, keepdim=True), input.mean(1, keepdim=True)], dim=1)
            return input * self.conv(seen).sigmoid()
        return spatial_attention(input, self.conv.weight, self.conv.bias, self.mode)

    def _takes(self, input: Tensor) -> bool:
        return self.mode == "pool" or input.shape[1] == self.conv.in_channels

    def extra_repr(self) -> str:
        return f"mode={self.mode!r}"

"""The module of `eca`."""

from __future__ import annotations

import math

from torch import Tensor, nn

from cellops.nn import _children, _compiled
from cellops.ops._registration import integer
from cellops.ops.eca import eca
from cellops.reference import eca as reference


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention (Wang et al. 2020); stands in for timm's `EcaModule`, whose `conv.weight` it holds.

    The child `conv` is called where it is not what it was made as or has hooks.

    Args:
        channels: C, from which the kernel size follows: `t = int(|log2(C) + 1| / 2)`, made odd, at least 3.
        kernel_size: an odd number of neighbouring channels, instead.

    Raises:
        ValueError: `kernel_size` is even or less than 1, or no integer; without it, `channels` is less than 1 or none.
    """

    def __init__(self, channels: int, kernel_size: int | None = None) -> None:
        super().__init__()
        if kernel_size is None:
            channels = integer("channels", channels)
            if channels < 1:
                raise ValueError(f"channels must be at least 1, got {channels}")
            size = int(abs(math.log2(channels) + 1) / 2)
            kernel_size = max(size if size % 2 else size + 1, 3)
        kernel_size = integer("kernel_size", kernel_size)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.eca`."""
        conv = self.conv
        if not (_children.are_plain(conv) and conv.bias is None and _children.keeps_size(conv)):
            return compose(input, conv)
        weight = conv.weight
        return reference.eca(input, weight) if _compiled.stands_back("eca", input, weight) else eca(input, weight)


def compose(input: Tensor, conv: nn.Module) -> Tensor:
    """What the op computes, by PyTorch's own ops and a call of the convolution, which takes [N, 1, C]."""
    return input * conv(input.mean((2, 3)).unsqueeze(1)).sigmoid().view(*input.shape[:2], 1, 1)

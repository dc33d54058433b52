"""Depthwise convolution beside the composition of PyTorch's modules, eager and compiled, in copies of its input.

pytest benchmarks/bench_depthwise_conv2d.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import torch
from torch import Tensor, nn

from cellops import DepthwiseConv2d, testing


class Composition(nn.Module):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size, 1, kernel_size // 2, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(input)))


@copies.rows("depthwise_conv2d")
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    sizes = case.sizes["channels"], case.sizes["kernel"]
    modules = {"cellops": lambda: DepthwiseConv2d(*sizes), "composition": lambda: Composition(*sizes)}
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

"""Grouped 1x1 convolution beside the composition of PyTorch's modules, eager and compiled, in copies of its input.

pytest benchmarks/bench_group_conv1x1.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import torch
from torch import Tensor, nn

from cellops import GroupConv1x1, testing

OP = "group_conv1x1"


class Composition(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(input)))


@copies.rows(OP)
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    sizes = [case.sizes[key] for key in ("in_channels", "out_channels", "groups")]
    modules = {"cellops": lambda: GroupConv1x1(*sizes), "composition": lambda: Composition(*sizes)}
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

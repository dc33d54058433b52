"""FReLU beside the composition of its authors, eager and compiled, in copies of its input.

pytest benchmarks/bench_frelu.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import torch
from torch import Tensor, nn

from cellops import FReLU, testing

OP = "frelu"


class Composition(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_frelu = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.bn_frelu = nn.BatchNorm2d(channels)

    def forward(self, input: Tensor) -> Tensor:
        return torch.maximum(input, self.bn_frelu(self.conv_frelu(input)))


@copies.rows(OP)
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    channels = case.sizes["channels"]
    modules = {"cellops": lambda: FReLU(channels), "composition": lambda: Composition(channels)}
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

"""FReLU beside the composition of its authors, eager and compiled, in copies of its input.

pytest benchmarks/bench_frelu.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import pytest
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


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", list(copies.FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", testing.cases(OP, "bench"), ids=lambda case: case.name)
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    channels = case.sizes["channels"]
    modules = {"cellops": lambda: FReLU(channels), "composition": lambda: Composition(channels)}
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

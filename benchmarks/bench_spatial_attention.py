"""spatial_attention beside the plain composition, eager and compiled, in copies of its input; "pool" is CBAM's module.

pytest benchmarks/bench_spatial_attention.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import torch
from torch import Tensor, nn

from cellops import SpatialAttention, testing

OP = "spatial_attention"


class Composition(nn.Module):
    """The module of ops that PyTorch has. timm's `SpatialAttn` is the same with mean and maximum swapped."""

    def __init__(self, channels: int, kernel: int, mode: str) -> None:
        super().__init__()
        self.pool = mode == "pool"
        self.conv = nn.Conv2d(2 if self.pool else channels, 1, kernel, padding=kernel // 2)

    def forward(self, input: Tensor) -> Tensor:
        source = input
        if self.pool:
            source = torch.cat((input.amax(dim=1, keepdim=True), input.mean(dim=1, keepdim=True)), dim=1)
        return input * self.conv(source).sigmoid()


@copies.rows(OP)
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    channels, kernel, mode = (case.sizes[key] for key in ("channels", "kernel", "mode"))
    modules = {
        "cellops": lambda: SpatialAttention(channels, kernel, mode),
        "eager": lambda: Composition(channels, kernel, mode),
    }
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

"""squeeze_excite beside timm's module, eager and compiled, in copies of its input.

pytest benchmarks/bench_squeeze_excite.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import pytest
import torch

from cellops import SqueezeExcite, testing

OP = "squeeze_excite"


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", list(copies.FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", testing.cases(OP, "bench"), ids=lambda case: case.name)
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    timm = pytest.importorskip("timm.layers", reason="timm is not installed")
    channels = case.sizes["channels"]
    hidden = case.sizes["hidden"]
    modules = {
        "cellops": lambda: SqueezeExcite(channels, rd_channels=hidden),
        "timm": lambda: timm.SEModule(channels, rd_channels=hidden),
    }
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

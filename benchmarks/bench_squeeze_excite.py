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


@copies.rows(OP)
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

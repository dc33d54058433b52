"""eca beside timm's module, eager and compiled, in copies of its input.

pytest benchmarks/bench_eca.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import copies
import pytest
import torch

from cellops import EfficientChannelAttention, testing

OP = "eca"


@copies.rows(OP)
def test_copies(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    timm = pytest.importorskip("timm.layers", reason="timm is not installed")
    channels = case.sizes["channels"]
    modules = {
        "cellops": lambda: EfficientChannelAttention(channels),
        "timm": lambda: timm.EcaModule(channels),
    }
    copies.compare(case, modules, dtype, layout, direction, benchmark, record)

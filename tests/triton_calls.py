"""What the tests of Triton's launchers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cellops import _backend

TRITON_OPS = [op for op, backends in _backend.OPS.items() if "triton" in backends]


def in_format(arguments: dict[str, Any], memory_format: torch.memory_format) -> dict[str, Any]:
    """A call's arguments with every image in that format."""
    return {
        name: value.contiguous(memory_format=memory_format) if isinstance(value, Tensor) and value.dim() == 4 else value
        for name, value in arguments.items()
    }

"""Activations by name and their slopes, which at the kinks are PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _relu6(x: Tensor) -> Tensor:
    """`F.relu6`, whose slope at NaN depends on where in the tensor it stands; here it is 1."""
    return torch.where(x <= 0, 0.0, torch.where(x >= 6, 6.0, x)).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": _relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def _slope_of_gelu(x: Tensor) -> Tensor:
    probability = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
    return probability + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _slope_of_silu(x: Tensor) -> Tensor:
    sigmoid = x.sigmoid()
    return sigmoid * (1 + x * (1 - sigmoid))


def _slope_of_hardswish(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)).to(x.dtype)


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": torch.ones_like,
    "relu": lambda x: (x <= 0).logical_not().to(x.dtype),
    "relu6": lambda x: ((x <= 0) | (x >= 6)).logical_not().to(x.dtype),
    "gelu": _slope_of_gelu,
    "silu": _slope_of_silu,
    "hardswish": _slope_of_hardswish,
}

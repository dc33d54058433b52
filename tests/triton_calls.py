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


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def arguments_of(op: str, input: Tensor) -> dict[str, Any]:
    """A call with 3x3 kernels, four input channels in each group, and one output channel of each where that is free."""
    batch, channels, height, width = input.shape
    outputs = empty(channels // 4, 4, 3, 3)
    if op == "deform_conv2d":
        pairs = dict.fromkeys(("stride", "padding", "dilation"), (1, 1))
        more = {"offset": empty(batch, 18, height, width), "mask": empty(batch, 9, height, width)}
        return {"input": input, "weight": outputs, "bias": empty(channels // 4), **more, **pairs}
    if op == "offset_sample2d":
        return {"input": input, "offset": empty(batch, 2 * channels, height, width), "layout": "planar"}
    if op == "squeeze_excite":
        weights = {"weight1": empty(2, channels, 1, 1), "weight2": empty(channels, 2, 1, 1)}
        return {"input": input, **weights, "bias1": None, "bias2": None, "act": "relu", "gate": "sigmoid"}
    if op == "eca":
        return {"input": input, "weight": empty(1, 1, 3)}
    if op == "spatial_attention":
        return {"input": input, "weight": empty(1, channels, 3, 3), "bias": None, "mode": "conv"}
    if op.startswith("frelu"):
        more = {"weight": empty(channels, 1, 3, 3)}
    elif op.startswith("depthwise_conv2d"):
        more = {"weight": empty(channels, 1, 3, 3), "activation": "silu"}
    else:
        more = {"weight": empty(channels, 4, 1, 1), "groups": channels // 4, "activation": "relu", "shuffle": True}
    if op.endswith("batch_norm"):
        return {"input": input, **more, "gamma": None, "beta": None, "eps": 1e-5}
    return {"input": input, **more, "scale": None, "shift": None}

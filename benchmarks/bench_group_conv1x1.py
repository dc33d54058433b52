"""Grouped 1x1 convolution beside the composition of PyTorch's modules: in copies of its input, and of networks' sizes.

pytest benchmarks/bench_group_conv1x1.py --benchmark-only

The first size moves more memory than it computes. The layers of networks have deep groups, in which oneDNN's products
behind PyTorch's modules are at their best: there the op is timed by itself too, since the module calls PyTorch's where
it knows them to be faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import copies
import measure
import pytest
import torch
from torch import Tensor, nn

from cellops import GroupConv1x1, testing
from cellops.models.twin import plain_twin
from cellops.nn import group_conv1x1

OP, OURS, ALONE, PEER = "group_conv1x1", "cellops", "the op alone", "composition"
LAYERS = {  # batch, input and output channels, height and width, groups, shuffle
    "16x240x28x28 to 60, 3 groups, shuffled": (16, 240, 60, 28, 3, True),
    "16x60x28x28 to 240, 3 groups": (16, 60, 240, 28, 3, False),
    "16x480x14x14 to 480, 3 groups": (16, 480, 480, 14, 3, False),
    "8x256x28x28 to 256, 4 groups": (8, 256, 256, 28, 4, False),
    "8x1024x14x14 to 256, 1 group": (8, 1024, 256, 14, 1, False),
}


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


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", list(copies.FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.replace(", ", "-").replace(" ", "_"))
def test_layers(layer: str, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any) -> None:
    torch.manual_seed(0)
    batch, in_channels, out_channels, side, groups, shuffle = LAYERS[layer]
    backward = direction == "forward+backward"
    format = copies.FORMATS[layout]
    ours = GroupConv1x1(in_channels, out_channels, groups, shuffle=shuffle).to(dtype).train(backward)
    input = torch.randn(batch, in_channels, side, side).to(dtype).contiguous(memory_format=format)
    grad_output = torch.randn(batch, out_channels, side, side).to(dtype).contiguous(memory_format=format)
    calls = {
        name: copies.call_of(module, input, grad_output if backward else None)
        for name, module in ((OURS, ours), (PEER, plain_twin(ours)))
    }
    calls[ALONE] = _never_standing_back(copies.call_of(ours, input, grad_output if backward else None))
    found = calls[ALONE]()
    for name in (OURS, PEER):
        error = copies.largest_error(calls[name](), found)
        assert error < copies.LARGEST_ERROR[dtype], f"{name} differs from the op by {error:.1e} by its norm"
    record(
        kind="layer",
        op=OP,
        case=layer,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        direction=direction,
        variants=measure.compare(benchmark, OURS, calls, seconds=1.0),
    )


def _never_standing_back(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    def alone() -> tuple[Tensor, ...]:
        rule = group_conv1x1._plain_is_faster
        group_conv1x1._plain_is_faster = lambda *arguments: False
        try:
            return call()
        finally:
            group_conv1x1._plain_is_faster = rule

    return alone

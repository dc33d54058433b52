"""Each module inside a compiled block beside its plain twin compiled: an op of ours against Inductor's own code.

pytest benchmarks/bench_compile.py --benchmark-only
pytest benchmarks/bench_compile.py --benchmark-only --full

The block is a normalisation, the module, a sum with the block's input and a ReLU, as in a residual network:
elementwise neighbours that Inductor may fuse with the composition and not with an op. Modules stand back under
`torch.compile` where they are known to lose (`cellops/nn/_compiled.py`); there both sides are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from torch import Tensor, nn

import cellops
from cellops.models.twin import plain_twin

OURS, PEER = "cellops", "composition"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LARGEST_ERROR = 1e-3
"""The largest difference of a result from the composition's, by its norm."""

MODULES: dict[str, Callable[[int], nn.Module]] = {
    "frelu": cellops.FReLU,
    "squeeze_excite": cellops.SqueezeExcite,
    "eca": cellops.EfficientChannelAttention,
    "spatial_attention": lambda channels: cellops.SpatialAttention(mode="pool"),
    "group_conv1x1": lambda channels: cellops.GroupConv1x1(channels, channels, groups=4),
}
DEFAULT_SHAPE = (8, 128, 28, 28)
FULL_SHAPES = ((1, 64, 7, 7), (1, 64, 28, 28), (8, 32, 14, 14), (8, 256, 7, 7), (8, 64, 56, 56), (32, 128, 28, 28))


class Block(nn.Module):
    """What stands around the module."""

    def __init__(self, channels: int, module: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return torch.relu(self.module(self.norm(input)) + input)


def _rows() -> list[Any]:
    rows = []
    for shape in (DEFAULT_SHAPE, *FULL_SHAPES):
        for op in MODULES:
            for layout in FORMATS:
                for direction in ("forward", "forward+backward"):
                    short = (layout == "NCHW") == (direction == "forward") or op == "group_conv1x1"
                    marks = () if shape == DEFAULT_SHAPE and short else pytest.mark.full
                    name = "x".join(map(str, shape))
                    rows.append(
                        pytest.param(op, shape, layout, direction, marks=marks, id=f"{op}-{name}-{layout}-{direction}")
                    )
    return rows


@pytest.mark.parametrize(("op", "shape", "layout", "direction"), _rows())
def test_speed(op: str, shape: tuple[int, ...], layout: str, direction: str, benchmark: Any, record: Any) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    backward = direction == "forward+backward"
    ours = Block(shape[1], MODULES[op](shape[1])).to(memory_format=FORMATS[layout]).train(backward)
    input = torch.randn(shape).contiguous(memory_format=FORMATS[layout])
    grad_output = torch.randn_like(input)
    calls = {
        name: _call(torch.compile(block, fullgraph=True, dynamic=False), input, grad_output if backward else None)
        for name, block in ((OURS, ours), (PEER, plain_twin(ours)))
    }
    for one, other in zip(*(call() for call in calls.values()), strict=True):
        error = float((one - other).double().norm() / other.double().norm())
        assert error < LARGEST_ERROR or other.abs().max() < 1e-3, f"results differ by {error:.1e} by their norm"
    timings = measure.compare(benchmark, OURS, calls, seconds=1.5)
    record(
        kind="compile",
        op=op,
        case="x".join(map(str, shape)),
        full=shape != DEFAULT_SHAPE,
        dtype="float32",
        layout=layout,
        direction=direction,
        variants=timings,
        skipped={},
    )


def _call(block: Any, input: Tensor, grad_output: Tensor | None) -> Callable[[], tuple[Tensor, ...]]:
    if grad_output is None:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (block(input),)

        return forward
    leaf = input.detach().requires_grad_()
    leaves = (leaf, *block.parameters())
    return lambda: torch.autograd.grad(block(leaf), leaves, grad_output)

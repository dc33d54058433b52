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

import copies
import measure
import pytest
import torch
from torch import Tensor, nn

import cellops
from cellops.models.twin import plain_twin

OURS, PEER = "cellops", "composition"
MODULES: dict[str, Callable[[int], nn.Module]] = {
    "frelu": cellops.FReLU,
    "squeeze_excite": cellops.SqueezeExcite,
    "eca": cellops.EfficientChannelAttention,
    "spatial_attention": lambda channels: cellops.SpatialAttention(mode="pool"),
    "group_conv1x1": lambda channels: cellops.GroupConv1x1(channels, channels, groups=4),
    "depthwise_conv2d": cellops.DepthwiseConv2d,
}
DEFAULT_SHAPE = (8, 128, 28, 28)
FULL_SHAPES = ((1, 64, 7, 7), (1, 64, 28, 28), (8, 32, 14, 14), (8, 256, 7, 7), (8, 64, 56, 56), (32, 128, 28, 28))


class Block(nn.Module):
    """What stands around the module: a normalisation and its shift, a sum and a ReLU.

    The shift is not learned: before a normalised 1x1 convolution its gradient is rounding and nothing else. There is
    one as over a single image the mean of what is normalised is rounding, too, and with it an attention's gradients.
    """

    def __init__(self, channels: int, module: nn.Module) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.register_buffer("shift", torch.rand(channels, 1, 1))
        self.module = module

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]."""
        return torch.relu(self.module(self.norm(input) + self.shift) + input)


def _rows() -> list[Any]:
    rows = []
    for shape in (DEFAULT_SHAPE, *FULL_SHAPES):
        for op in MODULES:
            for layout in copies.FORMATS:
                for direction in ("forward", "forward+backward"):
                    # compiling a backward takes ten times as long as compiling a forward
                    if direction == "forward":
                        short = layout == "NCHW" or op == "group_conv1x1"
                    else:
                        short = layout == "channels_last" and op in ("frelu", "group_conv1x1")
                    marks = () if shape == DEFAULT_SHAPE and short else pytest.mark.full
                    name = "x".join(map(str, shape))
                    rows.append(
                        pytest.param(op, shape, layout, direction, marks=marks, id=f"{op}-{name}-{layout}-{direction}")
                    )
    return rows


@pytest.mark.parametrize(("op", "shape", "layout", "direction"), _rows())
def test_speed(
    op: str, shape: tuple[int, ...], layout: str, direction: str, benchmark: Any, record: Any, request: Any
) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    backward = direction == "forward+backward"
    ours = Block(shape[1], MODULES[op](shape[1])).to(memory_format=copies.FORMATS[layout]).train(backward)
    input = torch.randn(shape).contiguous(memory_format=copies.FORMATS[layout])
    grad_output = torch.randn_like(input)
    calls = {
        name: copies.call_of(
            torch.compile(block, fullgraph=True, dynamic=False), input, grad_output if backward else None
        )
        for name, block in ((OURS, ours), (PEER, plain_twin(ours)))
    }
    error = copies.largest_error(calls[PEER](), calls[OURS]())
    assert error < copies.LARGEST_ERROR[torch.float32], f"results differ by {error:.1e} by their norm"
    timings = measure.compare(benchmark, OURS, calls, seconds=1.5)
    record(
        kind="compile",
        op=op,
        case="x".join(map(str, shape)),
        full=request.node.get_closest_marker("full") is not None,
        dtype="float32",
        layout=layout,
        direction=direction,
        variants=timings,
        skipped={},
    )

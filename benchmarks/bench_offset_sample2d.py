"""offset_sample2d beside grid_sample on a ready-made grid, eager and compiled.

pytest benchmarks/bench_offset_sample2d.py --benchmark-only

The peer gets every channel as an image of its own, in NCHW, and the grid of the offsets already built: what a user has
to do for that is not timed. Its coordinates lie in [-1, 1], where bfloat16 is off by pixels: beside bfloat16 inputs it
runs in float32, and its conversions are timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cellops import _backend, offset_sample2d, testing

OP, OURS, PEER = "offset_sample2d", "cellops", "grid_sample"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""The peer's largest difference from ours, relative to the largest value; its coordinates take a detour by [-1, 1]."""


def _rows() -> list[Any]:
    """Every shape in float32, the first one in bfloat16 too; the others in bfloat16 with --full."""
    cases = testing.cases(OP, "bench")
    in_float32 = [pytest.param(case, torch.float32, id=f"{case.name}-float32") for case in cases]
    marks = [(), *[pytest.mark.full] * (len(cases) - 1)]
    return in_float32 + [
        pytest.param(case, torch.bfloat16, id=f"{case.name}-bfloat16", marks=mark)
        for case, mark in zip(cases, marks, strict=True)
    ]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", list(FORMATS))
@pytest.mark.parametrize(("case", "dtype"), _rows())
def test_speed(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, benchmark: Any, record: Any
) -> None:
    assert _backend.preferred(OP, "cpu", dtype).name == "cpu", "the compiled library is what these figures are about"
    backward = direction == "forward+backward"
    arguments = case.make(dtype, memory_format=FORMATS[layout])
    input, offset = arguments["input"], arguments["offset"]
    grad_output = torch.randn_like(input)
    planes = input.contiguous().flatten(0, 1).unsqueeze(1)
    grad_planes = grad_output.contiguous().flatten(0, 1).unsqueeze(1)
    torch.compiler.reset()  # or the compiler gives up on a function that it has compiled for eight shapes
    compiled = torch.compile(_grid_sample, dynamic=False)
    variants: measure.Variants = {
        OURS: _call(offset_sample2d, input, offset, grad_output if backward else None),
        PEER: _call(_grid_sample, planes, _grid(offset), grad_planes if backward else None),
        f"compiled {PEER}": _call(compiled, planes, _grid(offset), grad_planes if backward else None),
    }
    ours = variants.pop(OURS)
    for name, call in variants.items():
        for one, other in zip(_as_ours(call(), input), ours(), strict=True):
            error = float((one.float() - other.float()).abs().max() / other.float().abs().max())
            assert error < LARGEST_ERROR[dtype], f"{name} differs from ours by {error:.1e} of the largest value"
    timings = measure.compare(benchmark, OURS, {OURS: ours, **variants, "copy": input.clone})
    record(
        kind="speed",
        op=OP,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        direction=direction,
        variants=timings,
        skipped={},
    )


def _grid_sample(planes: Tensor, grid: Tensor) -> Tensor:
    sampled = F.grid_sample(planes.to(grid.dtype), grid, "bilinear", padding_mode="border", align_corners=True)
    return sampled.to(planes.dtype)


def _grid(offset: Tensor) -> Tensor:
    """[N * C, H, W, (x, y)] in [-1, 1]."""
    height, width = offset.shape[2:]
    here = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    points = here + offset.float().reshape(-1, 2, height, width)
    last = torch.tensor([height - 1, width - 1]).reshape(2, 1, 1)
    return (points * 2 / last - 1).flip(1).permute(0, 2, 3, 1).contiguous()


def _as_ours(found: tuple[Tensor, ...], input: Tensor) -> list[Tensor]:
    """The peer's output and, where there are any, gradients, in the shapes and units of ours."""
    results = [one.reshape(input.shape) for one in found[:2]]
    if len(found) == 3:
        batch, channels, height, width = input.shape
        pairs = found[2].flip(-1) * 2 / torch.tensor([height - 1, width - 1])
        results.append(pairs.permute(0, 3, 1, 2).reshape(batch, 2 * channels, height, width))
    return results


def _call(
    function: Callable[[Tensor, Tensor], Tensor], input: Tensor, where: Tensor, grad_output: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    if grad_output is None:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(input, where),)

        return forward
    leaves = (input.detach().requires_grad_(), where.detach().requires_grad_())

    def forward_backward() -> tuple[Tensor, ...]:
        output = function(*leaves)
        return (output.detach(), *torch.autograd.grad(output, leaves, grad_output))

    return forward_backward

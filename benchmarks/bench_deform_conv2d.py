"""deform_conv2d beside what else a user could run: time, call overhead, extra memory.

pytest benchmarks/bench_deform_conv2d.py --benchmark-only -k "1x64x56x56 and forward"
"""

from __future__ import annotations

from functools import partial
from typing import Any

import measure
import memory
import peers_deform_conv2d as peers
import pytest
import torch
from peers_deform_conv2d import Problem

from cellops import DeformConv2d, _backend, deform_conv2d, testing

OP = "deform_conv2d"
OURS = "cellops"
DIRECTIONS = ("forward", "forward+backward")
TIMED = [
    pytest.param(case, id=case.name, marks=[] if "bench" in case.tags else pytest.mark.full)
    for case in testing.cases(OP, "bench", "full")
]
MATMUL_SIZE = 768
CALLS = 200
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""A peer's largest difference from ours, relative to the largest value; wrong answers are off by more than 0.1."""


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", list(peers.FORMATS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", TIMED)
def test_time(
    case: testing.Case, dtype: torch.dtype, layout: str, direction: str, threads: int, benchmark: Any, record: Any
) -> None:
    problem = Problem.of(case, dtype, layout, threads)
    backward = direction == "forward+backward"
    assert _backend.preferred(OP, "cpu", dtype).name == "cpu", "the compiled library is what these figures are about"
    variants: measure.Variants = {OURS: peers.eager(peers.cellops_call, problem, backward=backward)}
    _check_ours(problem)
    skipped: dict[str, str] = {}
    for name, build in _peer_builders(problem, backward).items():
        try:
            call = build()
            if not name.startswith("dense"):
                _check_peer(call(), variants[OURS](), dtype)
            variants[name] = call
        except peers.Missing as missing:
            skipped[name] = str(missing)
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE).to(dtype)
    variants["matmul"] = lambda: torch.mm(matrix, matrix)

    timings = measure.compare(benchmark, OURS, variants)
    matmul = timings.pop("matmul")
    flops = case.flops * (3 if backward else 1)
    bound = min(timings[name]["median"] for name in timings if name.startswith("dense"))
    record(
        kind="time",
        op=OP,
        case=case.name,
        full="bench" not in case.tags,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        direction=direction,
        variants=timings,
        skipped=skipped,
        gflops=flops / timings[OURS]["median"] / 1e9,
        matmul_gflops=2 * MATMUL_SIZE**3 / matmul["median"] / 1e9,
        percent_of_bound=100 * bound / timings[OURS]["median"],
    )


def _peer_builders(problem: Problem, backward: bool) -> dict[str, Any]:
    def eager(build: Any, other: Problem = problem) -> Any:
        return lambda: peers.eager(build, other, backward=backward)

    builders = {"torchvision": eager(peers.torchvision_call)}
    if not backward:
        builders["ONNX Runtime"] = lambda: peers.onnxruntime_call(problem)
        builders["OpenVINO"] = lambda: peers.openvino_call(problem)
    for layout in peers.FORMATS:
        other = Problem.of(problem.case, problem.dtype, layout, problem.threads)
        builders[f"dense {layout}"] = eager(peers.dense_call, other)
    if problem.dtype is not torch.float32:
        builders["cellops float32"] = eager(peers.cellops_call, problem.cast(torch.float32))
    return builders


def _check_ours(problem: Problem) -> None:
    with torch.no_grad():
        expected = problem.case.reference(**testing.to_dtype(problem.arguments, torch.float32))
        error = _relative_error(problem.case.function(**problem.arguments), expected)
    assert error < LARGEST_ERROR[problem.dtype], f"cellops differs from the reference by {error:.1e}"


def _check_peer(theirs: Any, ours: Any, dtype: torch.dtype) -> None:
    pairs = [(theirs, ours)] if isinstance(theirs, torch.Tensor) else list(zip(theirs, ours, strict=True))
    error = max(_relative_error(*pair) for pair in pairs)
    if not error < LARGEST_ERROR[dtype]:
        raise peers.Missing(f"not measured: its answer differs from ours by {error:.1e} of the largest value")


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.dtype is not expected.dtype:
        actual, expected = actual.float(), expected.float()
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_call_overhead(kernel_size: int, benchmark: Any, record: Any) -> None:
    """A 512-element input, so that what is left is the call: dispatch, checks, allocation, launch.

    The 1x1 kernel has next to no arithmetic; the 3x3 one shows what the smallest real layer takes.
    """
    taps, padding = kernel_size**2, (kernel_size // 2,) * 2
    layer, norm = DeformConv2d(8, 8, kernel_size, padding=padding).eval(), torch.nn.BatchNorm2d(8).eval()
    offset, mask = torch.randn(1, 2 * taps, 8, 8), torch.rand(1, taps, 8, 8)
    weight, bias = layer.weight, layer.bias
    calls: dict[str, Any] = {
        OURS: lambda input: deform_conv2d(input, offset, weight, bias, padding=padding, mask=mask),
        "cellops module": lambda input: layer(input, offset, mask),
        "nn.BatchNorm2d eval": norm,
    }
    skipped = {}
    try:
        function = peers.require("torchvision").ops.deform_conv2d
        calls["torchvision"] = lambda input: function(input, offset, weight, bias, padding=padding, mask=mask)
    except peers.Missing as missing:
        skipped["torchvision"] = str(missing)
    variants = {}
    for name, call in calls.items():
        for training, mode in ((False, "inference"), (True, "training forward")):
            input = torch.randn(1, 8, 8, 8, requires_grad=training)
            variants[f"{name}, {mode}"] = measure.repeat(partial(call, input), CALLS, training=training)
    timings = measure.compare(benchmark, f"{OURS}, inference", variants, calls=CALLS)
    record(kind="overhead", op=OP, case=f"{kernel_size}x{kernel_size}", variants=timings, skipped=skipped)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", testing.cases(OP, "memory"), ids=lambda case: case.name)
def test_extra_memory(case: testing.Case, direction: str, threads: int, benchmark: Any, record: Any) -> None:
    """Peak memory above inputs and outputs, each in a process of its own."""
    sizes = case.sizes
    kernel_height, kernel_width = sizes["kernel_size"]
    taps, pixels = kernel_height * kernel_width, sizes["batch"] * sizes["out_height"] * sizes["out_width"]
    buffer = taps * sizes["in_channels"] * pixels * torch.float32.itemsize
    extra: dict[str, dict[str, float]] = {}
    skipped = {}

    def measure_all() -> None:
        for name in peers.EAGER:
            try:
                used = memory.extra_bytes(OP, case.name, name, direction, threads)
                extra[name] = {"bytes": used, "percent_of_im2col": 100 * used / buffer}
            except peers.Missing as missing:
                skipped[name] = str(missing)

    benchmark.pedantic(measure_all, rounds=1)
    record(
        kind="memory", op=OP, case=case.name, direction=direction, im2col_bytes=buffer, variants=extra, skipped=skipped
    )

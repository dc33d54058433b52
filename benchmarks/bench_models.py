"""The networks written here beside their plain twins: the same weights on PyTorch's own ops, eager and compiled.

The twin of a deformable convolution is torchvision's. Compiled variants take minutes to compile: only with --full.

pytest benchmarks/bench_models.py --benchmark-only
pytest benchmarks/bench_models.py --benchmark-only --full -k lung

A training step is cross-entropy, backward and SGD with momentum on images that are there; inference is evaluation
without gradients. Peak memory is what torch's allocator gave out at a time above the weights. The answers of all
variants are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import measure
import pytest
import torch
from torch import Tensor, nn

from cellops.models import create_model
from cellops.models.cost import peak_bytes
from cellops.models.twin import plain_twin

OURS, PLAIN = "cellops", "plain"
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
DIRECTIONS = ("inference", "training step")
ROUNDS = 3
LARGEST_ERROR = {torch.float32: 1e-2, torch.bfloat16: 2e-1}
"""A variant's largest difference from ours, of the logits' norm; TF32 is in it on a GPU."""


@dataclass(frozen=True)
class Row:
    """A network, its input and what `create_model` takes beside."""

    network: str
    batch: int
    height: int = 224
    width: int = 224
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def case(self) -> str:
        return f"{self.batch}x3x{self.height}x{self.width}"


DEFAULT = [
    Row("lung_resnet50", 4, 240, 320, {"num_classes": 1}),
    Row("shufflenet_v1_g3", 16),
    Row("deform_resnet50", 2),
]
FULL = [Row("dresnet", 16), Row("hqnet_tiny", 16), Row("hqnet_dcn", 8), Row("dresnet_050", 16), Row("dresnet_025", 16)]


def _rows() -> list[Any]:
    """NCHW in float32 by default; the other layout, bfloat16 and the other networks with --full."""
    rows = []
    for device in DEVICES:
        for row in (*DEFAULT, *FULL):
            for layout in FORMATS:
                for dtype in (torch.float32, torch.bfloat16):
                    default = row in DEFAULT and layout == "NCHW" and dtype == torch.float32
                    name = f"{row.network}-{layout}-{str(dtype).removeprefix('torch.')}-{device}"
                    marks = () if default else pytest.mark.full
                    rows.append(pytest.param(row, layout, dtype, device, id=name, marks=marks))
    return rows


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("row", "layout", "dtype", "device"), _rows())
def test_speed(
    row: Row,
    layout: str,
    dtype: torch.dtype,
    device: str,
    direction: str,
    benchmark: Any,
    record: Any,
    request: pytest.FixtureRequest,
) -> None:
    training = direction == "training step"
    networks = _variants(row, layout, dtype, device, compile=request.config.getoption("full"))
    images = torch.randn(row.batch, 3, row.height, row.width, device=device, dtype=dtype)
    images = images.contiguous(memory_format=FORMATS[layout])
    skipped = _compare_logits(networks, images, dtype)
    networks = {name: network for name, network in networks.items() if name not in skipped}
    calls = {
        name: _step(network.train(), images) if training else _inference(network.eval(), images)
        for name, network in networks.items()
    }
    for call in calls.values():
        call()  # compiles, allocates the optimizer's state
    timings = measure.compare(benchmark, OURS, calls, slow_rounds=ROUNDS)
    record(
        kind="model",
        op=row.network,
        case=row.case,
        dtype=str(dtype).removeprefix("torch."),
        layout=layout,
        direction=direction,
        device=device,
        full=not (row in DEFAULT and layout == "NCHW" and dtype == torch.float32),
        variants=timings,
        images_per_second={name: row.batch / timing["median"] for name, timing in timings.items()},
        peak_bytes={name: peak_bytes(call, device) for name, call in calls.items()},
        skipped=skipped,
    )


def _variants(row: Row, layout: str, dtype: torch.dtype, device: str, *, compile: bool) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    ours = create_model(row.network, **{"num_classes": 5, "drop_rate": 0.0, **row.options})
    ours = ours.to(device, dtype, memory_format=FORMATS[layout])
    networks: dict[str, nn.Module] = {OURS: ours, PLAIN: plain_twin(ours)}
    if compile:
        torch.compiler.reset()  # or the compiler gives up on blocks that it has compiled for eight networks
        networks |= {f"compiled {name}": torch.compile(network) for name, network in networks.items()}
    return networks


@torch.no_grad()
def _compare_logits(networks: dict[str, nn.Module], images: Tensor, dtype: torch.dtype) -> dict[str, str]:
    """Check the eager variants' answers; returns which variants cannot run, and why."""
    ours = networks[OURS].eval()(images).double()
    try:
        found = networks[PLAIN].eval()(images).double()
    except (NotImplementedError, RuntimeError) as error:  # torchvision has no bfloat16 on the CPU
        return dict.fromkeys([PLAIN, f"compiled {PLAIN}"], str(error).splitlines()[0])
    error = float((found - ours).norm() / ours.norm())
    assert error < LARGEST_ERROR[dtype], f"{PLAIN} differs from ours by {error:.1e} of the logits' norm"
    return {}


def _inference(network: nn.Module, images: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            network(images)
        _synchronize(images)

    return call


def _step(network: nn.Module, images: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
    count = network.num_classes
    targets = torch.arange(len(images), device=images.device) % count

    def call() -> None:
        optimizer.zero_grad()
        logits = network(images).float()
        if count == 1:
            loss = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], targets.float())
        else:
            loss = nn.functional.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        _synchronize(images)

    return call


def _synchronize(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize()


@pytest.mark.parametrize(
    "row",
    [Row("hqnet", 2), pytest.param(Row("hqnet", 16), marks=pytest.mark.full)],
    ids=lambda row: f"{row.network}-{row.case}",
)
def test_part_of_sampling(row: Row, benchmark: Any, record: Any) -> None:
    """How much of a training step of the whole HQNet (5 classes) its sampling takes, by torch's profiler."""
    step = _step(create_model(row.network, num_classes=5), torch.randn(row.batch, 3, row.height, row.width))
    benchmark.pedantic(step)  # the profiled one is the second
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    sampling = sum(taken for name, taken in seconds.items() if name.startswith("cellops::offset_sample2d"))
    assert sampling > 0, "the profiler has seen no sampling"
    record(
        kind="model_part",
        op=row.network,
        case=row.case,
        dtype="float32",
        layout="NCHW",
        direction="training step",
        device="cpu",
        full=row.batch > 2,
        what="sampling",
        seconds=sampling,
        total_seconds=sum(seconds.values()),
        skipped={},
    )

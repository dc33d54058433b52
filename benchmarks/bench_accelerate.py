"""Networks of timm and torchvision before and after `cellops.accelerate`, end to end; those that lose are in the table.

pytest benchmarks/bench_accelerate.py --benchmark-only
pytest benchmarks/bench_accelerate.py --benchmark-only --full

Inference is evaluation without gradients, before and after `cellops.fuse` too; a training step is cross-entropy,
backward and SGD with momentum. The answers of all variants are compared before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import measure
import pytest
import torch
from torch import Tensor, nn

import cellops

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

OURS, BEFORE, FUSED = "cellops", "before", "folded"
BATCH, SIZE, CLASSES = 8, 112, 10
ROUNDS = 5
LARGEST_ERROR = 1e-4
"""A variant's largest difference from the network as it was, of the logits' norm."""


class Deformable(nn.Module):
    """torchvision's layer with predicted offsets and masks, in place of a 3x3 convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.predict = nn.Conv2d(conv.in_channels, 27, 3, conv.stride, 1)
        sizes = (conv.in_channels, conv.out_channels, 3, conv.stride, 1)
        self.conv = torchvision.ops.DeformConv2d(*sizes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, h, w]."""
        offset, mask = self.predict(x).split((18, 9), dim=1)
        return self.conv(x, offset, mask.sigmoid())


def deform_resnet18(num_classes: int) -> nn.Module:
    """timm's ResNet-18 with deformable convolutions in the first places of its last three stages."""
    network = timm.create_model("resnet18", num_classes=num_classes)
    for stage in (network.layer2, network.layer3, network.layer4):
        for block in stage:
            block.conv1 = Deformable(block.conv1)
    return network


DEFAULT: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_b0 (timm)": lambda **options: timm.create_model("efficientnet_b0", **options),
    "mobilenet_v3_small (torchvision)": torchvision.models.mobilenet_v3_small,
    "ecaresnet26t (timm)": lambda **options: timm.create_model("ecaresnet26t", **options),
    "resnet18 with torchvision's DeformConv2d": deform_resnet18,
}
FULL: dict[str, Callable[..., nn.Module]] = {
    "seresnet18 (timm)": lambda **options: timm.create_model("seresnet18", **options),
    "legacy_seresnet18 (timm)": lambda **options: timm.create_model("legacy_seresnet18", drop_rate=0.0, **options),
    "regnety_002 (timm)": lambda **options: timm.create_model("regnety_002", **options),
    "mobilenetv3_small_100 (timm)": lambda **options: timm.create_model("mobilenetv3_small_100", **options),
    "resnet18 with CBAM (timm)": lambda **options: timm.create_model(
        "resnet18", block_args={"attn_layer": "cbam"}, **options
    ),
    "mobileone_s0 (timm)": lambda **options: timm.create_model("mobileone_s0", **options),
    "efficientnet_b0 (torchvision)": torchvision.models.efficientnet_b0,
    "regnet_y_400mf (torchvision)": torchvision.models.regnet_y_400mf,
}


ABORTS = ("mobileone_s0 (timm)", "training step", "channels_last")


def _rows() -> list[Any]:
    rows = []
    for name in (*DEFAULT, *FULL):
        for direction in ("inference", "training step"):
            for layout in ("NCHW", "channels_last"):
                marks = [pytest.mark.full] if name in FULL or layout == "channels_last" else []
                if (name, direction, layout) == ABORTS and torch.__version__.startswith("2.15."):
                    reason = "torch 2.15 by itself overruns its memory there, and aborts or hangs (AVX2 and AVX-512)"
                    marks.append(pytest.mark.skip(reason=reason))
                rows.append(pytest.param(name, direction, layout, marks=marks, id=f"{name}-{direction}-{layout}"))
    return rows


@pytest.mark.parametrize(("network", "direction", "layout"), _rows())
def test_speed(network: str, direction: str, layout: str, benchmark: Any, record: Any) -> None:
    torch.manual_seed(0)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    before = ({**DEFAULT, **FULL})[network](num_classes=CLASSES).to(memory_format=memory_format)
    ours = copy.deepcopy(before)
    report = cellops.accelerate(ours)
    assert report.replaced, report
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=memory_format)
    networks = {OURS: ours, BEFORE: before}
    if direction == "inference":
        for name in (OURS, BEFORE):
            networks[f"{name}, {FUSED}"] = copy.deepcopy(networks[name]).eval()
            cellops.fuse(networks[f"{name}, {FUSED}"])
    _compare_logits(networks, images)
    make = _inference if direction == "inference" else _step
    calls = {name: make(one, images) for name, one in networks.items()}
    timings = measure.compare(benchmark, OURS, calls, slow_rounds=ROUNDS)
    record(
        kind="accelerate",
        op="accelerate",
        case=network,
        dtype="float32",
        layout=layout,
        direction=direction,
        variants=timings,
        replaced=len(report.replaced),
        left=len(report.left),
        images=[BATCH, 3, SIZE, SIZE],
        skipped={},
    )


@torch.no_grad()
def _compare_logits(networks: dict[str, nn.Module], images: Tensor) -> None:
    wanted = networks[BEFORE].eval()(images).double()
    for name, network in networks.items():
        error = float((network.eval()(images).double() - wanted).norm() / wanted.norm())
        assert error < LARGEST_ERROR, f"{name} differs by {error:.1e} of the logits' norm"


def _inference(network: nn.Module, images: Tensor) -> Callable[[], None]:
    network.eval()

    def call() -> None:
        with torch.no_grad():
            network(images)

    return call


def _step(network: nn.Module, images: Tensor) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
    targets = torch.arange(len(images)) % CLASSES

    def call() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), targets).backward()
        optimizer.step()

    return call

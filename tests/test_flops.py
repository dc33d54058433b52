"""torch's FLOP counter knows the ops: fused ops count as their composition, a bilinear sample as four products."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cellops
from cellops import _flops
from cellops.ops import _registration

COMPOSED: dict[str, Callable[[], nn.Module]] = {
    "frelu": lambda: cellops.FReLU(6),
    "frelu without norm": lambda: cellops.FReLU(6, kernel_size=5, norm=False),
    "depthwise_conv2d": lambda: cellops.DepthwiseConv2d(6, 5),
    "depthwise_conv2d without norm": lambda: cellops.DepthwiseConv2d(6, norm=False),
    "group_conv1x1": lambda: cellops.GroupConv1x1(6, 12, 3, shuffle=True),
    "group_conv1x1 without norm": lambda: cellops.GroupConv1x1(6, 4, 2, norm=False),
    "squeeze_excite": lambda: cellops.SqueezeExcite(6, rd_channels=2),
    "eca": lambda: cellops.EfficientChannelAttention(6),
    "spatial_attention": lambda: cellops.SpatialAttention(6, kernel_size=3),
}


def flops(network: nn.Module, input: torch.Tensor, *, backward: bool = False) -> int:
    with FlopCounterMode(display=False) as counter:
        output = network(input)
        if backward:
            output.sum().backward()
    return counter.get_total_flops()


def test_every_op_has_a_formula() -> None:
    """An op defined later without one would count as nothing."""
    defined = {name.removeprefix("cellops::").partition(".")[0] for name in _registration.library._op_defs}
    assert defined and defined == set(_flops.FORMULAS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", COMPOSED)
def test_counts_as_the_plain_composition(name: str, training: bool, device: str) -> None:
    twin = pytest.importorskip("cellops.models.twin", exc_type=ImportError)
    network = COMPOSED[name]().train(training).to(device)
    input = torch.randn(2, 6, 8, 5, device=device, requires_grad=True)
    forward = flops(network, input)
    assert forward == flops(twin.plain_twin(network), input) > 0
    assert flops(network, input, backward=True) == flops(twin.plain_twin(network), input, backward=True) > forward


def test_sampling_counts_four_multiply_adds() -> None:
    input, samples = torch.randn(2, 6, 8, 5, requires_grad=True), 2 * 6 * 8 * 5
    offsets_conv = 2 * samples * 12 * 9
    layer = cellops.ConvOffset2d(6)
    assert flops(layer, input) == offsets_conv + 8 * samples
    assert flops(layer, input, backward=True) == 3 * offsets_conv + 8 * samples * (1 + 3)


def test_deformable_convolution_counts_samples_and_convolution() -> None:
    input, pixels = torch.randn(2, 6, 9, 5, requires_grad=True), 2 * 5 * 3
    pack = cellops.DeformConv2dPack(6, 8, 3, stride=2, padding=1, groups=2)
    offsets_conv, convolution, samples = 2 * pixels * 27 * 6 * 9, 2 * pixels * 8 * 3 * 9, 8 * pixels * 6 * 9
    assert flops(pack, input) == offsets_conv + convolution + samples
    assert flops(pack, input, backward=True) == 3 * (offsets_conv + convolution) + samples * (1 + 1 + 2 + 1)


@pytest.mark.parametrize("first", ["cellops", "torch.utils.flop_counter"])
def test_whichever_is_imported_first(first: str) -> None:
    second = {"cellops": "torch.utils.flop_counter", "torch.utils.flop_counter": "cellops"}[first]
    code = f"""
import sys, torch
import {first}
if {first!r} == "cellops":
    assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
import {second}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    cellops.eca(torch.ones(1, 4, 2, 2), torch.ones(1, 1, 3))
assert counter.get_total_flops() == 2 * 4 * 3
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)

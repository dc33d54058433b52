"""Sums over many pixels keep the digits that short ones have.

A constant shows it best: in one long float32 sum every term is rounded to the digits of the sum so far, the same way
for long stretches, and the whole is off by up to one part in hundreds. A head that averages hands back such gradients.
"""

from __future__ import annotations

import pytest
import torch
from compositions import each_layout
from torch import Tensor

import cellops
from cellops import _native
from cellops.testing import Case, assert_close_to_reference, forward_and_gradients, to_dtype
from cellops.testing.deform_conv2d import deform_conv2d_case
from cellops.testing.eca import eca_case
from cellops.testing.spatial_attention import spatial_attention_case
from cellops.testing.squeeze_excite import squeeze_excite_case

pytestmark = pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")

LARGE = {"batch": 1, "channels": 9, "height": 512, "width": 577}
"""A vector of channels and one more; the width is odd."""

CASES: list[Case] = [
    squeeze_excite_case("large", "long means", **LARGE, hidden=4),
    eca_case("large", "long means", **LARGE, kernel=3),
    spatial_attention_case("large", "long sums of the weight's gradient", **LARGE, kernel=3, bias=True, mode="conv"),
    *(
        deform_conv2d_case(
            name,
            "long sums of the gradients to weight and bias",
            batch=1,
            in_channels=9,
            out_channels=9,
            height=256,
            width=261,
            kernel_size=(1, 1),
            groups=groups,
            bias=True,
        )
        for name, groups in (("large", 1), ("large_depthwise", 9))
    ),
]


@each_layout
@pytest.mark.parametrize("case", CASES, ids=str)
def test_of_a_constant(case: Case, layout: torch.memory_format) -> None:
    torch.set_num_threads(1)  # the sums are the longest
    arguments = case.make(torch.float32, "cpu", layout)
    arguments["input"].fill_(0.1)
    if "offset" in arguments:
        arguments["offset"].zero_()
    size = case.function(**arguments).shape
    gradient = torch.full((), 0.1).expand(size)
    found = forward_and_gradients(lambda **given: case.function(**given, backend="cpu"), arguments, gradient)
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64), gradient)
    for name, tensor in found.items():
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], what=name)


@each_layout
def test_means_beyond_the_first_block(layout: torch.memory_format) -> None:
    """Every number of pixels around whole blocks of the sums, each pixel its own value."""
    weight = torch.ones(1, 1, 1)
    for pixels in (511, 512, 513, 1024, 1025, 8191, 8192, 8193, 16400):
        input = torch.arange(pixels, dtype=torch.float32).mul(2.0 / pixels).repeat(70, 1).reshape(1, 70, 1, pixels)
        input = (input * torch.linspace(0.5, 1, 70).view(1, -1, 1, 1)).contiguous(memory_format=layout)
        found: Tensor = cellops.eca(input, weight, backend="cpu")
        wanted = input.double() * input.double().mean((2, 3), keepdim=True).sigmoid()
        torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=0.0)

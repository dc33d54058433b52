"""Sums that do not depend on the order of their additions (csrc/cuda/fixed_point.h), for deterministic mode.

Each plane has a unit 2^-exponent, chosen so that what is added to one of its elements stays within 2^60 units. Numbers
that are not finite are left out of that choice, and make NaN of the elements that they are added to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cellops import _native
from cellops.cuda._launch import launch, storage


def largest_finite(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest finite magnitude along some dimensions, in float32."""
    finite = tensor.nan_to_num(0.0, 0.0, 0.0)
    return torch.linalg.vector_norm(finite, torch.inf, dims, dtype=torch.float32)


def exponents_for(count: int, *factors: Tensor) -> Tensor:
    """Exponents [N, C], int32, for sums of `count` numbers.

    Args:
        count: of the numbers that may be added to one element.
        factors: float32, of shapes that broadcast to [N, C]; no number is larger than their product.
    """
    bits = sum(torch.frexp(factor).exponent for factor in factors)
    assert isinstance(bits, Tensor)
    exponents = 59 - max(count - 1, 0).bit_length() - bits.clamp(max=128)  # no float32 has more than 128
    return exponents.clamp(-250, 250).to(torch.int32).contiguous()


def round_sums(sums: Tensor, exponents: Tensor, output: Tensor) -> None:
    """Write the sums [N, C, H, W], int64, as numbers of the output's dtype; both dense in the same memory format."""
    batch, channels, height, width = sums.shape
    params = _native.library().FixedPointParams(
        batch=batch,
        channels=channels,
        pixels=height * width,
        dtype=storage(output),
        channels_last=not sums.is_contiguous(),
    )
    launch("fixed_point", params, sums, exponents, output)

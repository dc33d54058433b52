"""Every channel sampled at its own offsets, in CUDA C++ (csrc/cuda/offset_sample2d.h)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cellops import _native
from cellops.cuda._fixed_point import exponents_for, largest_finite, round_sums
from cellops.cuda._launch import launch, storage

MOST_ELEMENTS = 0xFFF00000
"""Of an image: csrc/cuda/offset_sample2d.h numbers them in 32 bits, with room for a block beyond the last."""


def refuses(shapes: Sequence[Any], dtype: torch.dtype, channels_last: bool) -> str | None:
    """Why the kernels cannot take these sizes."""
    too_large = math.prod(shapes[0][1:]) > MOST_ELEMENTS
    return "its CUDA kernels take images of fewer than 2^32 elements" if too_large else None


MOST_WHOLE = 16
"""Rows and columns of a map that a block holds: its gradient is written, not added up in memory."""


def _held(input: Tensor, offset: Tensor, grad_output: Tensor, layout: str) -> bool:
    """Whether a block holds a map, with channels that 16 bytes divide and their pairs beside each other."""
    channels, height, width = input.shape[1:]
    fits = channels >= 16 and channels % (16 // input.element_size()) == 0 and max(height, width) <= MOST_WHOLE
    beside = layout == "planar" and not input.is_contiguous() and not offset.is_contiguous()
    return fits and beside and all(tensor.data_ptr() % 16 == 0 for tensor in (input, offset, grad_output))


def _params(input: Tensor, offset: Tensor, layout: str) -> Any:
    formats = (not input.is_contiguous(), not offset.is_contiguous())
    return _params_of(input.shape, formats, storage(input), storage(offset), layout)


@lru_cache(maxsize=4096)
def _params_of(
    shape: tuple[int, ...], channels_last: tuple[bool, bool], dtype: int, offset_dtype: int, layout: str
) -> Any:
    batch, channels, height, width = shape
    return _native.library().OffsetSample2dParams(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        interleaved=layout == "interleaved",
        dtype=dtype,
        offset_dtype=offset_dtype,
        channels_last=channels_last[0],
        offset_channels_last=channels_last[1],
    )


def offset_sample2d_forward_cuda(input: Tensor, offset: Tensor, layout: str) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.offset_sample2d`, dense in either memory format."""
    output = torch.empty_like(input)
    launch("offset_sample2d_forward", _params(input, offset, layout), input, offset, output)
    return output


def offset_sample2d_backward_cuda(
    grad_output: Tensor, input: Tensor, offset: Tensor, layout: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to input and offset.

    The input's is added up by atomics, in float32, and comes back so. Under `torch.use_deterministic_algorithms(True)`
    it is added up in fixed point. That of small maps in channels_last takes neither and is always the same.
    """
    want_input, want_offset = wanted[:2]
    grad_offset = torch.empty_like(offset) if want_offset else None
    if want_input and _held(input, offset, grad_output, layout):
        whole, tensors = torch.empty_like(input), (grad_output, input, offset, None, None, grad_offset)
        launch("offset_sample2d_backward", _params(input, offset, layout), *tensors, whole)
        return whole, grad_offset
    fixed = want_input and torch.are_deterministic_algorithms_enabled()
    exponents = None
    if fixed:  # a point adds to an element once, and no more than its gradient
        exponents = exponents_for(input.shape[2] * input.shape[3], largest_finite(grad_output, (2, 3)))
    sums = torch.zeros_like(input, dtype=torch.int64 if fixed else torch.float32) if want_input else None
    if want_input or want_offset:
        params = _params(input, offset, layout)
        launch("offset_sample2d_backward", params, grad_output, input, offset, exponents, sums, grad_offset, None)
    if exponents is None:
        return sums, grad_offset
    grad_input = torch.empty_like(input)
    round_sums(sums, exponents, grad_input)
    return grad_input, grad_offset

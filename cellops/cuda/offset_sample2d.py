"""Every channel sampled at its own offsets, in CUDA C++ (csrc/cuda/offset_sample2d.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cellops import _native
from cellops.cuda._launch import alert_not_deterministic, launch, storage


def _params(input: Tensor, offset: Tensor, layout: str) -> Any:
    batch, channels, height, width = input.shape
    return _native.library().OffsetSample2dParams(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        interleaved=layout == "interleaved",
        dtype=storage(input),
        offset_dtype=storage(offset),
        channels_last=not input.is_contiguous(),
        offset_channels_last=not offset.is_contiguous(),
    )


def offset_sample2d_forward_cuda(input: Tensor, offset: Tensor, layout: str) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.offset_sample2d`, dense in either memory format."""
    output = torch.empty_like(input)
    launch("offset_sample2d_forward", _params(input, offset, layout), input, offset, output)
    return output


def offset_sample2d_backward_cuda(
    grad_output: Tensor, input: Tensor, offset: Tensor, layout: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to input and offset; the input's is added up in float32 by atomics, and comes back so.

    Raises:
        RuntimeError: under `torch.use_deterministic_algorithms(True)`, if the input's gradient is wanted.
    """
    want_input, want_offset = wanted[:2]
    if want_input:
        alert_not_deterministic("offset_sample2d")
    grad_input = torch.zeros_like(input, dtype=torch.float32) if want_input else None
    grad_offset = torch.empty_like(offset) if want_offset else None
    if want_input or want_offset:
        params = _params(input, offset, layout)
        launch("offset_sample2d_backward", params, grad_output, input, offset, grad_input, grad_offset)
    return grad_input, grad_offset

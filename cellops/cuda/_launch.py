"""Calling the library's CUDA kernels on the tensors' device and its current stream."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cellops import _native


def launch(entry: str, params: Any, first: Tensor, *others: Tensor | None) -> None:
    """Run `<entry>_cuda` of the library; what it is given must stay alive until the stream has passed.

    Args:
        entry: name of the line in csrc/cuda/ops.inc.
        params: its parameters.
        first: its first tensor, which says the device; on the CPU for a library that emulates one.
        others: the other tensors in order, None for an absent one.

    Raises:
        RuntimeError: the launch failed.
        ValueError: the kernel cannot take these sizes.
    """
    device, stream = 0, 0
    if first.is_cuda:
        device, stream = first.get_device(), torch.cuda.current_stream(first.device).cuda_stream
    kernel = getattr(_native.library(), f"{entry}_cuda")
    kernel(params, device, stream, *map(_native.pointer, (first, *others)))


def storage(tensor: Tensor) -> int:
    """The library's code of the tensor's dtype."""
    return _native.DTYPE_CODES[tensor.dtype]


def alert_not_deterministic(op: str) -> None:
    """Say that the order of additions to the input's gradient varies from run to run, as torch's own kernels do.

    Raises:
        RuntimeError: under `torch.use_deterministic_algorithms(True)`; with `warn_only=True` it is a warning.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    text = (
        f"{op} with backend='cuda' adds up the input's gradient by atomics and is not deterministic; "
        "backend='triton' has a deterministic variant"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)

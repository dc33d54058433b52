"""Calling the library's CUDA kernels on the tensors' device and its current stream."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cellops import _native


def launch(entry: str, params: Any, *tensors: Tensor | None) -> None:
    """Run `<entry>_cuda` of the library; what it is given must stay alive until the stream has passed.

    Args:
        entry: name of the line in csrc/cuda/ops.inc.
        params: its parameters.
        tensors: its tensors in order, None for an absent one; all on one device, the CPU for a library that emulates
            one.

    Raises:
        RuntimeError: the launch failed.
        ValueError: the kernel cannot take these sizes.
    """
    device, stream = 0, 0
    there = next(tensor for tensor in tensors if tensor is not None)
    if there.is_cuda:
        device, stream = there.get_device(), torch.cuda.current_stream(there.device).cuda_stream
    getattr(_native.library(), f"{entry}_cuda")(params, device, stream, *map(_native.pointer, tensors))


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
        "backend='triton' has a deterministic variant, and backend='reference' is one"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(text)
    warnings.warn(text, stacklevel=2)

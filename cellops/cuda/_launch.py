"""Calling the library's CUDA kernels on the tensors' device and its current stream."""

from __future__ import annotations

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
        device = there.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)  # without an object for it
    getattr(_native.library(), f"{entry}_cuda")(params, device, stream, *map(_native.pointer, tensors))


def storage(tensor: Tensor) -> int:
    """The library's code of the tensor's dtype."""
    return _native.DTYPE_CODES[tensor.dtype]

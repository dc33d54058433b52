"""Many small tensors as one of each dtype: a file of a thousand small ones takes twice as long to write."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

MARK = "__tensor__"
SMALL = 2**18  # elements; of larger ones the copy costs more than the saved file entry


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory, [number of elements]."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,))


def pack(values: Any) -> dict[str, Any]:
    """Nested plain values with tensors in them, as `tensors` (one of each dtype) and `values` with places in these.

    Large tensors stay in `values`.

    Layouts such as channels_last are kept. A tensor with gaps or overlaps in memory is made contiguous.
    """
    parts: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}

    def place(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach().cpu()
            if tensor.numel() > SMALL:
                return tensor
            if not (tensor.is_contiguous() or _is_dense(tensor)):
                tensor = tensor.contiguous()
            offset = sizes.get(tensor.dtype, 0)
            parts.setdefault(tensor.dtype, []).append(_in_memory_order(tensor))
            sizes[tensor.dtype] = offset + tensor.numel()
            return {MARK: (str(tensor.dtype).removeprefix("torch."), offset, tuple(tensor.shape), tensor.stride())}
        if isinstance(value, Mapping):
            return {key: place(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(place(item) for item in value)
        return value

    placed = place(values)
    tensors = {str(dtype).removeprefix("torch."): torch.cat(found) for dtype, found in parts.items()}
    return {"tensors": tensors, "values": placed}


def unpack(packed: Mapping[str, Any]) -> Any:
    """What was given to `pack`.

    Raises:
        ValueError: a tensor is larger than any that is packed: one value may stand for as many as a file asks for.
    """
    tensors = packed["tensors"]

    def restore(value: Any) -> Any:
        if isinstance(value, Mapping):
            if MARK in value:
                name, offset, shape, stride = value[MARK]
                if math.prod(shape) > SMALL:
                    raise ValueError(f"a packed tensor has the shape {tuple(shape)}, more than {SMALL} elements")
                # A copy each: torch.set_rng_state reads a part of a tensor from the whole one's beginning.
                return torch.as_strided(tensors[name], shape, stride, offset).clone()
            return {key: restore(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(restore(item) for item in value)
        return value

    return restore(packed["values"])

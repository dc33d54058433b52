"""Launching kernels, or noting what would be launched: `cellops.testing.compile_kernels` compiles from such notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_notes: list[Launch] | None = None


class Launch(NamedTuple):
    """One launch: the kernel, its arguments in order, its compile-time constants, and how it is compiled."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Launch a kernel on the current device; a grid without programs launches nothing.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis; only the first may exceed 65535.
        arguments: its tensors and sizes, in order.
        num_warps, num_stages: Triton's.
        constants: its `tl.constexpr` parameters.
    """
    if 0 in grid:
        return
    if _notes is not None:
        _notes.append(Launch(kernel, arguments, constants, num_warps, num_stages))
        return
    kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """A context in which nothing is launched: the launches are listed instead. Tensors may be on "meta"."""
    global _notes
    before, _notes = _notes, []
    try:
        yield _notes
    finally:
        _notes = before


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side at least; an H200's number where there is no GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an element of one of the tensors has an offset that a 32-bit integer may not hold."""
    return any(tensor is not None and tensor.numel() >= 2**31 for tensor in tensors)


def power_of_2(size: int, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is no less than `size`, kept between `least` and `most`."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)


def ceil_div(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def dot_precision() -> str:
    """How `tl.dot` multiplies float32: as torch's own products do, with three TF32 products where those are exact.

    Three products leave an error of about 1e-6 and run on the tensor cores; Triton's "ieee" does not.
    """
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"

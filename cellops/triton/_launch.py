"""Launching kernels, or noting what would be launched: `cellops.testing.compile_kernels` compiles from such notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """Of a device: how many programs run side by side at least, and the shared memory that one may have."""

    multiprocessors: int
    shared_bytes: int

    @property
    def small(self) -> bool:
        """Not of the H100's or B200's kind: less shared memory, and products that are fed from registers."""
        return self.shared_bytes < 200 << 10


H200 = Limits(132, 232448)

_notes: list[Launch] | None = None
_limits_of_notes = H200


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments in order, its compile-time constants, and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
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
        _notes.append(Launch(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


@contextmanager
def noted_launches(limits: Limits = H200) -> Iterator[list[Launch]]:
    """A context in which nothing is launched: the launches are listed instead. Tensors may be on "meta".

    Args:
        limits: of the device that the launches are for.
    """
    global _notes, _limits_of_notes
    before, _notes, _limits_of_notes = (_notes, _limits_of_notes), [], limits
    try:
        yield _notes
    finally:
        _notes, _limits_of_notes = before


def limits_of(device: torch.device) -> Limits:
    """The device's limits; an H200's, or the noted ones, where there is no GPU."""
    return _limits_of_gpu(device) if device.type == "cuda" else _limits_of_notes


@cache
def _limits_of_gpu(device: torch.device) -> Limits:
    properties = torch.cuda.get_device_properties(device)
    return Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs side by side at least."""
    return limits_of(device).multiprocessors


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

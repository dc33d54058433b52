"""Launching kernels, or noting what would be launched: `cellops.testing.compile_kernels` compiles from such notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel


class Limits(NamedTuple):
    """Of a device: how many programs run side by side at least, and the shared memory that one may have."""

    multiprocessors: int
    shared_bytes: int

    @property
    def small(self) -> bool:
        """Not of the H100's or B200's kind: less shared memory, and products that are fed from registers."""
        return self.shared_bytes < 200 << 10


H200 = Limits(132, 232448)

MOST_PROGRAMS = (2**31 - 1, 65535)
"""Along each axis of a grid."""

_notes: list[Launch] | None = None
_limits_of_notes = H200


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its arguments in order, its compile-time constants, and how it is compiled."""

    kernel: Any
    grid: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int | float, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return *self.tensors, *self.sizes


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int | float, ...],
    *,
    channels_together: bool | int = False,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Launch a kernel on the current device; a grid without programs launches nothing.

    Args:
        kernel: a `triton.jit` function.
        grid: programs for the pixels, or the images; of two numbers the second for the channels. A kernel of two has a
            constant AXIS: which axis the first number is on, 1 where the second is too large for that one or is to be
            on the first.
        tensors: its first parameters, in order.
        sizes: those that follow, each an int in all launches of a kernel, or a float in all.
        channels_together: start the programs for all channels of some pixels before those of the next pixels, as they
            lie in channels_last: memory is then read and written in one sweep, not in one of parts of lines for each
            block of channels. Where the first number is too large for that, it is not done.
        num_warps, num_stages: Triton's.
        constants: its `tl.constexpr` parameters, which come last.

    Raises:
        RuntimeError: no GPU takes as many programs.
    """
    if 0 in grid:
        return
    if len(grid) == 2:
        grid, constants["AXIS"] = _turned(grid, channels_together)
    if grid[0] > MOST_PROGRAMS[0] or grid[1:] > MOST_PROGRAMS[1:]:
        raise RuntimeError(f"{kernel.__name__} would need {' x '.join(map(str, grid))} programs, more than a GPU takes")
    one = Launch(kernel, grid, tensors, sizes, constants, num_warps, num_stages)
    if _notes is not None:
        _notes.append(one)
    else:
        _start(one)


_starters: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""For a launch without its addresses: what starts the compiled kernel, and the constants, which it takes too."""

_MOST_STARTERS = 4096


def _start(one: Launch) -> None:
    """Start a kernel as Triton's own `kernel[grid](...)` does, which finds it anew among the compiled ones each time.

    That is most of what a launch costs: Triton looks at each argument's type and what divides it, and compares options
    and globals. Here the sizes themselves stand for all that, beside the tensors' types and which of them begin at a
    multiple of 16 bytes. New ones go Triton's way, and so does a GPU of which it looks at more (AMD: how large storages
    are). Its hooks are called either way; a switch of Triton's that changes what is compiled must stay as it was.
    """
    kernel, grid, tensors, sizes, constants, num_warps, num_stages = one
    addresses: list[int | None] = []
    dtypes: list[torch.dtype | None] = []
    every, device = 0, -1
    for tensor in tensors:
        if tensor is None:
            addresses.append(None)
            dtypes.append(None)
        else:
            address = tensor.data_ptr()
            every |= address
            addresses.append(address)
            dtypes.append(tensor.dtype)
            device = tensor.get_device()
    key = (kernel.fn, grid, sizes, device, num_warps, num_stages, *dtypes, *constants, *constants.values())
    if every % 16:
        key += tuple([address is not None and address % 16 == 0 for address in addresses])
    known = _starters.get(key)
    if known is not None and not kernel.pre_run_hooks:
        starter, tail = known
        starter(*addresses, *sizes, *tail)
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = kernel[grid](*one.arguments, **constants, **options)
    names = kernel.arg_names[len(one.arguments) :]
    if not isinstance(compiled, CompiledKernel) or torch.version.hip or set(names) != set(constants):
        return
    if len(_starters) >= _MOST_STARTERS:
        _starters.clear()
    _starters[key] = (compiled[(*grid, 1, 1)[:3]], tuple(constants[name] for name in names))


def _turned(grid: tuple[int, ...], channels_together: bool | int) -> tuple[tuple[int, ...], int]:
    """A grid of two numbers as a GPU takes it, and on which axis the first is then.

    Programs that differ on the first axis alone start one after the other.
    """
    turned = grid[1] > MOST_PROGRAMS[1] or (channels_together and grid[1] > 1 and grid[0] <= MOST_PROGRAMS[1])
    return (grid[::-1], 1) if turned else (grid, 0)


def image_slices(batch: int, programs: int, others: int) -> Iterator[slice]:
    """Slices of a batch for each of which a GPU takes a grid of (images * programs, others): mostly one of it all."""
    size = max(MOST_PROGRAMS[others > MOST_PROGRAMS[1]] // programs, 1)
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


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
    matmul = torch.backends.cuda.matmul
    try:
        fast = matmul.allow_tf32
    except RuntimeError:  # somebody set `fp32_precision`, and the older flag cannot be read any more
        fast = matmul.fp32_precision == "tf32"
    return "tf32" if fast else "tf32x3"

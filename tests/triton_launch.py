"""Launches every kernel of an op twice without a GPU: what Triton's own launch passes on, and what ours does.

python tests/triton_launch.py eca

Nothing runs: a driver that compiles for sm_90 takes the place of CUDA's, and lists what it is asked to start. Not under
TRITON_INTERPRET=1, with which there is nothing to compile.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton_calls import in_format

from cellops.testing import cases
from cellops.testing._compile_kernels import call_launchers
from cellops.triton import _launch

Started = tuple[Any, ...]
"""Grid, the compiled kernel, and its arguments, tensors as their addresses."""

started: list[Started] = []


class Launcher:
    """What Triton makes of a compiled kernel to start it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        *grid, _, function, _, launch_metadata, enter, leave = arguments[:9]
        enter(launch_metadata)
        given = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments[9:]]
        started.append((tuple(grid), function, *given))
        leave(launch_metadata)


class Utilities:
    """Of a driver: loads code."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return 1, object(), 32, 0, 1024

    def unload_module(self, *_: Any) -> None:
        pass


class Driver:
    """As much of Triton's CUDA driver as a launch asks for."""

    utils, launcher_cls = Utilities(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(op: str) -> None:
    driver.set_active(Driver())
    entered: list[Any] = []
    knobs.runtime.launch_enter_hook.add(entered.append)
    count = 0
    for launch in noted(op):
        shifted = launch._replace(tensors=tuple(None if one is None else moved(one) for one in launch.tensors))
        code = []
        for one in (launch, shifted):
            started.clear()
            entered.clear()
            known = len(_launch._starters)
            _launch._start(one)
            assert len(_launch._starters) == known + 1, f"{launch.kernel.__name__}: such a launch was started before"
            _launch._start(one)
            assert len(_launch._starters) == known + 1
            by_triton, by_us = started
            assert by_us == by_triton, f"{launch.kernel.__name__}: {by_triton} by Triton, {by_us}"
            assert len(entered) == 2, "hooks"
            code.append(by_us[1])
            count += 1
        assert code[0] is not code[1], f"{launch.kernel.__name__}: one code for all addresses"
    print(f"{op}: {count} launches")


def noted(op: str) -> list[_launch.Launch]:
    """Those of the smallest case, without repetition."""
    arguments = cases(op, "small")[0].make(torch.float32, torch.device("cpu"))
    found = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with _launch.noted_launches() as notes:
            for deterministic in (False, True):
                call_launchers(op, in_format(arguments, memory_format), deterministic)
        for note in notes:
            dtypes = str([None if tensor is None else tensor.dtype for tensor in note.tensors])
            found[note.kernel.__name__, note.grid, note.sizes, str(note.constants), dtypes] = note
    return list(found.values())


def moved(tensor: Tensor) -> Tensor:
    """Of that shape, one number behind a multiple of 16 bytes."""
    return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)


if __name__ == "__main__":
    main(sys.argv[1])

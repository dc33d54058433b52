"""Bytes and operations: what a call must move, what its Triton kernels do move, and how long that takes on a GPU.

Counted on tensors without data: the launchers run on them and note what they would launch, and PyTorch's own ops around
the kernels are noted beside them. "Must" is each tensor once; "does" is each tensor once for each kernel that has it,
but for what is still in the second-level cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cellops import _backend
from cellops.testing import Case

COPY_BYTES, PRODUCTS, CACHE_BYTES = 4.3e12, 780e12, 132 * 128 * 1.7e9
"""An H200 a second: bytes of a copy and bfloat16 products as measured, and what its first-level caches deliver."""

CACHED = 50 << 20  # bytes of an H200's second-level cache

NOT_READ = {"deform_conv2d_backward_input_kernel": ("input",)}
"""Tensors that a kernel is given for its launch to be like the others'."""

SAMPLED = {
    "deform_conv2d_forward_kernel": 4,
    "deform_conv2d_depthwise_forward_kernel": 4,
    "deform_conv2d_backward_weight_kernel": 4,
    "deform_conv2d_backward_data_kernel": 4,
}
"""Corners that a kernel gathers for each sample of each channel."""

MULTIPLIES = {
    "deform_conv2d_forward_kernel": 1,
    "deform_conv2d_backward_weight_kernel": 1,
    "deform_conv2d_backward_data_kernel": 1,
    "group_conv1x1_forward_kernel": 1,
    "group_conv1x1_statistics_kernel": 1,
    "group_conv1x1_backward_sums_kernel": 1,
    "group_conv1x1_backward_input_kernel": 2,
    "group_conv1x1_backward_weight_kernel": 2,
}
"""Matrix products of the forward's size that a kernel makes."""


@dataclass
class Kernel:
    """One kernel of a call, all its launches together; bytes are of each tensor once for each launch."""

    name: str
    launches: int = 0
    bytes: int = 0
    gathered_bytes: int = 0  # through the first-level caches
    products: int = 0  # multiplications and additions in matrix products

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds on an H200 of what each of its parts takes; the slowest bounds the kernel."""
        return {
            "memory": self.bytes / COPY_BYTES,
            "products": self.products / PRODUCTS,
            "caches": self.gathered_bytes / CACHE_BYTES,
        }


@dataclass
class Work:
    """A call: the least bytes, and its kernels in their order; PyTorch's own ops are one of them."""

    floor_bytes: int
    flops: int
    kernels: list[Kernel] = field(default_factory=list)

    @property
    def moved_bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def bound(self) -> tuple[float, str]:
        """Seconds on an H200, kernel after kernel, and what most of them are spent on."""
        spent: dict[str, float] = {}
        for kernel in self.kernels:
            what = max(kernel.bounds, key=kernel.bounds.__getitem__)
            spent[what] = spent.get(what, 0.0) + kernel.bounds[what]
        return sum(spent.values()), max(spent, key=spent.__getitem__)


def floor_bytes(arguments: dict[str, Any], output: Tensor, direction: str) -> int:
    """Each tensor once: read by forward and by backward, output and gradients written, its gradient read."""
    given = sum(value.nbytes for value in arguments.values() if isinstance(value, Tensor))
    forward = given + output.nbytes
    return forward if direction == "forward" else 2 * forward + given


def of_triton(case: Case, arguments: dict[str, Any], direction: str, factor: int) -> Work:
    """What the Triton launchers do.

    Args:
        case: whose images the arguments hold `factor` times.
        arguments: tensors on "meta".
        direction: "forward" or "forward+backward".
        factor: for the operations.
    """
    from cellops.triton._launch import noted_launches

    seen: list[Kernel] = []
    with noted_launches() as launches, _noted_ops(seen, launches):
        forward = _backend.gpu_launcher("triton", case.op, "forward")
        found = forward(**arguments)
        output, *statistics = found if isinstance(found, tuple) else (found,)
        if direction != "forward":
            backward = _backend.gpu_launcher("triton", case.op, "backward")
            given = {**arguments, "grad_output": torch.empty_like(output), "wanted": [True] * 5}
            given.update(zip(("mean", "var"), statistics, strict=False))
            taken = inspect.signature(backward).parameters
            backward(**{name: value for name, value in given.items() if name in taken})
    flops = case.flops * factor
    kernels: dict[str, Kernel] = {}
    for launch in launches:
        name = launch.kernel.__name__
        kernel = kernels.setdefault(name, Kernel(name))
        kernel.launches += 1
        kernel.bytes += _launch_bytes(launch)
    for kernel in kernels.values():
        kernel.products = MULTIPLIES.get(kernel.name, 0) * flops
        if kernel.name in SAMPLED:
            kernel.gathered_bytes = SAMPLED[kernel.name] * _sampled_bytes(case, arguments, kernel.name)
    total = Work(floor_bytes(arguments, output, direction), flops * (1 if direction == "forward" else 3))
    total.kernels = [*kernels.values(), *seen]
    return total


def _launch_bytes(launch: Any) -> int:
    named = zip(launch.kernel.arg_names, launch.arguments, strict=False)
    skipped = NOT_READ.get(launch.kernel.__name__, ())
    return sum(value.nbytes for name, value in named if isinstance(value, Tensor) and name not in skipped)


def _sampled_bytes(case: Case, arguments: dict[str, Any], kernel: str) -> int:
    """Of one corner of every sample, as often as it is taken: once for each block of output channels."""
    from cellops.triton._launch import H200, ceil_div
    from cellops.triton.deform_conv2d import forward_blocks, weight_blocks

    input, weight, offset = arguments["input"], arguments["weight"], arguments["offset"]
    pixels = offset.shape[0] * offset.shape[2] * offset.shape[3]
    groups, size = case.sizes["groups"], input.element_size()
    group_out, segment = weight.shape[0] // groups, weight.shape[1]
    times = 1
    if kernel == "deform_conv2d_forward_kernel":
        times = ceil_div(group_out, forward_blocks(group_out, segment, size, H200).o)
    elif kernel == "deform_conv2d_backward_weight_kernel":
        times = ceil_div(group_out, weight_blocks(group_out, segment, size, H200).o)
    return times * pixels * input.shape[1] * weight.shape[2] * weight.shape[3] * size


@contextmanager
def _noted_ops(seen: list[Kernel], launches: list[Any]) -> Iterator[None]:
    """Counts the bytes of PyTorch's own ops that are called meanwhile, as one kernel."""
    ops = Kernel("PyTorch's ops")

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            found = function(*arguments, **(keywords or {}))
            name = function._schema.name.removeprefix("aten::")
            if not function.is_view and not name.startswith(("empty", "new_empty")):
                given = () if name.startswith(("zero", "fill")) else arguments  # those are written only
                unique = {id(one): one for one in (*given, found) if isinstance(one, Tensor)}
                ops.bytes += sum(one.nbytes for one in unique.values())
                ops.launches += 1
            return found

    with Noted():
        yield
    if ops.launches:
        seen.append(ops)

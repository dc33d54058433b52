"""Blocks of the deformable kernels in Triton, side by side: what `cellops/triton/deform_conv2d.py` should choose.

Each row is one kernel at one layer, in bfloat16 and channels_last, under every configuration that compiles, in turns.
The launchers are those that users have; only what they choose is replaced while a variant is captured. What differs
from the configuration in use by more than rounding is told, not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from on_gpu import clock, shapes
from on_gpu.ops import tried
from on_gpu.progress import Record, Row, Setup, Step

LAYERS = ((64, 56), (256, 14), (128, 28))
KERNELS = {
    "forward": "forward_blocks",
    "input": "backward_blocks",
    "offset": "backward_blocks",
    "weight": "weight_blocks",
}
"""Forward and the gradients, each by itself, and the function that chooses its blocks."""

DEFAULT = "in use"
WANTED = ("input", "offset", "weight", "bias", "mask")


def step(setup: Setup) -> Step:
    """A row for every kernel and layer."""
    layers = ((16, 6),) if setup.small else LAYERS
    rows = []
    for (channels, size), kernel in product(layers, KERNELS):
        key = f"tuning deform_conv2d {kernel} {channels},{size},{size}"
        rows.append(Row(key, 1.0 if setup.small else 40.0, partial(_measure, kernel, channels, size, setup)))
    return Step("tuning", rows)


def configurations(kernel: str, channels: int, small: bool) -> Iterator[dict[str, int]]:
    """Chunks of channels that neighbouring lanes share, in bytes; pixels, channels and warps of a program."""
    if small:
        yield {"chunk": 32, "p": 32, "c": 16, "num_warps": 4}
        return
    most = min(channels, 128)
    for chunk, p, c, warps in product((32, 64, 128), (64, 128), (32, 64, 128), (4, 8)):
        if chunk // 2 <= c <= most and (kernel != "input" or chunk == 32):  # its additions know no chunks
            yield {"chunk": chunk, "p": p, "c": c, "num_warps": warps}


@contextmanager
def chosen(kernel: str, configuration: dict[str, int]) -> Iterator[None]:
    """Within it the launchers take this configuration."""
    from cellops.triton import deform_conv2d

    usual, blocks = getattr(deform_conv2d, KERNELS[kernel]), dict(configuration)
    chunk = blocks.pop("chunk")

    def taken(*arguments: Any) -> Any:
        return usual(*arguments)._replace(**blocks)

    with patch.multiple(deform_conv2d, CHUNK_BYTES=chunk, **{KERNELS[kernel]: taken}):
        yield


def _measure(kernel: str, channels: int, size: int, setup: Setup, left: float) -> Record:
    from cellops.testing.deform_conv2d import deform_conv2d_case
    from cellops.triton import deform_conv2d

    sizes = {"in_channels": channels, "out_channels": channels, "height": size, "width": size}
    case = deform_conv2d_case("tuning", "", batch=1, tags="bench", **sizes)
    point = shapes.Point(case, "bfloat16", "channels_last", "forward")
    device, factor = shapes.filled(point, setup)
    arguments = shapes.make(point, device, factor)
    if kernel == "forward":
        call = partial(deform_conv2d.deform_conv2d_forward_triton, **arguments)
    else:
        bias = arguments.pop("bias")
        output = deform_conv2d.deform_conv2d_forward_triton(bias=bias, **arguments)
        grad_output = torch.empty_like(output).copy_(torch.randn(output.shape[1:], device=device))
        wanted = [name == kernel for name in WANTED]
        call = partial(deform_conv2d.deform_conv2d_backward_triton, grad_output, wanted=wanted, **arguments)

    found = list(configurations(kernel, channels, setup.small))
    named = {" ".join(f"{name} {value}" for name, value in one.items()): one for one in found}
    variants = {DEFAULT: partial(_answer, call)}
    variants |= {name: partial(_called, kernel, one, call) for name, one in named.items()}
    makers = {name: partial(_itself, variant) for name, variant in variants.items()}
    calls, skipped, _ = tried(makers, set(makers), None, torch.bfloat16)
    calls = {name: one for name, one in calls.items() if name not in skipped}
    timings, untimed = clock.compare(calls, device, 2 if setup.small else clock.ROUNDS)
    best = min(timings, key=lambda name: timings[name]["median"])
    return {
        "kind": "tuning",
        "op": "deform_conv2d",
        "kernel": kernel,
        "shape": list(arguments["input"].shape),
        "default": DEFAULT,
        "variants": timings,
        "skipped": skipped | untimed,
        "best": best,
        "default_over_best": timings[DEFAULT]["median"] / timings[best]["median"],
    }


def _itself(variant: Callable[[], Any]) -> Callable[[], Any]:
    return variant


def _called(kernel: str, configuration: dict[str, int], call: Callable[[], Any]) -> tuple[Tensor, ...]:
    with chosen(kernel, configuration):
        return _answer(call)


def _answer(call: Callable[[], Any]) -> tuple[Tensor, ...]:
    """The output, or the one gradient that was wanted."""
    result = call()
    return (result,) if isinstance(result, Tensor) else tuple(part for part in result if part is not None)

"""What each kernel of a call takes, by torch's profiler: which of several is slow is not in the time of all of them.

After the timings: a profiler that has been there may slow down what is launched behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from cellops import _backend
from on_gpu import clock, shapes
from on_gpu.ops import allow_tf32, call_of, own_failures, runs
from on_gpu.progress import Record, Row, Setup, Skipped, Step, in_a_line, is_fatal
from on_gpu.shapes import Point

DTYPE = "bfloat16"
MOST_LETTERS = 100  # of a kernel's name: templates of PyTorch's have thousands
SHOWN = 3  # kernels of each backend in the line that a row prints


def step(setup: Setup) -> Step:
    """A row for every shape of the targets in bfloat16, channels_last first."""
    allow_tf32()  # as in "ops", or other kernels would run
    rows = []
    for point in sorted(shapes.points(small=setup.small), key=lambda point: point.layout != "channels_last"):
        if not point.sweep and (point.dtype == DTYPE or setup.small):
            row = partial(_measure, point, setup)
            rows.append(Row(key_of(point), 1.0 if setup.small else 15.0, row))
    return Step("kernels", rows)


def key_of(point: Point) -> str:
    return point.key.replace("ops ", "kernels ", 1)


def by_kernel(launches: Iterable[tuple[str, float]]) -> dict[str, dict[str, Any]]:
    """Names and microseconds of launches, together for each name, the slowest first."""
    found: dict[str, dict[str, Any]] = {}
    for name, microseconds in launches:
        kernel = found.setdefault(name[:MOST_LETTERS], {"seconds": 0.0, "launches": 0})
        kernel["seconds"] += microseconds / 1e6
        kernel["launches"] += 1
    return dict(sorted(found.items(), key=lambda item: -item[1]["seconds"]))


def _measure(point: Point, setup: Setup, left: float) -> Record:
    device, factor = shapes.filled(point, setup)
    arguments = shapes.make(point, device, factor)
    variants: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for backend in (name for name in _backend.OPS[point.case.op] if runs(name, point, device)):
        function = partial(point.case.function, backend=backend)
        try:
            variant = call_of(function, arguments, point.direction != "forward")
            variants[f"cellops {backend}"] = by_kernel(_profiled(variant, device))
        except Exception as error:
            if isinstance(error, Skipped) or is_fatal(error):
                raise
            failed[f"cellops {backend}"] = in_a_line(error)
    text = "; ".join(f"{name}: {_slowest(kernels)}" for name, kernels in variants.items())
    return {
        "kind": "kernels",
        "op": point.op,
        "shape": list(arguments["input"].shape),
        "direction": point.direction,
        "variants": variants,
        "summary": text,
        **own_failures(failed),
    }


def _profiled(variant: clock.Call, device: torch.device) -> list[tuple[str, float]]:
    """Names and microseconds of what a call launches; on the CPU of the ops that it calls, itself included.

    Raises:
        Skipped: the profiler sees no GPU.
    """
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    for _ in range(clock.WARM_UP):
        variant()
    clock.synchronize(device)
    with torch.profiler.profile(activities=[activity]) as profile:
        variant()
        clock.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profile.events() or () if event.device_type == kind and not event.is_user_annotation]
    if not events:
        raise Skipped("torch's profiler saw no kernel: it may not be allowed to here")
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def _slowest(kernels: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name[:40]} {1e6 * kernel['seconds']:.0f} us" for name, kernel in list(kernels.items())[:SHOWN])

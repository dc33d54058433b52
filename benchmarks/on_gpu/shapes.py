"""What is timed on a GPU: the cases of `cellops.testing` and a sweep of deformable layers, at batches that fill it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cellops import testing
from cellops.testing.deform_conv2d import deform_conv2d_case
from on_gpu.progress import Setup

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIRECTIONS = ("forward", "forward+backward")
OPS = (
    "deform_conv2d",
    "offset_sample2d",
    "frelu",
    "depthwise_conv2d",
    "squeeze_excite",
    "eca",
    "spatial_attention",
    "group_conv1x1",
)
TRAINED_AS = {op: f"{op}_batch_norm" for op in ("frelu", "depthwise_conv2d", "group_conv1x1")}
"""Ops whose module has another op in training, with the statistics of the batch."""

BATCHED = ("input", "offset", "mask")
SWEEP = (
    *((16, 112), (64, 112), (256, 56), (512, 28), (128, 28)),
    *((1024, 14), (512, 14), (512, 7), (1024, 7)),
)
"""Channels and map of deformable layers beside those of the targets."""

CACHES = 4  # times the second-level cache that an input exceeds, so that no call finds it there


@dataclass(frozen=True)
class Point:
    """One row of the benchmark: a case at a type, layout and direction."""

    case: testing.Case
    dtype: str
    layout: str
    direction: str
    sweep: bool = False

    @property
    def op(self) -> str:
        """The op's name, without what training adds."""
        return self.case.op.removesuffix("_batch_norm")

    @property
    def key(self) -> str:
        return f"ops {self.op} {self.case.name} {self.dtype} {self.layout} {self.direction}"

    @property
    def urgency(self) -> int:
        """Rows of the targets first, then the other types and layouts, then the sweep."""
        aimed_at = self.layout == "channels_last" and self.dtype != "float32"
        return 2 * self.sweep + (0 if aimed_at else 1)


def points(*, small: bool = False) -> list[Point]:
    """All rows, most important first, the first shape of every op before the second of any; `small` ones are two of a
    tiny case of each op."""
    found, places = [], {}
    for op in OPS:
        for place, (case, trained, sweep) in enumerate(_cases(op, small)):
            places[case.name] = places[trained.name] = place
            if small:
                found.append(Point(case, "bfloat16", "channels_last", DIRECTIONS[0]))
                found.append(Point(trained, "float32", "NCHW", DIRECTIONS[1]))
                continue
            for dtype in DTYPES:
                for layout in FORMATS:
                    found.append(Point(case, dtype, layout, DIRECTIONS[0], sweep))
                    found.append(Point(trained, dtype, layout, DIRECTIONS[1], sweep))
    return sorted(found, key=lambda point: (point.urgency, places[point.case.name]))


def _cases(op: str, small: bool) -> Iterator[tuple[testing.Case, testing.Case, bool]]:
    """Cases in evaluation and in training, and whether they belong to the sweep."""
    trained = testing.cases(TRAINED_AS.get(op, op), "small" if small else "real")
    if small:
        yield testing.cases(op, "small")[0], trained[0], False
        return
    for case in testing.cases(op, "bench"):
        same = [other for other in trained if _shape(other) == _shape(case)]
        yield case, same[0] if op in TRAINED_AS else case, False
    if op == "deform_conv2d":
        for channels, size in SWEEP:
            case = deform_conv2d_case(
                f"1x{channels}x{size}x{size}",
                "a layer of a deformable network",
                batch=1,
                in_channels=channels,
                out_channels=channels,
                height=size,
                width=size,
                tags="bench",
            )
            yield case, case, True


def _shape(case: testing.Case) -> dict[str, Any]:
    """Its sizes; which activation follows is another matter: with a kink at 0, float32 need not agree with float64."""
    return {name: size for name, size in case.sizes.items() if name != "activation"}


def scale(case: testing.Case, dtype: torch.dtype, cache_bytes: int) -> int:
    """How many times a case's images are taken: a power of two, so that the input exceeds `CACHES` caches."""
    drawn = case.make(dtype, "meta")["input"]
    factor = 1
    while factor * drawn.numel() * drawn.element_size() < CACHES * cache_bytes:
        factor *= 2
    return factor


def filled(point: Point, setup: Setup) -> tuple[torch.device, int]:
    """The device, and how many times the case's images fill it."""
    device = torch.device(setup.device, 0) if setup.device == "cuda" else torch.device(setup.device)
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return device, 1 if setup.small else scale(point.case, DTYPES[point.dtype], cache_bytes)


def make(point: Point, device: torch.device, factor: int) -> dict[str, Any]:
    """The arguments of the point's call with `factor` times the case's images."""
    dtype, memory_format = DTYPES[point.dtype], FORMATS[point.layout]
    drawn = point.case.make(dtype, device, memory_format)
    return {
        name: value.repeat(factor, 1, 1, 1).contiguous(memory_format=memory_format)
        if name in BATCHED and isinstance(value, Tensor)
        else value
        for name, value in drawn.items()
    }

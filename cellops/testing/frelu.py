"""The cases of `frelu` and of `frelu_batch_norm`. Drawn values do not tie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cellops.reference.frelu import frelu, frelu_batch_norm
from cellops.testing._case import Case, draw_normal, maker


def frelu_case(
    name: str,
    why: str,
    *,
    batch_norm: bool = False,
    batch: int = 3,
    channels: int = 5,
    height: int = 6,
    width: int = 7,
    kernel: int = 3,
    affine: bool = True,
    tags: str = "small",
) -> Case:
    """A case of `frelu`, or of `frelu_batch_norm`; `affine` gives it scale and shift, or gamma and beta."""
    names = ("gamma", "beta") if batch_norm else ("scale", "shift")
    shapes: dict[str, tuple[int, ...] | None] = {
        "input": (batch, channels, height, width),
        "weight": (channels, 1, kernel, kernel),
        **dict.fromkeys(names, (channels,) if affine else None),
    }
    taps, pixels = kernel * kernel, batch * height * width
    reference: Callable[..., Any] = frelu_batch_norm if batch_norm else frelu
    return Case(
        op="frelu_batch_norm" if batch_norm else "frelu",
        name=name,
        why=why,
        sizes={"batch": batch, "channels": channels, "height": height, "width": width, "kernel": kernel},
        make=maker(shapes, {"eps": 1e-3} if batch_norm else {}, draw_normal),
        reference=reference,
        terms={
            "output": taps + batch_norm * pixels,
            "input": taps + batch_norm * pixels,
            "mean": pixels,
            "var": pixels,
            **dict.fromkeys(("weight", *names), pixels),
        },
        flops=2 * pixels * channels * taps,
        elements=2 * pixels * channels + channels * (taps + 2),
        tags=frozenset(tags.split()),
    )


_LAYER: dict[str, Any] = {"batch": 16, "channels": 128, "height": 56, "width": 56}

CASES: list[Case] = [
    frelu_case("frelu_basic", "scale and shift, sizes that differ from each other"),
    frelu_case("frelu_plain", "absent scale and shift", affine=False),
    frelu_case("frelu_k5", "a wider funnel that exceeds the map", kernel=5, height=4),
    frelu_case("frelu_k1", "no neighbours, no border", kernel=1),
    frelu_case("frelu_pixel", "a 1x1 map, where both layouts coincide", height=1, width=1),
    frelu_case("frelu_column", "a map of one column", width=1),
    frelu_case("frelu_channel", "one channel, where both layouts coincide", channels=1),
    frelu_case("frelu_empty", "an empty batch", batch=0, tags="edge"),
    frelu_case("frelu_batch33", "more images than threads", batch=33, channels=17, height=3, tags="edge"),
    frelu_case("frelu_map14", "rows shorter than a vector", channels=45, height=14, width=14, tags="edge"),
    frelu_case("frelu_k7", "seven taps a side, more channels than a vector", channels=20, kernel=7, tags="edge"),
    frelu_case("frelu_image", "one image for all threads", batch=1, channels=65, height=63, width=33, tags="edge"),
    frelu_case(
        "frelu_rows",
        "one image of few channels: its rows are shared",
        batch=1,
        channels=3,
        height=91,
        width=97,
        tags="edge",
    ),
    frelu_case("frelu_16x128x56x56", "ResNet conv3, the layer of the targets", tags="real bench", **_LAYER),
    frelu_case("frelu_bn_basic", "gamma and beta, sizes that differ from each other", batch_norm=True),
    frelu_case("frelu_bn_plain", "absent gamma and beta", batch_norm=True, affine=False),
    frelu_case("frelu_bn_k5", "a wider funnel that exceeds the map", batch_norm=True, kernel=5, height=4),
    frelu_case("frelu_bn_channel", "one channel, whose sums are single numbers", batch_norm=True, channels=1),
    frelu_case("frelu_bn_pixel", "1x1 maps: the batch alone is averaged", batch_norm=True, height=1, width=1),
    frelu_case(
        "frelu_bn_map14", "rows shorter than a vector", batch_norm=True, channels=45, height=14, width=14, tags="edge"
    ),
    frelu_case(
        "frelu_bn_batch33", "more images than threads", batch_norm=True, batch=33, channels=17, height=3, tags="edge"
    ),
    frelu_case(
        "frelu_bn_image",
        "one image for all threads",
        batch_norm=True,
        batch=1,
        channels=65,
        height=63,
        width=33,
        tags="edge",
    ),
    frelu_case(
        "frelu_bn_rows",
        "one image of few channels: its rows are shared",
        batch_norm=True,
        batch=1,
        channels=3,
        height=91,
        width=97,
        tags="edge",
    ),
    frelu_case(
        "frelu_bn_16x128x56x56", "ResNet conv3, the layer of the targets", batch_norm=True, tags="real", **_LAYER
    ),
]

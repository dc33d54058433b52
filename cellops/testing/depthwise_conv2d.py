"""The cases of `depthwise_conv2d` and of its form with batch statistics. Drawn values stay off the kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cellops.reference.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_batch_norm
from cellops.testing._case import Case, draw_normal, maker


def depthwise_conv2d_case(
    name: str,
    why: str,
    *,
    batch_norm: bool = False,
    batch: int = 3,
    channels: int = 5,
    height: int = 6,
    width: int = 7,
    kernel: int = 3,
    activation: str = "relu",
    affine: bool = True,
    tags: str = "small",
) -> Case:
    """A case of `depthwise_conv2d`, or with `batch_norm` of the op in training.

    `affine` gives it scale and shift, or gamma and beta.
    """
    names = ("gamma", "beta") if batch_norm else ("scale", "shift")
    shapes: dict[str, tuple[int, ...] | None] = {
        "input": (batch, channels, height, width),
        "weight": (channels, 1, kernel, kernel),
        **dict.fromkeys(names, (channels,) if affine else None),
    }
    taps, pixels = kernel * kernel, batch * height * width
    reference: Callable[..., Any] = depthwise_conv2d_batch_norm if batch_norm else depthwise_conv2d
    settings: dict[str, Any] = {"activation": activation}
    return Case(
        op="depthwise_conv2d_batch_norm" if batch_norm else "depthwise_conv2d",
        name=f"depthwise_bn_{name}" if batch_norm else f"depthwise_{name}",
        why=why,
        sizes={
            "batch": batch,
            "channels": channels,
            "height": height,
            "width": width,
            "kernel": kernel,
            **settings,
        },
        make=maker(shapes, {"eps": 1e-3, **settings} if batch_norm else settings, draw_normal),
        reference=reference,
        terms={
            "output": taps + batch_norm * pixels,
            "input": taps + batch_norm * pixels,
            **dict.fromkeys(("mean", "var", "weight", *names), pixels),
        },
        flops=2 * pixels * channels * taps,
        elements=2 * pixels * channels + channels * (taps + 2),
        tags=frozenset(tags.split()),
    )


def _both(name: str, why: str, **changes: Any) -> list[Case]:
    return [depthwise_conv2d_case(name, why, batch_norm=batch_norm, **changes) for batch_norm in (False, True)]


_LAYER: dict[str, Any] = {"batch": 16, "channels": 128, "height": 56, "width": 56}

CASES: list[Case] = [
    *_both("basic", "scale and shift, sizes that differ from each other"),
    *_both("plain", "no scale, shift or activation", affine=False, activation="none"),
    *_both("relu6", "an activation with two kinks", activation="relu6"),
    *_both("gelu", "an activation from the error function", activation="gelu"),
    *_both("silu", "an activation from the exponential function", activation="silu"),
    *_both("hardswish", "an activation whose slope leaves [0, 1]", activation="hardswish"),
    *_both("k5", "a wider window that exceeds the map", kernel=5, height=4, activation="silu"),
    *_both("pixel", "1x1 maps, where both layouts coincide", batch=5, height=1, width=1, activation="none"),
    depthwise_conv2d_case("k1", "no neighbours, no border", kernel=1, activation="none"),
    depthwise_conv2d_case("column", "a map of one column", width=1),
    depthwise_conv2d_case("channel", "one channel, where both layouts coincide", channels=1),
    depthwise_conv2d_case("empty", "an empty batch", batch=0, tags="edge"),
    *_both("batch33", "more images than threads", batch=33, channels=17, height=3, activation="none", tags="edge"),
    *_both("map14", "rows shorter than a vector", channels=45, height=14, width=14, tags="edge"),
    depthwise_conv2d_case("k7", "seven taps a side, more channels than a vector", channels=20, kernel=7, tags="edge"),
    *_both(
        "image", "one image for all threads", batch=1, channels=65, height=63, width=33, activation="silu", tags="edge"
    ),
    *_both(
        "rows",
        "one image of few channels: its rows are shared",
        batch=1,
        channels=3,
        height=91,
        width=97,
        activation="none",
        tags="edge",
    ),
    depthwise_conv2d_case("16x128x56x56", "a layer of MobileNet's size", tags="real bench", **_LAYER),
    depthwise_conv2d_case(
        "16x128x56x56", "a layer of MobileNet's size", batch_norm=True, activation="none", tags="real", **_LAYER
    ),
]

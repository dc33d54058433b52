"""The cases of `group_conv1x1` and of `group_conv1x1_batch_norm`. Drawn values stay off the activations' kinks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cellops.reference.group_conv1x1 import group_conv1x1, group_conv1x1_batch_norm
from cellops.testing._case import Case, draw_normal, maker


def group_conv1x1_case(
    name: str,
    why: str,
    *,
    batch_norm: bool = False,
    batch: int = 3,
    in_channels: int = 6,
    out_channels: int = 10,
    height: int = 5,
    width: int = 3,
    groups: int = 2,
    activation: str = "relu",
    shuffle: bool = False,
    affine: bool = True,
    tags: str = "small",
) -> Case:
    """A case of `group_conv1x1`, or with `batch_norm` of the op in training.

    `affine` gives it scale and shift, or gamma and beta.
    """
    sizes = {"batch": batch, "in_channels": in_channels, "out_channels": out_channels, "height": height, "width": width}
    names = ("gamma", "beta") if batch_norm else ("scale", "shift")
    inputs, outputs, positions = in_channels // groups, out_channels // groups, batch * height * width
    shapes: dict[str, tuple[int, ...] | None] = {
        "input": (batch, in_channels, height, width),
        "weight": (out_channels, inputs, 1, 1),
        **dict.fromkeys(names, (out_channels,) if affine else None),
    }
    settings = {"groups": groups, "activation": activation, "shuffle": shuffle}
    reference: Callable[..., Any] = group_conv1x1_batch_norm if batch_norm else group_conv1x1
    return Case(
        op="group_conv1x1_batch_norm" if batch_norm else "group_conv1x1",
        name=f"group_conv1x1_bn_{name}" if batch_norm else f"group_conv1x1_{name}",
        why=why,
        sizes={**sizes, **settings},
        make=maker(shapes, {"eps": 1e-3, **settings} if batch_norm else settings, draw_normal),
        reference=reference,
        terms={
            "output": inputs,
            "input": outputs,
            **dict.fromkeys(("mean", "var", "weight", *names), positions),
        },
        flops=2 * positions * out_channels * inputs,
        elements=positions * (in_channels + out_channels) + out_channels * (inputs + 2),
        tags=frozenset(tags.split()),
    )


def _both(name: str, why: str, **changes: Any) -> list[Case]:
    return [group_conv1x1_case(name, why, batch_norm=batch_norm, **changes) for batch_norm in (False, True)]


_LAYER: dict[str, Any] = {
    "batch": 16,
    "in_channels": 128,
    "out_channels": 128,
    "height": 56,
    "width": 56,
    "groups": 8,
}

CASES: list[Case] = [
    *_both("basic", "two groups, sizes that differ from each other"),
    *_both("plain", "no scale, shift or activation", affine=False, activation="none"),
    *_both("shuffle", "a shuffle whose inverse is another one", groups=2, out_channels=6, shuffle=True),
    *_both("relu6", "an activation with two kinks", activation="relu6"),
    *_both("gelu", "an activation from the error function", activation="gelu"),
    *_both("silu", "an activation from the exponential function", activation="silu", shuffle=True),
    *_both("hardswish", "an activation whose slope leaves [0, 1]", activation="hardswish"),
    *_both("dense", "one group", groups=1),
    *_both("depthwise", "a channel in and one out for each group", groups=6, out_channels=6, shuffle=True),
    *_both("wider", "depthwise with two channels out for each in", groups=3, in_channels=3, out_channels=6),
    *_both("pixel", "1x1 maps, where both layouts coincide", batch=5, height=1, width=1, shuffle=True),
    group_conv1x1_case("empty", "an empty batch", batch=0, tags="edge"),
    *_both(
        "batch33",
        "more images than threads, of fewer pixels than a vector has lanes",
        batch=33,
        in_channels=12,
        out_channels=8,
        groups=4,
        activation="hardswish",
        shuffle=True,
        tags="edge",
    ),
    *_both(
        "image",
        "one image for all threads; groups of no round number of channels",
        batch=1,
        in_channels=33,
        out_channels=69,
        height=63,
        width=33,
        groups=3,
        activation="silu",
        shuffle=True,
        tags="edge",
    ),
    *_both(
        "tiles",
        "tiles that end amid an image; one group of more channels than are summed at once",
        batch=7,
        in_channels=150,
        out_channels=37,
        height=13,
        width=11,
        groups=1,
        activation="gelu",
        tags="edge",
    ),
    *_both(
        "vectors",
        "groups that are whole vectors of channels on either side, which channels_last memory keeps where they are",
        batch=5,
        in_channels=64,
        out_channels=96,
        height=9,
        width=7,
        activation="relu6",
        tags="edge",
    ),
    *_both(
        "vectors_dense",
        "the same of one group, of more channels than a block has columns",
        batch=2,
        in_channels=80,
        out_channels=48,
        height=11,
        width=13,
        groups=1,
        activation="gelu",
        shuffle=True,
        tags="edge",
    ),
    *_both(
        "kept",
        "images that are whole tiles, of groups with more channels in than out",
        batch=2,
        in_channels=72,
        out_channels=24,
        height=12,
        width=20,
        shuffle=True,
        tags="edge",
    ),
    *_both(
        "wide",
        "groups of many channels out, whose weights' gradient is summed another way",
        batch=3,
        in_channels=64,
        out_channels=128,
        height=9,
        width=7,
        activation="none",
        tags="edge",
    ),
    group_conv1x1_case("16x128x56x56", "a grouped bottleneck, the layer of the targets", tags="real bench", **_LAYER),
    group_conv1x1_case(
        "16x128x56x56", "a grouped bottleneck, the layer of the targets", batch_norm=True, tags="real", **_LAYER
    ),
]

"""The cases of `deform_conv2d`. `small` ones stay off the integer grid, so that finite differences hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cellops.reference.deform_conv2d import deform_conv2d
from cellops.testing._case import Case, maker, off_grid


def deform_conv2d_case(
    name: str,
    why: str,
    *,
    batch: int = 2,
    in_channels: int = 4,
    height: int = 7,
    width: int = 6,
    out_channels: int = 5,
    kernel_size: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    offset_groups: int = 1,
    mask: bool = True,
    bias: bool = True,
    spread: float = 2.0,
    tags: str = "small",
) -> Case:
    """A case of `deform_conv2d`; `spread` is the offsets' standard deviation in pixels, spaces separate tags."""
    sizes = {key: value for key, value in locals().items() if key not in ("name", "why", "tags")}
    out_height, out_width = (
        (size + 2 * pad - dilate * (kernel - 1) - 1) // step + 1
        for size, pad, dilate, kernel, step in zip((height, width), padding, dilation, kernel_size, stride, strict=True)
    )
    sizes |= {"out_height": out_height, "out_width": out_width}
    taps, pixels = kernel_size[0] * kernel_size[1], batch * out_height * out_width
    group_in, group_out = in_channels // groups, out_channels // groups
    shapes = {
        "input": (batch, in_channels, height, width),
        "offset": (batch, offset_groups * taps * 2, out_height, out_width),
        "weight": (out_channels, group_in, *kernel_size),
        "bias": (out_channels,) if bias else None,
        "mask": (batch, offset_groups * taps, out_height, out_width) if mask else None,
    }

    def draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if key == "offset":
            return off_grid(shape, spread, generator)
        return (torch.rand if key == "mask" else torch.randn)(shape, generator=generator, dtype=torch.float64)

    per_sample = in_channels // offset_groups * group_out
    return Case(
        op="deform_conv2d",
        name=name,
        why=why,
        sizes=sizes,
        make=maker(shapes, {"stride": stride, "padding": padding, "dilation": dilation}, draw),
        reference=deform_conv2d,
        terms={
            "output": group_in * taps,
            "input": group_out * taps,
            "offset": per_sample,
            "mask": per_sample,
            "weight": pixels,
            "bias": pixels,
        },
        flops=2 * pixels * out_channels * group_in * taps,
        elements=sum(math.prod(shape) for shape in shapes.values() if shape) + pixels * out_channels,
        tags=frozenset(tags.split()),
    )


def _layer(batch: int, channels: int, size: int, why: str, tags: str, suffix: str = "", **changes: Any) -> Case:
    sizes = {"in_channels": channels, "height": size, "width": size, "out_channels": channels, **changes}
    return deform_conv2d_case(f"{batch}x{channels}x{size}x{size}{suffix}", why, batch=batch, tags=tags, **sizes)


CASES: list[Case] = [
    deform_conv2d_case("plain", "every argument present, sizes that differ from each other"),
    deform_conv2d_case("v1", "no mask and no bias: their pointers are absent", mask=False, bias=False),
    deform_conv2d_case("mask_only", "a mask without a bias", bias=False),
    deform_conv2d_case("bias_only", "a bias without a mask", mask=False),
    deform_conv2d_case("pointwise", "one tap, no border from the kernel", kernel_size=(1, 1), padding=(0, 0)),
    deform_conv2d_case(
        "kernel5", "more taps than a 3x3; the receptive field exceeds the map", kernel_size=(5, 5), padding=(2, 2)
    ),
    deform_conv2d_case("rectangular", "taps row-major, h and w not swapped", kernel_size=(2, 3), padding=(0, 2)),
    deform_conv2d_case("stride2", "the usual downsampling layer, an odd map", stride=(2, 2), height=9),
    deform_conv2d_case(
        "stride_uneven", "stride, padding and dilation differ between h and w", stride=(2, 1), padding=(2, 0)
    ),
    deform_conv2d_case("dilated", "dilation differs between h and w", dilation=(2, 3), padding=(2, 3)),
    deform_conv2d_case("no_padding", "the output is smaller than the input", padding=(0, 0)),
    deform_conv2d_case("wide_padding", "taps that start far outside the image", padding=(3, 4), spread=1.0),
    deform_conv2d_case("groups2", "two groups, odd output channels per group", groups=2, out_channels=6),
    deform_conv2d_case("groups4", "a group of one output channel", groups=4, in_channels=8, out_channels=4),
    deform_conv2d_case(
        "depthwise", "groups = in_channels takes its own kernel", groups=5, in_channels=5, out_channels=5
    ),
    deform_conv2d_case(
        "depthwise_multiplier", "three outputs per channel", groups=3, in_channels=3, out_channels=9, mask=False
    ),
    deform_conv2d_case("offset_groups2", "two offset groups under one conv group", offset_groups=2),
    deform_conv2d_case("offset_groups4", "one channel per offset group", offset_groups=4, mask=False),
    deform_conv2d_case(
        "crossed_groups",
        "offset groups cut across conv groups",
        in_channels=12,
        groups=2,
        offset_groups=3,
        out_channels=4,
    ),
    deform_conv2d_case(
        "finer_groups",
        "several conv groups share one offset group",
        in_channels=8,
        groups=4,
        offset_groups=2,
        out_channels=8,
    ),
    deform_conv2d_case("single_pixel", "a 1x1 map, where both layouts coincide", height=1, width=1),
    deform_conv2d_case("single_channel", "one channel, where both layouts coincide", in_channels=1, out_channels=1),
    deform_conv2d_case("far", "half of the points lie outside", spread=20.0),
    deform_conv2d_case("empty", "an empty batch", batch=0, tags="edge"),
    deform_conv2d_case(
        "batch33", "more images than threads, not a multiple of them", batch=33, height=3, width=3, tags="edge"
    ),
    deform_conv2d_case(
        "channels17", "one channel beyond a 16-lane vector", in_channels=17, out_channels=33, tags="edge"
    ),
    deform_conv2d_case(
        "channels3",
        "an RGB stem at stride 2",
        in_channels=3,
        out_channels=16,
        height=15,
        width=17,
        stride=(2, 2),
        tags="edge",
    ),
    deform_conv2d_case(
        "channels48", "three full vectors, out_channels no multiple of 16", in_channels=48, out_channels=40, tags="edge"
    ),
    deform_conv2d_case(
        "channels65", "one channel beyond four vectors", in_channels=65, out_channels=5, height=5, width=5, tags="edge"
    ),
    deform_conv2d_case(
        "depthwise64", "depthwise over full vectors", in_channels=64, out_channels=64, groups=64, tags="edge"
    ),
    deform_conv2d_case(
        "groups8",
        "ResNeXt-like groups of 16 channels",
        in_channels=128,
        out_channels=128,
        groups=8,
        offset_groups=2,
        tags="edge",
    ),
    deform_conv2d_case(
        "map63",
        "an odd map of many tiles, with a remainder",
        batch=1,
        in_channels=16,
        out_channels=16,
        height=63,
        width=63,
        tags="edge",
    ),
    deform_conv2d_case(
        "row", "a map of one long row", height=1, width=63, in_channels=16, out_channels=16, tags="edge"
    ),
    _layer(1, 64, 56, "ResNet conv2, one image: latency of a single view", "real bench"),
    _layer(8, 64, 28, "many images of few pixels", "real bench"),
    _layer(1, 256, 28, "one image, the weight exceeds the L2 cache", "real bench"),
    _layer(8, 128, 28, "ResNet conv3 at a small batch", "bench"),
    _layer(16, 256, 14, "ResNet conv4 at a training batch", "bench"),
    _layer(1, 512, 14, "a deep layer at batch 1", "full"),
    _layer(1, 96, 63, "channels that are no power of two, an odd map", "full"),
    _layer(8, 256, 14, "sampling outweighs the product", "full", "_k1", kernel_size=(1, 1), padding=(0, 0)),
    _layer(8, 64, 28, "25 taps", "full", "_k5", kernel_size=(5, 5), padding=(2, 2)),
    _layer(8, 128, 56, "the downsampling layer of ResNet conv3", "full", "_s2", stride=(2, 2)),
    _layer(8, 128, 28, "ResNeXt-like groups of 16 channels", "full", "_g8", groups=8),
    _layer(8, 128, 28, "a sampling grid for each quarter of the channels", "full", "_og4", offset_groups=4),
    _layer(8, 256, 28, "depthwise: no product to hide the sampling behind", "full", "_dw", groups=256),
    _layer(8, 128, 28, "the first version: no mask and no bias", "full", "_v1", mask=False, bias=False),
    _layer(32, 64, 56, "its im2col buffer takes 231 MB in float32: scratch is measured against that", "memory"),
]

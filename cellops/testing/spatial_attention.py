"""The cases of `spatial_attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cellops.reference.spatial_attention import spatial_attention
from cellops.testing._case import Case, draw_normal, maker


def spatial_attention_case(
    name: str,
    why: str,
    *,
    mode: str = "conv",
    batch: int = 2,
    channels: int = 6,
    height: int = 5,
    width: int = 4,
    kernel: int = 1,
    bias: bool = True,
    tags: str = "small",
) -> Case:
    """A case of `spatial_attention`."""
    sources = channels if mode == "conv" else 2
    pixels, taps = height * width, sources * kernel**2
    terms = (
        channels * kernel**2
    )  # a pixel's logit, or its gradient's way back, with a sum over the channels in each tap
    shapes: dict[str, tuple[int, ...] | None] = {
        "input": (batch, channels, height, width),
        "weight": (1, sources, kernel, kernel),
        "bias": (1,) if bias else None,
    }
    return Case(
        op="spatial_attention",
        name=name,
        why=why,
        sizes={"batch": batch, "channels": channels, "height": height, "width": width, "kernel": kernel, "mode": mode},
        make=maker(shapes, {"mode": mode}, _draw),
        reference=spatial_attention,
        terms={"output": terms, "input": terms, **dict.fromkeys(("weight", "bias"), batch * pixels * channels)},
        flops=batch * pixels * (2 * taps + 2 * channels),
        elements=2 * batch * channels * pixels + taps + bias,
        tags=frozenset(tags.split()),
    )


def _draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights as a layer starts with, so that logits are about 1."""
    drawn = draw_normal(key, shape, generator)
    return drawn / math.sqrt(math.prod(shape)) if key == "weight" else drawn


CASES: list[Case] = [
    spatial_attention_case("spatial_basic", "one pixel, the default of the lung network"),
    spatial_attention_case("spatial_no_bias", "absent bias", bias=False),
    spatial_attention_case("spatial_conv3", "neighbours, each from all channels", kernel=3),
    spatial_attention_case("spatial_conv5_low", "a kernel higher than the map", kernel=5, height=2, width=7),
    spatial_attention_case("spatial_pool3", "maximum and mean", mode="pool", kernel=3),
    spatial_attention_case("spatial_pool7", "CBAM's kernel, larger than the map", mode="pool", kernel=7, bias=False),
    spatial_attention_case("spatial_pool1", "maximum and mean without neighbours", mode="pool", width=9),
    spatial_attention_case("spatial_channel", "one channel, its own maximum", mode="pool", channels=1, kernel=3),
    spatial_attention_case("spatial_pixel", "a 1x1 map, where both layouts coincide", height=1, width=1, kernel=3),
    spatial_attention_case("spatial_empty", "an empty batch", mode="pool", batch=0, kernel=7, tags="edge"),
    spatial_attention_case(
        "spatial_batch33",
        "more images than threads, the last one shared",
        mode="pool",
        batch=33,
        channels=17,
        height=3,
        width=33,
        kernel=7,
        tags="edge",
    ),
    spatial_attention_case(
        "spatial_image", "one image for all threads", batch=1, channels=65, height=63, width=33, tags="edge"
    ),
    spatial_attention_case(
        "spatial_image_conv3",
        "threads that are neighbours",
        batch=1,
        channels=65,
        height=63,
        width=33,
        kernel=3,
        tags="edge",
    ),
    spatial_attention_case(
        "spatial_image_pool7",
        "threads with fewer rows than the kernel",
        mode="pool",
        batch=1,
        channels=65,
        height=13,
        width=63,
        kernel=7,
        tags="edge",
    ),
    spatial_attention_case(
        "spatial_bands_conv3",
        "many bands of rows, whole images",
        batch=3,
        channels=320,
        height=19,
        width=63,
        kernel=3,
        tags="edge",
    ),
    spatial_attention_case(
        "spatial_bands_pool7",
        "bands of fewer rows than half a kernel",
        mode="pool",
        batch=3,
        channels=400,
        height=19,
        width=120,
        kernel=7,
        tags="edge",
    ),
    spatial_attention_case(
        "spatial_3x32x240x320",
        "stores past the caches, the last image shared",
        batch=3,
        channels=32,
        height=240,
        width=320,
        tags="real",
    ),
    spatial_attention_case(
        "spatial_pool_3x32x239x336",
        "the same with neighbours, and bands that end within a line of the cache",
        mode="pool",
        batch=3,
        channels=32,
        height=239,
        width=336,
        kernel=5,
        tags="real",
    ),
    spatial_attention_case(
        "spatial_pool1_5x64x120x120",
        "the same with a kernel of one pixel",
        mode="pool",
        batch=5,
        channels=64,
        height=120,
        width=120,
        tags="real",
    ),
    spatial_attention_case(
        "spatial_16x128x56x56",
        "the lung network's second stage, the layer of the targets",
        batch=16,
        channels=128,
        height=56,
        width=56,
        tags="real bench",
    ),
    spatial_attention_case(
        "spatial_pool_16x128x56x56",
        "CBAM at the same size",
        mode="pool",
        batch=16,
        channels=128,
        height=56,
        width=56,
        kernel=7,
        tags="real bench",
    ),
]

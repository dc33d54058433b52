"""The cases of `eca`."""

from __future__ import annotations

from cellops.reference.eca import eca
from cellops.testing._attention import attention_case
from cellops.testing._case import Case


def eca_case(
    name: str,
    why: str,
    *,
    batch: int = 2,
    channels: int = 6,
    height: int = 5,
    width: int = 4,
    kernel: int = 3,
    tags: str = "small",
) -> Case:
    """A case of `eca`."""
    return attention_case(
        "eca",
        eca,
        name,
        why,
        {"batch": batch, "channels": channels, "height": height, "width": width, "kernel": kernel},
        {"weight": (1, 1, kernel)},
        {},
        2 * channels * kernel,
        tags,
    )


CASES: list[Case] = [
    eca_case("eca_basic", "three taps"),
    eca_case("eca_wide", "more taps than channels on either side", channels=2, kernel=7),
    eca_case("eca_single", "one tap", kernel=1),
    eca_case("eca_pixel", "a 1x1 map, where both layouts coincide", height=1, width=1),
    eca_case("eca_empty", "an empty batch", batch=0, tags="edge"),
    eca_case("eca_batch33", "more images than threads", batch=33, channels=17, height=3, tags="edge"),
    eca_case(
        "eca_image", "one image for all threads", batch=1, channels=65, height=63, width=33, kernel=5, tags="edge"
    ),
    eca_case(
        "eca_16x128x56x56",
        "ECA-ResNet conv3, the layer of the targets",
        batch=16,
        channels=128,
        height=56,
        width=56,
        kernel=5,
        tags="real bench",
    ),
]

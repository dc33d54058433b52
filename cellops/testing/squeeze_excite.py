"""The cases of `squeeze_excite`."""

from __future__ import annotations

from cellops.reference.squeeze_excite import squeeze_excite
from cellops.testing._attention import attention_case
from cellops.testing._case import Case


def squeeze_excite_case(
    name: str,
    why: str,
    *,
    batch: int = 2,
    channels: int = 6,
    height: int = 5,
    width: int = 4,
    hidden: int = 3,
    bias: bool = True,
    act: str = "relu",
    gate: str = "sigmoid",
    tags: str = "small",
) -> Case:
    """A case of `squeeze_excite`."""
    return attention_case(
        "squeeze_excite",
        squeeze_excite,
        name,
        why,
        {"batch": batch, "channels": channels, "height": height, "width": width, "hidden": hidden},
        {
            "weight1": (hidden, channels, 1, 1),
            "bias1": (hidden,) if bias else None,
            "weight2": (channels, hidden, 1, 1),
            "bias2": (channels,) if bias else None,
        },
        {"act": act, "gate": gate},
        4 * channels * hidden,
        tags,
    )


CASES: list[Case] = [
    squeeze_excite_case("se_basic", "both biases, an odd number of hidden channels"),
    squeeze_excite_case("se_no_bias", "absent biases", bias=False),
    squeeze_excite_case("se_silu", "EfficientNet's activation", act="silu"),
    squeeze_excite_case("se_hard", "MobileNetV3's gate", gate="hard_sigmoid"),
    squeeze_excite_case("se_pixel", "a 1x1 map, where both layouts coincide", height=1, width=1),
    squeeze_excite_case("se_channel", "one channel, one hidden", channels=1, hidden=1),
    squeeze_excite_case("se_empty", "an empty batch", batch=0, tags="edge"),
    squeeze_excite_case(
        "se_batch33", "more images than threads, not a multiple of them", batch=33, channels=17, height=3, tags="edge"
    ),
    squeeze_excite_case(
        "se_image", "one image for all threads", batch=1, channels=65, height=63, width=33, tags="edge"
    ),
    squeeze_excite_case(
        "se_16x128x56x56",
        "SE-ResNet conv3, the layer of the targets",
        batch=16,
        channels=128,
        height=56,
        width=56,
        hidden=8,
        tags="real bench",
    ),
]

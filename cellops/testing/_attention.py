"""What the cases of the attention ops share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cellops.testing._case import Case, draw_normal, maker


def attention_case(
    op: str,
    reference: Callable[..., Tensor],
    name: str,
    why: str,
    sizes: dict[str, int],
    weights: dict[str, tuple[int, ...] | None],
    settings: dict[str, Any],
    flops_of_image: int,
    tags: str,
) -> Case:
    """A case of an op that scales an image's channels by factors drawn from its means."""
    batch, channels, height, width = (sizes[key] for key in ("batch", "channels", "height", "width"))
    image, pixels = channels * height * width, height * width
    shapes: dict[str, tuple[int, ...] | None] = {"input": (batch, channels, height, width), **weights}

    return Case(
        op=op,
        name=name,
        why=why,
        sizes=sizes,
        make=maker(shapes, settings, draw_normal),
        reference=reference,
        terms={"output": pixels, "input": pixels, **dict.fromkeys(weights, batch * pixels)},
        flops=batch * (2 * image + flops_of_image),
        elements=2 * batch * image + sum(math.prod(shape) for shape in weights.values() if shape),
        tags=frozenset(tags.split()),
    )

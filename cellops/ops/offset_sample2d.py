"""Every channel sampled at its own offsets: y[n, c, h, w] = x[n, c] at (h + dy, w + dx), clamped.   The layer of HQNet.

A plane is staged in a thread's scratch, sampled and, in backward, scattered to by that thread alone. Saved for
backward: the arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cellops import _native
from cellops.ops._operator import Operator
from cellops.ops._operator_arguments import Call
from cellops.ops._registration import expect
from cellops.reference import offset_sample2d as reference


def offset_sample2d(input: Tensor, offset: Tensor, layout: str = "planar", *, backend: str | None = None) -> Tensor:
    """Sample every channel bilinearly at its own offsets, as deformable networks with a `ConvOffset2d` do.

    Values and derivatives are those of `grid_sample(mode="bilinear", padding_mode="border", align_corners=True)`:
    points are clamped to the image, infinite ones too; an offset has its right derivative inside the image, and none
    where its point is clamped or exactly at a bound. A NaN offset gives a NaN sample and adds nothing to the gradients.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        offset: [N, 2C, H, W] in pixels, in either memory format; the input's dtype, or float32 beside a half type.
        layout: "planar": channels 2c and 2c + 1 are dy and dx of channel c. "interleaved": the tensor in NCHW order is
            seen as [N * C, H, W, 2], for weights of networks that do so without a permute.
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, C, H, W] of the input's dtype.

    Raises:
        ValueError: a shape, `layout` or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    return _operator(input, offset, layout, backend)


def check_layout(layout: str) -> None:
    """Raise ValueError for an unknown layout."""
    if layout not in reference.LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, reference.LAYOUTS))}, got {layout!r}")


def _check(call: Call) -> tuple[int, ...]:
    input, offset = call.shapes
    assert input is not None and offset is not None
    check_layout(call.settings[0])
    batch, channels, height, width = input
    expect("offset", offset, (batch, 2 * channels, height, width))
    return tuple(input)


def _params(call: Call, **common: Any) -> Any:
    (batch, channels, height, width), _ = call.shapes
    interleaved = call.settings[0] == "interleaved"
    return _native.library().OffsetSample2dParams(
        batch=batch, channels=channels, height=height, width=width, interleaved=interleaved, **common
    )


def _refuses(call: Call) -> str | None:
    _, _, height, width = call.shapes[0]
    return "an image has about 2^31 pixels or more" if (height + 1) * (width + 8) >= 2**31 else None


_operator = Operator(
    "offset_sample2d",
    "input offset+=~",
    "str layout",
    check=_check,
    params=_params,
    formula=reference.offset_sample2d,
    formula_of_backward=reference.offset_sample2d_backward,
    refuses=_refuses,
)

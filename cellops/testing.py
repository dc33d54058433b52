"""One table of op cases that tests and benchmarks share, and the tolerances a backend is held to.

for case in cases("deform_conv2d", "bench"):
    arguments = case.make(torch.bfloat16, memory_format=torch.channels_last)
    output = case.function(**arguments)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cellops.reference import deform_conv2d as _deform_conv2d_reference
from cellops.reference import eca as _eca_reference
from cellops.reference import squeeze_excite as _squeeze_excite_reference

Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an op: its arguments, what is right, and what it costs.

    Attributes:
        op: name of the public function, `cellops.<op>`.
        name: unique within the op.
        why: what this case is there to catch, or where its sizes come from.
        sizes: the numbers that make up the case (batch, in_channels, height, ...), for peers and reports.
        make: `make(dtype=torch.float32, device="cpu", memory_format=torch.contiguous_format, seed=0)` draws the keyword
            arguments of one call; every 4-D tensor has the memory format.
        reference: the oracle, called with the same keyword arguments.
        terms: products summed per element of the "output" and of the gradient to each tensor argument.
        flops: multiplications and additions of one forward call.
        elements: elements of all tensors that a forward call must read or write once.
        tags: "small" (every dtype and layout, second order), "edge" (every dtype and layout), "real" (a real layer's
            size, float32 only), "bench" (timed), "full" (timed by `--full` only), "memory" (its scratch is measured).
    """

    op: str
    name: str
    why: str
    sizes: Mapping[str, Any]
    make: Callable[..., Arguments]
    reference: Callable[..., Tensor]
    terms: Mapping[str, int]
    flops: int
    elements: int
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def function(self) -> Callable[..., Tensor]:
        """The public function, which takes `backend=` besides the case's arguments."""
        return getattr(importlib.import_module("cellops"), self.op)

    def bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """The least that a forward call moves: each tensor once."""
        return self.elements * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def cases(op: str | None = None, *tags: str) -> list[Case]:
    """The cases of an op (None: of every op) that have at least one of the tags (none given: all cases)."""
    return [case for case in CASES if op in (None, case.op) and (not tags or case.tags.intersection(tags))]


def off_grid(size: tuple[int, ...], spread: float, generator: torch.Generator) -> Tensor:
    """Normal offsets of the given spread in float64 whose fractions keep 0.1 away from the integer grid.

    There the bilinear sample has a kink: float32 and float64 may take different sides, and finite differences fail.
    """
    drawn = torch.randn(size, generator=generator, dtype=torch.float64) * spread
    return drawn.floor() + 0.1 + 0.8 * (drawn - drawn.floor())


def _draw_normal(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _maker(
    shapes: Mapping[str, tuple[int, ...] | None],
    settings: Arguments,
    draw: Callable[[str, tuple[int, ...], torch.Generator], Tensor],
) -> Callable[..., Arguments]:
    """`Case.make` for tensors of these shapes, None for an absent one, drawn in their order in float64."""

    def make(
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        arguments: Arguments = dict(settings)
        for key, shape in shapes.items():
            if shape is None:
                arguments[key] = None
                continue
            tensor = draw(key, shape, generator)
            layout = memory_format if tensor.dim() == 4 else torch.contiguous_format
            arguments[key] = tensor.to(device, dtype).contiguous(memory_format=layout)
        return arguments

    return make


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
        make=_maker(shapes, {"stride": stride, "padding": padding, "dilation": dilation}, draw),
        reference=_deform_conv2d_reference.deform_conv2d,
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


def _attention_case(
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
        make=_maker(shapes, settings, _draw_normal),
        reference=reference,
        terms={"output": pixels, "input": pixels, **dict.fromkeys(weights, batch * pixels)},
        flops=batch * (2 * image + flops_of_image),
        elements=2 * batch * image + sum(math.prod(shape) for shape in weights.values() if shape),
        tags=frozenset(tags.split()),
    )


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
    return _attention_case(
        "squeeze_excite",
        _squeeze_excite_reference.squeeze_excite,
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
    return _attention_case(
        "eca",
        _eca_reference.eca,
        name,
        why,
        {"batch": batch, "channels": channels, "height": height, "width": width, "kernel": kernel},
        {"weight": (1, 1, kernel)},
        {},
        2 * channels * kernel,
        tags,
    )


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
"""Every case of every op. `small` cases stay off the integer grid, so that finite differences hold."""

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {torch.float32: (1e-4, 1e-5), torch.float64: (1e-9, 1e-10)}
"""Per dtype: rtol, and atol of a sum of one term; atol grows with sqrt(terms). Half types are held to eager's error."""

HALF_ERROR_RATIO = 2.0
"""A half type's largest error may be this many times that of the eager reference at the same dtype."""


def assert_close_to_reference(
    actual: Tensor, expected: Tensor, *, terms: int, eager: Tensor | None = None, what: str = "output"
) -> None:
    """Hold a result to the tolerance of its dtype.

    Args:
        actual: what a backend returned, float32, float64 or a half type.
        expected: the float64 reference on the same values.
        terms: products summed per element (`Case.terms`).
        eager: for half types, what the eager reference returns at that dtype; its largest error is the measure. To
            twice that comes half a unit in the last place of the largest expected value: a correctly rounded result
            always passes, also where eager is exact by luck, as it may be on a few elements.
        what: the tensor's name in the message.

    Raises:
        AssertionError: shape or a value is off.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    found, wanted = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.dtype in TOLERANCES:
        rtol, atol = TOLERANCES[actual.dtype]
        torch.testing.assert_close(
            found,
            wanted,
            rtol=rtol,
            atol=atol * max(terms, 1) ** 0.5,
            equal_nan=True,
            msg=lambda text: f"{what}: {text}",
        )
        return
    assert eager is not None, f"{what}: {actual.dtype} needs eager's result to compare with"
    assert torch.equal(found.isnan(), wanted.isnan()), f"{what}: NaN in other places than the reference"
    if found.numel() == 0:
        return
    error, eager_error = (
        (value - wanted).nan_to_num(0.0).abs().max() for value in (found, eager.detach().double().cpu())
    )
    half_unit = torch.finfo(actual.dtype).eps / 2 * wanted.nan_to_num(0.0).abs().max()
    limit = HALF_ERROR_RATIO * eager_error + half_unit
    assert error <= limit, f"{what}: largest error {error:.3e}, eager's is {eager_error:.3e}, the limit {limit:.3e}"


def forward_and_gradients(
    function: Callable[..., Tensor],
    arguments: Arguments,
    grad_output: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Run a call and its backward: "output" and, under its argument's name, the gradient to each floating-point tensor.

    Args:
        function: called with `arguments` as keywords.
        arguments: its tensors are detached and required to have a gradient.
        grad_output: gradient of the output, converted to its dtype and layout; None draws one from a fixed seed.
        grad_dtype: what the drawn one is rounded to first, so that a wider oracle sees the same values.
    """
    leaves = {key: value.detach().requires_grad_() for key, value in arguments.items() if isinstance(value, Tensor)}
    output = function(**{**arguments, **leaves})
    if grad_output is None:
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grad_output = grad_output.to(grad_dtype or output.dtype)
    gradients = torch.autograd.grad(output, list(leaves.values()), torch.empty_like(output).copy_(grad_output))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def to_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The same call with every tensor converted, its layout kept."""
    return {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in arguments.items()}

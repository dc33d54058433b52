"""Every op on drawn shapes, layouts, dtypes and special values, the compiled kernels against the reference.

pytest tests/test_fuzz.py --fuzz 2000    # so many examples of each op; the default is a handful
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from cellops import _backend, _native
from cellops.testing import Case, assert_close_to_reference, forward_and_gradients, to_dtype
from cellops.testing.deform_conv2d import deform_conv2d_case
from cellops.testing.depthwise_conv2d import depthwise_conv2d_case
from cellops.testing.eca import eca_case
from cellops.testing.frelu import frelu_case
from cellops.testing.group_conv1x1 import group_conv1x1_case
from cellops.testing.offset_sample2d import offset_sample2d_case
from cellops.testing.spatial_attention import spatial_attention_case
from cellops.testing.squeeze_excite import squeeze_excite_case

pytestmark = pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "every second", "a slice"]
SPECIAL = [float("nan"), float("inf"), -float("inf")]

batch, channels, size = st.integers(0, 5), st.integers(1, 40), st.integers(1, 20)
image = {"batch": batch, "channels": channels, "height": size, "width": size}
odd = st.sampled_from([1, 3, 5, 7])
pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def deform_conv2d_sizes(draw: Any) -> dict[str, Any]:
    groups, offset_groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    kernel, stride, dilation = draw(pair), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    height, width = (
        max(draw(size), dilate * (taps - 1) + 1 - 2 * pad)
        for dilate, taps, pad in zip(dilation, kernel, padding, strict=True)
    )
    return {
        "batch": draw(st.integers(0, 3)),
        "in_channels": groups * offset_groups * draw(st.integers(1, 6)),
        "out_channels": groups * draw(st.integers(1, 12)),
        "height": height,
        "width": width,
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "offset_groups": offset_groups,
        "mask": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "spread": draw(st.sampled_from([0.5, 3.0, 30.0])),
    }


@st.composite
def group_conv1x1_sizes(draw: Any, least_batch: int, activations: list[str]) -> dict[str, Any]:
    groups, of_group = draw(st.integers(1, 4)), st.sampled_from([1, 2, 3, 5, 8, 11, 16, 32, 48])
    return {
        "batch": draw(st.integers(least_batch, 5)),
        "in_channels": groups * draw(of_group),
        "out_channels": groups * draw(of_group),
        "height": draw(size),
        "width": draw(size),
        "groups": groups,
        "activation": draw(st.sampled_from(activations)),
        "shuffle": draw(st.booleans()),
        "affine": draw(st.booleans()),
    }


ACTIVATIONS = ["none", "relu", "relu6", "gelu", "silu", "hardswish"]
SMOOTH_ACTIVATIONS = ["none", "gelu", "silu"]

window = {
    "batch": st.integers(2, 5),
    "channels": channels,
    "height": st.integers(2, 20),
    "width": st.integers(2, 20),
    "kernel": st.sampled_from([3, 5, 7]),
    "affine": st.booleans(),
}
"""Of a depthwise convolution that is normalised: where one weight alone lay inside, its gradient would be rounding."""


FUZZED: dict[str, tuple[Callable[..., Case], st.SearchStrategy[dict[str, Any]]]] = {
    "deform_conv2d": (deform_conv2d_case, deform_conv2d_sizes()),
    "offset_sample2d": (
        offset_sample2d_case,
        st.fixed_dictionaries(
            {
                **image,
                "layout": st.sampled_from(["planar", "interleaved"]),
                "spread": st.sampled_from([0.5, 3.0, 30.0]),
            }
        ),
    ),
    "frelu": (frelu_case, st.fixed_dictionaries({**image, "kernel": odd, "affine": st.booleans()})),
    "frelu_batch_norm": (
        functools.partial(frelu_case, batch_norm=True),
        st.fixed_dictionaries(window),
    ),
    "depthwise_conv2d": (
        depthwise_conv2d_case,
        st.fixed_dictionaries(
            {**image, "kernel": odd, "affine": st.booleans(), "activation": st.sampled_from(ACTIVATIONS)}
        ),
    ),
    "depthwise_conv2d_batch_norm": (
        functools.partial(depthwise_conv2d_case, batch_norm=True),
        st.fixed_dictionaries({**window, "activation": st.sampled_from(SMOOTH_ACTIVATIONS)}),
    ),
    "squeeze_excite": (
        squeeze_excite_case,
        st.fixed_dictionaries(
            {
                **image,
                "hidden": st.integers(1, 20),
                "bias": st.booleans(),
                "act": st.sampled_from(["relu", "silu"]),
                "gate": st.sampled_from(["sigmoid", "hard_sigmoid"]),
            }
        ),
    ),
    "eca": (eca_case, st.fixed_dictionaries({**image, "kernel": odd})),
    "group_conv1x1": (
        group_conv1x1_case,
        group_conv1x1_sizes(0, ACTIVATIONS),
    ),
    "group_conv1x1_batch_norm": (
        functools.partial(group_conv1x1_case, batch_norm=True),
        group_conv1x1_sizes(2, SMOOTH_ACTIVATIONS),
    ),
    "spatial_attention": (
        spatial_attention_case,
        st.fixed_dictionaries(
            {**image, "kernel": odd, "bias": st.booleans(), "mode": st.sampled_from(["conv", "pool"])}
        ),
    ),
}
"""For each op what makes a case of it, and what to draw for that."""


def test_every_op_is_fuzzed() -> None:
    assert set(FUZZED) == set(_backend.OPS)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "every second":
        spread = tensor.new_full([2 * length for length in tensor.shape], torch.nan)
        return spread[tuple(slice(None, None, 2) for _ in tensor.shape)].copy_(tensor)
    if layout == "a slice":
        wider = tensor.new_full([length + 1 for length in tensor.shape], torch.nan)
        return wider[tuple(slice(1, None) for _ in tensor.shape)].copy_(tensor)
    return tensor


def rounded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Multiples of 1/16: where an op only adds and multiplies them, every type finds the same kinks and ties.

    Offsets stay as they are drawn, off the grid.
    """
    return {
        name: (value * 16).round() / 16 if isinstance(value, Tensor) and name != "offset" else value
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("op", list(FUZZED))
def test_agrees_with_the_reference(op: str, fuzz_examples: int, device: torch.device) -> None:
    make_case, sizes = FUZZED[op]

    @seed(0)
    @settings(max_examples=fuzz_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(sizes=sizes, dtype=st.sampled_from(DTYPES), data=st.data())
    def check(sizes: dict[str, Any], dtype: torch.dtype, data: Any) -> None:
        case = make_case("fuzzed", "drawn by hypothesis", **sizes)
        arguments = case.make(dtype, device, seed=data.draw(st.integers(0, 999), label="seed"))
        if not op.endswith("_batch_norm"):
            arguments = rounded(arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = laid_out(value, data.draw(st.sampled_from(LAYOUTS), label=f"layout of {name}"))
        special = data.draw(st.sampled_from([None, *SPECIAL]), label="special value")
        if special is not None and arguments["input"].numel():
            poisoned = data.draw(st.sampled_from(["input", "offset"] if "offset" in arguments else ["input"]))
            at = data.draw(st.integers(0, arguments[poisoned].numel() - 1), label=f"its place in {poisoned}")
            index = torch.unravel_index(torch.tensor(at), arguments[poisoned].shape)
            arguments[poisoned][index] = special
        compare(case, arguments, dtype, special)

    check()


def compare(case: Case, arguments: dict[str, Any], dtype: torch.dtype, special: float | None) -> None:
    """Output and gradients beside the float64 reference.

    Where a value is not finite, its own type is asked which results are, by autograd and by the formula of the
    gradients. Whether padding is multiplied by it is left open: they differ, and a kernel may find zero where both do.
    """
    backend = "cpu" if arguments["input"].device.type == "cpu" else None
    found = forward_and_gradients(functools.partial(case.function, backend=backend), arguments)
    eager = forward_and_gradients(case.reference, arguments)
    formula = forward_and_gradients(functools.partial(case.function, backend="reference"), arguments)
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64), grad_dtype=dtype)
    for name, tensor in found.items():
        expected, measure = wanted[name], eager[name]
        if special is not None:
            finite, one, other = (value.isfinite() for value in (tensor, eager[name], formula[name]))
            assert not (finite & ~one & ~other & (tensor != 0)).any(), f"{name}: finite where it should not be"
            assert not (~finite & one & other).any(), f"{name}: not finite where it should be"
            finite &= expected.isfinite() & one
            tensor, expected, measure = (value.where(finite, 0) for value in (tensor, expected, measure))
        measure = measure if tensor.dtype.itemsize == 2 else None
        assert_close_to_reference(tensor, expected, terms=case.terms[name], eager=measure, what=name)

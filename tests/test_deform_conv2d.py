"""Deformable convolution: known values, kinks, offsets that are no numbers, errors; other libraries as oracles."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cellops
from cellops import _native
from cellops.testing import Case, assert_close_to_reference, cases, forward_and_gradients, to_dtype
from cellops.testing.deform_conv2d import deform_conv2d_case

BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(_native.error is not None, reason=str(_native.error))),
    "reference",
]
ALL_DTYPES = list(_native.DTYPE_CODES)

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def sample(image: Tensor, y: float, x: float, backend: str) -> tuple[float, float, float, Tensor]:
    """Value at one point of a [H, W] image, its derivatives to y and x, and the gradient to the image."""
    input = image[None, None].clone().requires_grad_()
    points = torch.zeros(1, 2, *image.shape, dtype=image.dtype)
    points[0, :, 0, 0] = torch.tensor([y, x], dtype=image.dtype)
    points.requires_grad_()
    output = cellops.deform_conv2d(input, points, torch.ones(1, 1, 1, 1, dtype=image.dtype), backend=backend)
    output[0, 0, 0, 0].backward()
    return (output[0, 0, 0, 0].item(), *points.grad[0, :, 0, 0].tolist(), input.grad[0, 0])


IMAGE = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("y", "x", "value", "dy", "dx"),
    [
        pytest.param(0.5, 0.25, 5.625, 8.75, 4.5, id="inside"),
        pytest.param(1, 1, 16, 112, 16, id="grid-right-derivative"),
        pytest.param(-0.5, 1, 1, 2, 1, id="above"),
        pytest.param(2.5, 1, 64, -128, 64, id="below"),
        pytest.param(-1, 1, 0, 2, 0, id="top-border"),
        pytest.param(1, -1, 0, 0, 8, id="left-border"),
        pytest.param(2, 1, 128, -128, 128, id="last-row"),
        pytest.param(1, 2, 32, 224, -32, id="last-column"),
        pytest.param(2, 2, 256, -256, -256, id="last-pixel"),
        pytest.param(-1, -1, 0, 0, 0, id="corner"),
        pytest.param(-1, 2, 0, 4, 0, id="top-border-last-column"),
        pytest.param(3, 1, 0, 0, 0, id="bottom-border"),
        pytest.param(1, 3, 0, 0, 0, id="right-border"),
        pytest.param(-1.125, 1, 0, 0, 0, id="outside"),
    ],
)
def test_value_and_right_derivative(
    y: float, x: float, value: float, dy: float, dx: float, backend: str, dtype: torch.dtype
) -> None:
    assert sample(IMAGE.to(dtype), y, x, backend)[:3] == (value, dy, dx)


@each_backend
def test_first_training_step_with_zero_offsets(backend: str) -> None:
    """Zero offsets with padding put whole rows of taps exactly on y = -1 and x = -1."""
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(1, 1, 4, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(1, 1, 3, 3, generator=generator, dtype=torch.float64)
    offset = torch.zeros(1, 18, 4, 5, dtype=torch.float64, requires_grad=True)
    cellops.deform_conv2d(input, offset, weight, padding=1, backend=backend).sum().backward()
    wanted = torch.zeros(3, 3, 2, 4, 5, dtype=torch.float64)
    padded = torch.nn.functional.pad(input[0, 0], (1, 2, 1, 2))
    for i in range(3):
        for j in range(3):
            here = padded[i : i + 4, j : j + 5]
            wanted[i, j, 0] = weight[0, 0, i, j] * (padded[i + 1 : i + 5, j : j + 5] - here)
            wanted[i, j, 1] = weight[0, 0, i, j] * (padded[i : i + 4, j + 1 : j + 6] - here)
    torch.testing.assert_close(offset.grad.view(3, 3, 2, 4, 5), wanted)


@each_backend
@pytest.mark.parametrize("far", [math.inf, -math.inf, 1e30, -1e30, 3e38, -3e38, 2.0**31, -(2.0**31), 2.0**63])
@pytest.mark.parametrize("axis", [0, 1])
def test_far_points_count_as_outside(far: float, axis: int, backend: str) -> None:
    y, x = (far, 1.0) if axis == 0 else (1.0, far)
    value, dy, dx, grad_image = sample(IMAGE, y, x, backend)
    assert (value, dy, dx) == (0, 0, 0)
    assert grad_image.count_nonzero() == 0


@each_backend
@pytest.mark.parametrize(("y", "x"), [(math.nan, 1), (1, math.nan), (math.nan, math.nan), (math.nan, math.inf)])
def test_nan_coordinate_makes_the_sample_nan(y: float, x: float, backend: str) -> None:
    value, dy, dx, grad_image = sample(IMAGE, y, x, backend)
    assert math.isnan(value)
    assert (dy, dx) == (0, 0)
    assert grad_image.count_nonzero() == 0


@each_backend
@pytest.mark.parametrize("grad", [math.inf, math.nan])
def test_points_outside_have_no_gradient_whatever_the_outputs_is(grad: float, backend: str) -> None:
    offset = torch.zeros(1, 2, 1, 4)
    offset[0, 0, 0] = torch.tensor([50.0, -math.inf, math.nan, 0.25])
    tensors = [torch.ones(1, 1, 1, 4), offset, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 4)]
    input, offset, weight, mask = (tensor.requires_grad_() for tensor in tensors)
    output = cellops.deform_conv2d(input, offset, weight, mask=mask, backend=backend)
    output.backward(torch.full_like(output, grad))
    assert offset.grad[..., :3].count_nonzero() == 0 and mask.grad[..., :2].count_nonzero() == 0
    assert input.grad[..., :3].count_nonzero() == 0 and not offset.grad[0, 0, 0, 3].isfinite()


@each_backend
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["plain", "depthwise", "groups2", "channels48"])
def test_no_numbers_among_offsets(name: str, layout: torch.memory_format, dtype: torch.dtype, backend: str) -> None:
    """A few offsets are NaN, infinite or huge; there and elsewhere all is as the float64 reference says."""
    (case,) = (case for case in cases("deform_conv2d") if case.name == name)
    arguments = case.make(dtype, memory_format=layout)
    generator = torch.Generator().manual_seed(5)
    poison = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 65504.0, 0, 0])
    chosen = poison[torch.randint(len(poison), arguments["offset"].shape, generator=generator)].to(dtype)
    hit = torch.rand(arguments["offset"].shape, generator=generator) < 0.02
    arguments["offset"] = torch.where(hit, chosen, arguments["offset"])
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64))
    measure = forward_and_gradients(case.reference, arguments) if dtype.itemsize == 2 else {}
    assert wanted["output"].isnan().any() and not wanted["output"].isnan().all()
    found = forward_and_gradients(functools.partial(case.function, backend=backend), arguments)
    for key, tensor in found.items():
        assert_close_to_reference(tensor, wanted[key], terms=case.terms[key], eager=measure.get(key), what=key)


@each_backend
def test_nan_pixels_stay_where_they_are_sampled(backend: str) -> None:
    """A corner outside the image is 0, not a clamped pixel times 0."""
    image = IMAGE.clone()
    image[0, 0] = math.nan
    assert sample(image, -1.5, 0, backend)[0] == 0
    assert sample(image, 2, 2, backend)[0] == 256
    assert sample(image, 2.5, -0.5, backend)[0] == 16
    assert math.isnan(sample(image, 0.5, 0.5, backend)[0])


@each_backend
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_half_precision_may_keep_float32_offsets(dtype: torch.dtype, backend: str) -> None:
    (case,) = (case for case in cases("deform_conv2d") if case.name == "plain")
    exact = case.make(torch.float64)
    arguments = {**to_dtype(exact, dtype), "offset": exact["offset"].float()}
    if dtype.itemsize != 2:
        if dtype == torch.float64:
            with pytest.raises(TypeError, match=r"offset must be torch\.float64"):
                cellops.deform_conv2d(**arguments, backend=backend)
        return
    found = forward_and_gradients(functools.partial(case.function, backend=backend), arguments)
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64))
    measure = forward_and_gradients(case.reference, arguments)
    assert found["offset"].dtype == torch.float32
    for key in found.keys() - {"offset"}:
        assert_close_to_reference(found[key], wanted[key], terms=case.terms[key], eager=measure[key], what=key)
    error, eager_error = ((value["offset"] - wanted["offset"]).abs().max() for value in (found, measure))
    assert error <= 2 * eager_error


@each_backend
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_zero_offsets_without_mask_are_a_convolution(groups: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, 8, 9, 7, generator=generator, dtype=torch.float64)
    weight = torch.randn(16, 8 // groups, 3, 2, generator=generator, dtype=torch.float64)
    bias = torch.randn(16, generator=generator, dtype=torch.float64)
    geometry: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    wanted = torch.nn.functional.conv2d(input, weight, bias, groups=groups, **geometry)
    offset = torch.zeros(2, 12, *wanted.shape[2:], dtype=torch.float64)
    found = cellops.deform_conv2d(input, offset, weight, bias, **geometry, backend=backend)
    torch.testing.assert_close(found, wanted)


def test_integers_stand_for_pairs() -> None:
    (case,) = (case for case in cases("deform_conv2d") if case.name == "plain")
    arguments = case.make()
    wanted = cellops.deform_conv2d(**arguments)
    arguments |= {"stride": 1, "padding": [1, 1], "dilation": (True, True)}  # torchvision takes bools too
    assert torch.equal(cellops.deform_conv2d(**arguments), wanted)


# Errors


def changed(**changes: Any) -> dict[str, Any]:
    (case,) = (case for case in cases("deform_conv2d") if case.name == "plain")
    arguments = case.make()
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input": lambda t: t[0]}, ValueError, r"input must have 4 dimensions, got 3: shape \(4, 7, 6\)"),
        ({"input": lambda t: t[:, :3]}, ValueError, r"weight .* divides the input's 3 channels, got 4"),
        ({"input": lambda t: t[:1]}, ValueError, r"offset must have shape \(1, 18, 7, 6\), got \(2, 18, 7, 6\)"),
        ({"input": lambda t: t[:, :, :0]}, ValueError, r"input must have at least one .* shape \(2, 4, 0, 6\)"),
        ({"offset": lambda t: t[:, :17]}, ValueError, r"offset must have offset_groups \* 2 \* 9 channels.* got 17"),
        (
            {"offset": lambda t: torch.cat((t, t, t), 1)},
            ValueError,
            "offset_groups a divisor of the input's 4 channels",
        ),
        ({"offset": lambda t: t[:, :, :5]}, ValueError, r"offset must have shape \(2, 18, 7, 6\), got \(2, 18, 5, 6\)"),
        ({"offset": lambda t: t[0]}, ValueError, "offset must have 4 dimensions, got 3"),
        ({"mask": lambda t: t[:, :8]}, ValueError, r"mask must have shape \(2, 9, 7, 6\), got \(2, 8, 7, 6\)"),
        ({"mask": lambda t: t[..., 0]}, ValueError, "mask must have 4 dimensions, got 3"),
        ({"bias": lambda t: t[:3]}, ValueError, r"bias must have shape \(5,\), got \(3,\)"),
        ({"weight": lambda t: t[:, :, 0]}, ValueError, "weight must have 4 dimensions, got 3"),
        ({"weight": lambda t: t[:0]}, ValueError, "weight must have no empty dimension"),
        ({"weight": lambda t: t[:, :2]}, ValueError, "weight must have a multiple of 2 output channels"),
        ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
        ({"padding": (-1, 0)}, ValueError, r"padding must be at least 0, got \(-1, 0\)"),
        ({"dilation": (1, 0)}, ValueError, r"dilation must be at least 1, got \(1, 0\)"),
        ({"stride": (1, 1, 1)}, ValueError, r"stride must be an integer or a pair .*, got \(1, 1, 1\)"),
        ({"stride": (1.0, 1.0)}, ValueError, r"stride must be an integer or a pair .*, got \(1\.0, 1\.0\)"),
        ({"padding": (1, 1.0)}, ValueError, r"padding must be an integer or a pair .*, got \(1, 1\.0\)"),
        ({"dilation": ("1", 1)}, ValueError, r"dilation must be an integer or a pair .*, got \('1', 1\)"),
        ({"dilation": (2**63, 1)}, ValueError, r"dilation must be an integer of 64 bits, got 9223372036854775808"),
        ({"padding": "same"}, ValueError, "padding must be an integer or a pair .*, got 'same'"),
        ({"dilation": 4}, ValueError, "input is too small: 7 x 6 pixels .* give an output of 1 x 0"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
        ({"input": lambda t: t.int()}, TypeError, "input must be one of .*, got torch.int32"),
        ({"input": lambda t: t.half()}, TypeError, "weight must be torch.float16 like the input, got torch.float32"),
        ({"offset": lambda t: t.half()}, TypeError, "offset must be torch.float32 like the input, got torch.float16"),
        ({"mask": lambda t: t.double()}, TypeError, "mask must be torch.float32 like the input, got torch.float64"),
        ({"bias": lambda t: t.double()}, TypeError, "bias must be torch.float32 like the input, got torch.float64"),
        ({"mask": lambda t: t.to("meta")}, RuntimeError, "mask must be on cpu like the input, got meta"),
        ({"input": lambda t: t.to_sparse()}, TypeError, "input must be a dense tensor, got one of layout torch.sparse"),
        ({"weight": lambda t: t.to_mkldnn()}, TypeError, "weight must be a dense tensor, got one of layout torch._mk"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot run deform_conv2d on cpu"),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_errors_name_the_argument(changes: dict[str, Any], error: type, message: str, train: bool) -> None:
    arguments = changed(**changes)
    if train:
        arguments["weight"].requires_grad_()
    with pytest.raises(error, match=message):
        cellops.deform_conv2d(**arguments)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_errors_of_what_is_no_tensor(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=name):
        cellops.deform_conv2d(**changed(**{name: "text"}))


# Other libraries


def draw_case(seed: int, batch: int | None = None) -> Case:
    """A random configuration of small sizes."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    groups, offset_groups = pick(1, 1, 2, 4), pick(1, 1, 2, 3)
    return deform_conv2d_case(
        f"random{seed}",
        "a random configuration",
        batch=pick(1, 2, 3) if batch is None else batch,
        in_channels=math.lcm(groups, offset_groups) * pick(1, 2, 3),
        out_channels=groups * pick(1, 2, 5),
        height=pick(4, 5, 8, 11),
        width=pick(4, 6, 7, 9),
        kernel_size=(pick(1, 2, 3), pick(1, 2, 3, 4)),
        stride=(pick(1, 1, 2, 3), pick(1, 1, 2)),
        padding=(pick(1, 2, 3), pick(2, 3, 4)),
        dilation=(pick(1, 1, 2, 3), pick(1, 1, 2)),
        groups=groups,
        offset_groups=offset_groups,
        mask=pick(0, 1) == 1,
        bias=pick(0, 1) == 1,
        spread=pick(1, 2, 6),
    )


CONFIGURATIONS = [*(draw_case(seed) for seed in range(40)), draw_case(100, batch=0), draw_case(101, batch=33)]


@pytest.mark.parametrize("case", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["dense", "view"])
def test_agrees_with_torchvision(case: Case, view: bool) -> None:
    torchvision = pytest.importorskip("torchvision")
    arguments = case.make(torch.float64)
    wanted = forward_and_gradients(torchvision.ops.deform_conv2d, arguments)
    if view:
        arguments = {
            name: value.transpose(-1, -2).contiguous().transpose(-1, -2)
            if isinstance(value, Tensor) and value.dim() == 4
            else value
            for name, value in arguments.items()
        }
    found = forward_and_gradients(cellops.deform_conv2d, arguments)
    for name, tensor in found.items():
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], what=name)


def test_agrees_with_torchvision_on_the_grid() -> None:
    """Zero and whole offsets, all borders included: the same one-sided derivatives."""
    torchvision = pytest.importorskip("torchvision")
    case = deform_conv2d_case("grid", "integer coordinates", batch=3, padding=(2, 2))
    arguments = case.make(torch.float64)
    arguments["offset"] = arguments["offset"].round()
    arguments["offset"][0] = 0
    wanted = forward_and_gradients(torchvision.ops.deform_conv2d, arguments)
    for name, tensor in forward_and_gradients(cellops.deform_conv2d, arguments).items():
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], what=name)


@pytest.mark.parametrize("case", [case for case in CONFIGURATIONS if case.sizes["batch"]][:16], ids=str)
def test_agrees_with_onnxruntime(case: Case) -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    arguments = case.make()
    found = cellops.deform_conv2d(**arguments)
    feeds = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    order = ("input", "weight", "offset", "bias", "mask")
    pads = [*arguments["padding"], *arguments["padding"]]
    node = onnx.helper.make_node(
        "DeformConv",
        [name if name in feeds else "" for name in order],
        ["output"],
        kernel_shape=list(arguments["weight"].shape[2:]),
        strides=list(arguments["stride"]),
        pads=pads,
        dilations=list(arguments["dilation"]),
        group=case.sizes["groups"],
        offset_group=case.sizes["offset_groups"],
    )
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "deform_conv2d",
        [onnx.helper.make_tensor_value_info(name, kind, list(tensor.shape)) for name, tensor in feeds.items()],
        [onnx.helper.make_tensor_value_info("output", kind, list(found.shape))],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    assert_close_to_reference(found, torch.from_numpy(wanted), terms=2 * case.terms["output"])


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    groups, offset_groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel_size, dilation = draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    least = [max(1, dilation[axis] * (kernel_size[axis] - 1) + 1 - 2 * padding[axis]) for axis in (0, 1)]
    return deform_conv2d_case(
        "drawn",
        "property test",
        batch=draw(st.integers(0, 4)),
        in_channels=math.lcm(groups, offset_groups) * draw(st.integers(1, 20)),
        out_channels=groups * draw(st.integers(1, 20)),
        height=draw(st.integers(least[0], least[0] + 12)),
        width=draw(st.integers(least[1], least[1] + 12)),
        kernel_size=kernel_size,
        stride=draw(pair),
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
        spread=draw(st.sampled_from([0.5, 3.0, 30.0])),
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(any_case(), st.sampled_from([torch.contiguous_format, torch.channels_last]), st.integers(1, 3))
def test_any_shape(case: Case, layout: torch.memory_format, threads: int) -> None:
    torch.set_num_threads(threads)
    arguments = case.make(memory_format=layout)
    wanted = forward_and_gradients(case.reference, to_dtype(arguments, torch.float64))
    for name, tensor in forward_and_gradients(cellops.deform_conv2d, arguments).items():
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], what=name)

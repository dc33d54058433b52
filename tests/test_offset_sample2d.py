"""Values and gradients of `offset_sample2d` where they are easy to get wrong: against `grid_sample`, at whole-numbered
coordinates and bounds, and for offsets that are not finite. And its module."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cellops import ConvOffset2d, _native, offset_sample2d
from cellops.ops._operator import Call
from cellops.ops.offset_sample2d import _operator
from cellops.reference import offset_sample2d as reference
from cellops.testing import assert_close_to_reference, cases, forward_and_gradients

NEEDS_LIBRARY = pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")
BACKENDS = [pytest.param("cpu", marks=NEEDS_LIBRARY), "reference"]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_layout = pytest.mark.parametrize("layout", reference.LAYOUTS)
each_format = pytest.mark.parametrize("memory_format", list(FORMATS.values()), ids=list(FORMATS))


def grid_sample(input: Tensor, offset: Tensor, layout: str) -> Tensor:
    """The same by PyTorch, in float64."""
    batch, channels, height, width = input.shape
    planes = batch * channels
    if layout == "planar":
        pairs = offset.reshape(planes, 2, height, width).permute(0, 2, 3, 1)
    else:
        pairs = offset.reshape(planes, height, width, 2)
    here = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1)
    last = torch.tensor([height - 1, width - 1]).clamp(min=1)
    grid = ((here + pairs) * 2 / last - 1).flip(-1)
    sampled = F.grid_sample(
        input.reshape(planes, 1, height, width), grid, "bilinear", padding_mode="border", align_corners=True
    )
    return sampled.reshape(input.shape)


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], pixels: int) -> None:
    for name, terms in (("output", 4), ("input", 4 * pixels), ("offset", 4)):
        assert_close_to_reference(found[name], wanted[name], terms=terms, what=name)


@each_backend
@each_layout
@each_format
@pytest.mark.parametrize("size", [(4, 4), (3, 9), (17, 2), (14, 14)], ids=str)
def test_equals_grid_sample(
    size: tuple[int, int], memory_format: torch.memory_format, layout: str, backend: str
) -> None:
    input, drawn = torch.randn(2, 5, *size), torch.rand(2, 10, *size) * 0.8 + 0.1
    offset = drawn + torch.randint(-5, 5, drawn.shape)  # off the whole numbers, where float64 may take the other side
    arguments = {"input": input.contiguous(memory_format=memory_format), "offset": offset, "layout": layout}
    wanted = forward_and_gradients(
        grid_sample, {"input": input.double(), "offset": offset.double(), "layout": layout}, grad_dtype=torch.float32
    )
    found = forward_and_gradients(functools.partial(offset_sample2d, backend=backend), arguments)
    compare(found, wanted, size[0] * size[1])


@each_backend
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_whole_numbers_have_the_right_derivative_and_bounds_none(layout: str, backend: str, dtype: torch.dtype) -> None:
    """Offsets of whole numbers: every point on a pixel, at a bound, or clamped onto one.

    A map of 5 x 9 has coordinates that `grid_sample`'s own detour over [-1, 1] keeps exact.
    """
    input = torch.randn(2, 3, 5, 9, dtype=dtype)
    offset = torch.randint(-10, 11, (2, 6, 5, 9)).to(dtype)
    arguments = {"input": input, "offset": offset, "layout": layout}
    found = forward_and_gradients(functools.partial(offset_sample2d, backend=backend), arguments)
    compare(found, forward_and_gradients(grid_sample, arguments), 45)
    shifts = offset.reshape(2, 3, 2, 5, 9) if layout == "planar" else offset.reshape(2, 3, 5, 9, 2).movedim(-1, 2)
    gradient = found["offset"].reshape(2, 3, 2, 5, 9)
    if layout == "interleaved":
        gradient = found["offset"].reshape(2, 3, 5, 9, 2).movedim(-1, 2)
    y, x = shifts[:, :, 0] + torch.arange(5).unsqueeze(1), shifts[:, :, 1] + torch.arange(9)
    assert gradient[:, :, 0][(y <= 0) | (y >= 4)].abs().max() == 0
    assert gradient[:, :, 1][(x <= 0) | (x >= 8)].abs().max() == 0
    assert (gradient[:, :, 0][(y > 0) & (y < 4)] != 0).all()


@each_backend
def test_known_values(backend: str) -> None:
    input = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]).reshape(1, 1, 3, 3)
    call = functools.partial(offset_sample2d, backend=backend)

    def at_center(dy: float, dx: float) -> tuple[float, float, float]:
        offset = torch.zeros(1, 2, 3, 3)
        offset[0, :, 1, 1] = torch.tensor([dy, dx])
        found = forward_and_gradients(call, {"input": input, "offset": offset}, torch.ones(1, 1, 3, 3))
        return found["output"][0, 0, 1, 1].item(), *found["offset"][0, :, 1, 1].tolist()

    assert at_center(0.0, 0.0) == (16, 112, 16)  # derivatives to the right: 128 - 16, 32 - 16
    assert at_center(-1e-3, 0.0)[1] == pytest.approx(14, rel=1e-5)  # and to the left of it 16 - 2
    assert at_center(0.5, 0.5) == (108, 168, 72)
    assert at_center(-0.5, 0.0) == (9, 14, 9)  # x on a pixel: (4 - 2 + 32 - 16) / 2
    assert at_center(1.0, 0.0) == (128, 0, 128)  # y exactly at the last row
    assert at_center(-1.0, 0.0) == (2, 0, 2)  # and at the first
    assert at_center(7.0, -7.0) == (64, 0, 0)  # clamped to a corner
    assert at_center(float("inf"), float("-inf")) == (64, 0, 0)
    assert at_center(-1e30, 1e30) == (4, 0, 0)
    assert at_center(-1e30, 0.5) == (3, 0, 2)  # y clamped, x free


@each_backend
def test_zero_offsets_give_the_input_and_can_learn(backend: str) -> None:
    input, offset = torch.randn(2, 3, 6, 7), torch.zeros(2, 6, 6, 7)
    found = forward_and_gradients(
        functools.partial(offset_sample2d, backend=backend), {"input": input, "offset": offset}, torch.ones_like(input)
    )
    assert torch.equal(found["output"], input)
    assert torch.equal(found["input"], torch.ones_like(input))
    gradient = found["offset"].reshape(2, 3, 2, 6, 7)
    torch.testing.assert_close(gradient[:, :, 0, 1:-1], input.diff(dim=2)[:, :, 1:])
    torch.testing.assert_close(gradient[:, :, 1, :, 1:-1], input.diff(dim=3)[:, :, :, 1:])


@each_backend
@each_layout
@each_format
@pytest.mark.parametrize("dtype", list(_native.DTYPE_CODES), ids=str)
def test_offsets_that_are_not_finite(
    dtype: torch.dtype, memory_format: torch.memory_format, layout: str, backend: str
) -> None:
    """NaN: a NaN sample that owes nothing; infinite and huge ones are clamped. No other point notices."""
    case = next(case for case in cases("offset_sample2d", "edge") if case.name == "offset_batch33")
    arguments = {**case.make(dtype, memory_format=memory_format), "layout": layout}
    pairs = arguments["offset"].clone(memory_format=torch.contiguous_format)
    values = [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, float("nan")]
    view = pairs.view(33, 17, 2, 20).movedim(2, 3) if layout == "planar" else pairs.view(33, 17, 20, 2)
    for step, value in enumerate(values):
        view[:, :, step::13, step % 2] = torch.tensor(value).to(dtype)
    view[:, :, 3] = float("nan")
    arguments["offset"] = pairs.contiguous(memory_format=memory_format)
    found = forward_and_gradients(functools.partial(offset_sample2d, backend=backend), arguments)

    unknown = view.isnan().any(-1).reshape(arguments["input"].shape)
    assert torch.equal(found["output"].isnan(), unknown) and unknown.any() and not unknown.all()
    tame = view.masked_fill(view.isnan(), 0).clamp(-100, 100)
    tame = tame.movedim(3, 2) if layout == "planar" else tame
    grad_output = torch.randn(unknown.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    wanted = forward_and_gradients(
        functools.partial(offset_sample2d, backend=backend),
        {**arguments, "offset": tame.reshape(pairs.shape).contiguous(memory_format=memory_format)},
        grad_output.masked_fill(unknown, 0),
    )
    assert torch.equal(found["output"].masked_fill(unknown, 0), wanted["output"].masked_fill(unknown, 0))
    assert torch.equal(found["input"], wanted["input"])
    assert torch.equal(found["offset"], wanted["offset"])


@each_backend
@each_format
def test_a_corner_outside_the_image_is_no_number_times_zero(memory_format: torch.memory_format, backend: str) -> None:
    """Infinite pixels at the border stay infinite, not NaN."""
    input = torch.full((1, 3, 3, 4), float("inf")).contiguous(memory_format=memory_format)
    offset = torch.full((1, 6, 3, 4), 9.0).contiguous(memory_format=memory_format)
    assert torch.equal(offset_sample2d(input, offset, backend=backend), input)


@NEEDS_LIBRARY
@each_layout
@pytest.mark.parametrize("formats", list(itertools.product(FORMATS, repeat=3)), ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["offset_batch33", "offset_image"])
def test_each_tensor_has_its_own_memory_format(
    name: str, dtype: torch.dtype, formats: tuple[str, str, str], layout: str
) -> None:
    """Only the way through memory differs, and the order in which a pixel's gradient is summed."""
    case = next(case for case in cases("offset_sample2d", "edge") if case.name == name)
    arguments = {**case.make(dtype), "layout": layout}
    call = functools.partial(offset_sample2d, backend="cpu")
    wanted = forward_and_gradients(call, arguments)
    mixed: dict[str, Any] = {
        **arguments,
        **{
            key: arguments[key].contiguous(memory_format=FORMATS[f])
            for key, f in zip(("input", "offset"), formats[:2], strict=True)
        },
    }
    leaves = [mixed[key].requires_grad_() for key in ("input", "offset")]
    output = call(*leaves, layout)
    drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(output, leaves, drawn.contiguous(memory_format=FORMATS[formats[2]]))
    for key, tensor, like in zip(
        ("output", "input", "offset"), (output, *gradients), (leaves[0], *leaves), strict=True
    ):
        rounding = 2 * torch.finfo(dtype).eps if key == "input" else 0
        torch.testing.assert_close(tensor, wanted[key], rtol=rounding, atol=16 * rounding)
        assert tensor.stride() == like.stride(), key


@each_backend
@pytest.mark.parametrize("name", ["input", "offset"])
def test_slices(name: str, backend: str) -> None:
    arguments = {"input": torch.randn(2, 3, 5, 6), "offset": torch.randn(2, 6, 5, 6)}
    wider = torch.full((2, 9, 7, 13), float("nan"))
    view = wider[:, 1 : 1 + arguments[name].shape[1], 1:6, 1::2]
    view.copy_(arguments[name])
    call = functools.partial(offset_sample2d, backend=backend)
    wanted, found = forward_and_gradients(call, arguments), forward_and_gradients(call, {**arguments, name: view})
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=0)


@each_backend
@each_layout
@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_offset_beside_half_inputs(
    dtype: torch.dtype, memory_format: torch.memory_format, layout: str, backend: str
) -> None:
    """Coordinates keep the offset's precision; its gradient is float32."""
    input = torch.randn(3, 17, 9, 20).to(dtype).contiguous(memory_format=memory_format)
    offset = (torch.randn(3, 34, 9, 20) * 2).contiguous(memory_format=memory_format)
    call = functools.partial(offset_sample2d, layout=layout, backend=backend)
    found = forward_and_gradients(call, {"input": input, "offset": offset})
    wide = forward_and_gradients(
        functools.partial(reference.offset_sample2d, layout=layout),
        {"input": input.float(), "offset": offset},
        grad_dtype=dtype,
    )
    assert (found["output"].dtype, found["input"].dtype, found["offset"].dtype) == (dtype, dtype, torch.float32)
    assert found["offset"].stride() == offset.stride()
    torch.testing.assert_close(found["offset"], wide["offset"], rtol=1e-4, atol=1e-4)
    eps = torch.finfo(dtype).eps
    for key in ("output", "input"):
        torch.testing.assert_close(found[key].float(), wide[key], rtol=eps, atol=eps)


@NEEDS_LIBRARY
def test_a_plane_of_more_cells_than_float32_can_number() -> None:
    """Its cells are numbered in integers."""
    input = torch.arange(4100 * 4100).remainder_(1009).float().reshape(1, 1, 4100, 4100)
    assert torch.equal(offset_sample2d(input, torch.zeros(1, 2, 4100, 4100), backend="cpu"), input)


def test_errors() -> None:
    input, offset = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 4, 5)
    with pytest.raises(ValueError, match="layout must be one of 'planar', 'interleaved', got 'pairs'"):
        offset_sample2d(input, offset, "pairs")
    with pytest.raises(ValueError, match=r"offset must have shape \(2, 6, 4, 5\), got \(2, 3, 4, 5\)"):
        offset_sample2d(input, input)
    with pytest.raises(TypeError, match=r"offset must be torch.float32 like the input, got torch.bfloat16"):
        offset_sample2d(input, offset.bfloat16())
    with pytest.raises(TypeError, match=r"offset must be torch.float16 like the input or torch.float32, got torch.bfl"):
        offset_sample2d(input.half(), offset.bfloat16())
    with pytest.raises(ValueError, match="layout must be one of"):
        ConvOffset2d(3, layout="pairs")


@NEEDS_LIBRARY
def test_what_the_kernel_refuses_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plane whose cells 31 bits cannot number, without its gigabytes."""
    assert _operator.refuses(Call(((1, 1, 2**16, 2**15), (1, 2, 2**16, 2**15)), ("planar",)))
    assert _operator.refuses(Call(((9, 9, 2**15, 2**15), (9, 18, 2**15, 2**15)), ("planar",))) is None
    monkeypatch.setattr(_operator, "refuses", lambda call: "too large")
    input, offset = torch.randn(1, 1, 3, 131), torch.randn(1, 2, 3, 131)  # of a shape that no other test plans
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run offset_sample2d .* too large"):
        offset_sample2d(input, offset, backend="cpu")
    assert torch.equal(offset_sample2d(input, offset), reference.offset_sample2d(input, offset))
    _operator._plan.cache_clear()


# The module


@each_layout
def test_module_is_the_convolution_then_the_sampling(layout: str) -> None:
    module = ConvOffset2d(6, layout, init_std=0.3)
    input = torch.randn(2, 6, 7, 8, dtype=torch.float64, requires_grad=True)
    output = module.double()(input)
    wanted = grid_sample(input, F.conv2d(input, module.conv.weight, padding=1), layout)
    torch.testing.assert_close(output, wanted)
    leaves = (input, module.conv.weight)
    grad_output = torch.randn_like(output)
    for one, other in zip(
        torch.autograd.grad(output, leaves, grad_output), torch.autograd.grad(wanted, leaves, grad_output), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_module_starts_close_to_the_identity_and_holds_one_weight() -> None:
    torch.manual_seed(0)
    module = ConvOffset2d(64)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {"conv.weight": (128, 64, 3, 3)}
    assert module.conv.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert ConvOffset2d(8, init_std=0.0).conv.weight.abs().max() == 0
    input = torch.randn(1, 64, 9, 9)
    assert torch.equal(ConvOffset2d(64, init_std=0.0)(input), input)
    assert "layout='planar'" in repr(module)


def test_interleaved_module_loads_a_ports_weights() -> None:
    """A port that views its convolution's output as pairs in the order of memory, and permutes nothing."""
    conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    module = ConvOffset2d(4, layout="interleaved")
    module.load_state_dict({"conv.weight": conv.weight})
    input = torch.randn(2, 4, 6, 5)
    pairs = conv(input).reshape(-1, 6, 5, 2)
    here = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(5), indexing="ij"), -1)
    y, x = (here + pairs).unbind(-1)
    grid = torch.stack((x * 2 / 4 - 1, y * 2 / 5 - 1), -1)
    planes = F.grid_sample(input.reshape(8, 1, 6, 5), grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(module(input), planes.reshape(input.shape), rtol=1e-4, atol=1e-5)


@each_format
@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_module_under_autocast_trains(layout: str, memory_format: torch.memory_format) -> None:
    module = ConvOffset2d(8, layout)
    input = torch.randn(2, 8, 6, 6).contiguous(memory_format=memory_format)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(input)
    assert output.dtype == torch.bfloat16 and output.is_contiguous(memory_format=memory_format)
    output.float().square().sum().backward()
    assert module.conv.weight.grad.abs().sum() > 0

"""The CUDA backend without a GPU: its launchers over the bodies of its kernels, compiled for the CPU.

The bodies, grids and barriers are those of csrc/cuda; tests/cuda_host.h stands in for the device. What a GPU adds, true
parallelism and its own rounding of conversions, is left to the contract tests where there is one.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cellops
from cellops import _backend, _native
from cellops.testing import STATISTICS, Case, assert_close_to_reference, cases, to_dtype
from cellops.testing.deform_conv2d import deform_conv2d_case
from cellops.testing.frelu import frelu_case

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
CUDA_OPS = [op for op, backends in _backend.OPS.items() if "cuda" in backends]
SAMPLING_OPS = [op for op in CUDA_OPS if not op.startswith("frelu")]
"""Their backward adds up by atomics."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MOST_ELEMENTS = 300_000
"""Larger cases are left to a GPU: a thread's turn takes about 0.2 µs here, and one at a barrier 0.5 µs more."""

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Params:
    """Stands in for a Params class of the library: its keywords."""

    def __init__(self, **fields: float) -> None:
        self.fields = fields


class HostLibrary:
    """Stands in for `cellops._C` with CUDA kernels; its entry points take addresses in the CPU's memory."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.fields_of.restype = self.library.call.restype = ctypes.c_char_p
        self.called: list[str] = []

    def reverse(self, value: bool) -> None:
        """Whether blocks, and threads between two barriers, run in the opposite order."""
        self.library.set_reversed(int(value))

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Params"):
            return Params
        assert name.endswith("_cuda"), name
        return functools.partial(self._call, name.removesuffix("_cuda"))

    def _call(self, entry: str, params: Params, device: int, stream: int, *addresses: int) -> None:
        self.called.append(entry)
        names = self.library.fields_of(entry.encode())
        assert names is not None, f"{entry} is not in csrc/cuda/ops.inc"
        names = names.decode().split()
        assert set(names) == set(params.fields)
        fields = (ctypes.c_double * len(names))(*(float(params.fields[name]) for name in names))
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        error = self.library.call(entry.encode(), fields, pointers, len(addresses))
        if error is not None:
            raise RuntimeError(f"{entry}: {error.decode()}")


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    path = tmp_path_factory.mktemp("cuda_host") / "libcuda_host.so"
    source = ROOT / "tests" / "cuda_host.cpp"
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", str(source), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return HostLibrary(path)


@pytest.fixture
def host(host_library: HostLibrary, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostLibrary]:
    """The library in the launchers' hands; atomics are allowed."""
    monkeypatch.setattr(_native, "library", lambda: host_library)
    torch.use_deterministic_algorithms(False)
    host_library.called.clear()
    host_library.reverse(False)
    yield host_library
    host_library.reverse(False)


def run(case: Case, arguments: dict[str, Any], grad_output: Tensor) -> dict[str, Tensor]:
    """Output, statistics and gradients, as the op would call the launchers."""
    forward, backward = (_backend.gpu_launcher("cuda", case.op, direction) for direction in ("forward", "backward"))
    taken = inspect.signature(forward).parameters
    found = forward(**{name: value for name, value in arguments.items() if name in taken})
    output, *statistics = found if isinstance(found, tuple) else (found,)
    results = {"output": output, **dict(zip(STATISTICS, statistics, strict=False))}
    tensors = [name for name in gradient_names(case) if name in arguments]
    given = {**arguments, "grad_output": grad_output, "wanted": [isinstance(arguments[n], Tensor) for n in tensors]}
    given.update(zip(STATISTICS, statistics, strict=False))
    taken = inspect.signature(backward).parameters
    gradients = backward(**{name: value for name, value in given.items() if name in taken})
    for name, gradient in zip(tensors, gradients, strict=True):
        like = arguments[name]
        if isinstance(like, Tensor):
            assert gradient is not None, name
            results[name] = gradient.reshape(like.shape).to(like.dtype)
    memory = [tensor.untyped_storage().data_ptr() for tensor in results.values() if tensor.numel()]
    assert len(set(memory)) == len(memory), "two results share their memory"
    return results


def gradient_names(case: Case) -> list[str]:
    """The tensor arguments in the order of the backward launcher's results."""
    module = importlib.import_module(f"cellops.reference.{case.op.removesuffix('_batch_norm')}")
    if case.op == "deform_conv2d":
        return ["input", "offset", "weight", "bias", "mask"]
    return [name for name in inspect.signature(getattr(module, case.op)).parameters if name in case.terms]


def reference(case: Case, arguments: dict[str, Any], grad_output: Tensor) -> dict[str, Tensor]:
    """The same of the reference."""
    leaves = {key: value.detach().requires_grad_() for key, value in arguments.items() if isinstance(value, Tensor)}
    found = case.reference(**{**arguments, **leaves})
    output, *statistics = found if isinstance(found, tuple) else (found,)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.to(output.dtype))
    named = dict(zip(STATISTICS, statistics, strict=False))
    return {"output": output.detach(), **named, **dict(zip(leaves, gradients, strict=True))}


def drawn_gradient(case: Case, arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    found = case.reference(**arguments)
    output = found[0] if isinstance(found, tuple) else found
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    return drawn.contiguous(memory_format=_native.memory_format(arguments["input"]))


def agrees(case: Case, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Everything agrees with the float64 reference to the tolerance of the contract tests."""
    dtype = arguments["input"].dtype
    grad_output = drawn_gradient(case, arguments, dtype)
    found = run(case, arguments, grad_output)
    wanted = reference(case, to_dtype(arguments, torch.float64), grad_output)
    eager = reference(case, arguments, grad_output) if dtype.itemsize == 2 else dict.fromkeys(wanted)
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        if eager[name] is not None and name not in STATISTICS:
            tensor = tensor.to(dtype)  # an offset's gradient may be float32, but columns are rounded before, as eager's
        assert_close_to_reference(tensor, wanted[name], terms=case.terms[name], eager=eager[name], what=name)
    return found


def rows() -> list:
    found = []
    for case in cases(None, "small", "edge"):
        if case.op in CUDA_OPS and case.elements <= MOST_ELEMENTS:
            for dtype in DTYPES:
                found += [pytest.param(case, dtype, layout, id=f"{case}-{dtype}-{layout}") for layout in FORMATS]
    return found


@needs_compiler
@pytest.mark.parametrize(("case", "dtype", "layout"), rows())
def test_forward_and_gradients(host: HostLibrary, case: Case, dtype: str, layout: str) -> None:
    agrees(case, case.make(DTYPES[dtype], memory_format=FORMATS[layout]))


def case_of(op: str, name: str) -> Case:
    (case,) = (case for case in cases(op) if case.name == name)
    return case


@needs_compiler
@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_order_of_threads_changes_nothing_but_sums(host: HostLibrary, op: str) -> None:
    """A barrier that is missing shows when threads run in the opposite order."""
    for case in cases(op, "small"):
        arguments = case.make()
        grad_output = drawn_gradient(case, arguments, torch.float32)
        forward = run(case, arguments, grad_output)
        host.reverse(True)
        backward = run(case, arguments, grad_output)
        host.reverse(False)
        for name, tensor in forward.items():
            if name == "input" and op in SAMPLING_OPS:
                torch.testing.assert_close(backward[name], tensor, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(backward[name], tensor), f"{case}: {name}"


def in_margins(tensor: Tensor, skip: int) -> Tensor:
    """The same values between margins of NaN, `skip` elements behind an address that is a multiple of 64 bytes."""
    dense = tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 and not tensor.is_contiguous() else tensor
    margin = 4096
    buffer = torch.full((dense.numel() + 2 * margin,), torch.nan, dtype=tensor.dtype)
    assert buffer.data_ptr() % 64 == 0
    view = buffer[margin + skip : margin + skip + dense.numel()].view(dense.shape)
    view.copy_(dense)
    return view.permute(0, 3, 1, 2) if dense is not tensor else view


@needs_compiler
@pytest.mark.parametrize("skip", [0, 1, 4])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_nothing_is_read_beside_a_tensor(host: HostLibrary, op: str, dtype: str, layout: str, skip: int) -> None:
    """Views that begin anywhere, in the middle of what would show as NaN."""
    for case in cases(op, "small")[:2]:
        arguments = case.make(DTYPES[dtype], memory_format=FORMATS[layout])
        moved = {
            key: in_margins(value, skip) if isinstance(value, Tensor) else value for key, value in arguments.items()
        }
        agrees(case, moved)


@needs_compiler
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("offset_layout", FORMATS)
@pytest.mark.parametrize("name", ["offset_basic", "offset_interleaved"])
def test_offset_in_its_own_layout_and_type(host: HostLibrary, name: str, layout: str, offset_layout: str) -> None:
    case = case_of("offset_sample2d", name)
    for dtype, wide in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, False)):
        arguments = case.make(dtype, memory_format=FORMATS[layout])
        offset = case.make(torch.float32 if wide else dtype)["offset"]
        arguments["offset"] = offset.contiguous(memory_format=FORMATS[offset_layout])
        agrees(case, arguments)


@needs_compiler
@pytest.mark.parametrize("layout", ["planar", "interleaved"])
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", [(8, 4, 6), (24, 7, 16), (72, 12, 21), (16, 19, 30)], ids=str)
def test_offset_sample2d_moves_16_bytes_at_a_time(
    host: HostLibrary, size: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format, layout: str
) -> None:
    """Sizes that packs divide, with points at bounds, beyond them, at whole numbers, infinite and NaN; regions too."""
    channels, *sides = size
    input = torch.randn(2, *size).to(dtype).contiguous(memory_format=memory_format)
    drawn = (torch.randn(2, 2 * channels, *sides) * 2).round() / 2
    drawn.view(-1)[torch.randperm(drawn.numel())[: drawn.numel() // 8]] *= 6  # beyond their region
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        drawn.view(-1)[torch.randperm(drawn.numel())[:20]] = value
    offset = drawn.to(torch.float32 if channels == 72 else dtype).contiguous(memory_format=memory_format)
    grad_output = torch.randn(2, *size).to(dtype).contiguous(memory_format=memory_format)
    launchers = (_backend.gpu_launcher("cuda", "offset_sample2d", name) for name in ("forward", "backward"))
    forward, backward = launchers
    found = (forward(input, offset, layout), *backward(grad_output, input, offset, layout, (True, True)))
    written = channels >= 16 and max(sides) <= 16 and (layout, memory_format) == ("planar", torch.channels_last)
    assert found[1].dtype == (dtype if written else torch.float32)
    wide = [tensor.double().contiguous() for tensor in (grad_output, input, offset)]
    wanted = (
        cellops.reference.offset_sample2d.offset_sample2d(*wide[1:], layout),
        *cellops.reference.offset_sample2d.offset_sample2d_backward(*wide, layout),
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 16], ids=["groups1", "groups2", "depthwise"])
def test_deform_conv2d_in_several_tiles(
    host: HostLibrary,
    monkeypatch: pytest.MonkeyPatch,
    groups: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Channels that packs divide; tiles that end inside of images, and images one at a time."""
    monkeypatch.setattr(importlib.import_module("cellops.cuda.deform_conv2d"), "SCRATCH_BYTES", 1)
    case = deform_conv2d_case("tiles", "", batch=3, in_channels=16, out_channels=32, groups=groups, offset_groups=2)
    agrees(case, case.make(dtype, memory_format=memory_format))
    assert host.called.count("deform_conv2d_columns") > 12
    assert host.called.count("deform_conv2d_corners") > 6


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("spread", "moved", "sizes"),
    [
        (1.0, (9.0, -7.0), {"in_channels": 24, "offset_groups": 2}),
        (9.0, (0.0, 0.0), {"in_channels": 40}),
        (1.0, (-4.0, 30.0), {"in_channels": 8, "stride": (2, 3), "dilation": (1, 2)}),
        (3.0, (0.0, 5.0), {"in_channels": 8, "kernel_size": (5, 1), "dilation": (4, 1), "padding": (0, 2)}),
    ],
    ids=["moved", "scattered", "strided and outside", "dilated"],
)
def test_deform_conv2d_scatters_in_regions(
    host: HostLibrary,
    monkeypatch: pytest.MonkeyPatch,
    spread: float,
    moved: tuple[float, float],
    sizes: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Maps of several regions in several tiles, which begin inside of a rectangle; corners beyond their region."""
    monkeypatch.setattr(importlib.import_module("cellops.cuda.deform_conv2d"), "SCRATCH_BYTES", 4 << 10)
    case = deform_conv2d_case("far", "", batch=1, height=27, width=19, spread=spread, out_channels=8, **sizes)
    arguments = case.make(dtype, memory_format=torch.channels_last)
    shifts = arguments["offset"].unflatten(1, (-1, 2)) + torch.tensor(moved, dtype=dtype).view(1, 1, 2, 1, 1)
    arguments["offset"] = shifts.flatten(1, 2).contiguous(memory_format=torch.channels_last)
    agrees(case, arguments)
    assert host.called.count("deform_conv2d_scatter") > 1


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_deform_conv2d_gives_what_is_not_finite_to_four_corners(host: HostLibrary, value: float) -> None:
    """And to no others of their region."""
    case = deform_conv2d_case("infinite", "", batch=1, height=12, width=12, in_channels=8, out_channels=8)
    arguments = case.make(memory_format=torch.channels_last)
    grad_output = drawn_gradient(case, arguments, torch.float32)
    grad_output[0, 3, 5, 6] = value
    found = run(case, arguments, grad_output)["input"]
    wanted = reference(case, {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}, grad_output)
    assert 0 < found.isfinite().logical_not().sum() <= 9 * 4 * 8
    torch.testing.assert_close(found.double(), wanted["input"], rtol=1e-4, atol=1e-4, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_deform_conv2d_on_the_integer_grid_and_beyond(
    host: HostLibrary, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Zero offsets meet the border's kinks; some are infinite, huge or NaN. The offset is float32 beside half types."""
    case = deform_conv2d_case("kinks", "", in_channels=8, out_channels=4)
    arguments = case.make(dtype, memory_format=memory_format)
    shifts = torch.randint(-1, 2, arguments["offset"].shape).float()
    for value in (torch.nan, torch.inf, -torch.inf, 1e30):
        shifts.view(-1)[torch.randperm(shifts.numel())[:20]] = value
    arguments["offset"] = shifts
    agrees(case, arguments)


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", ["frelu", "frelu_batch_norm"])
@pytest.mark.parametrize("kernel", [3, 5])
def test_frelu_moves_16_bytes_at_a_time(
    host: HostLibrary, op: str, dtype: torch.dtype, memory_format: torch.memory_format, kernel: int
) -> None:
    """Sizes that packs divide, several tiles and blocks of channels, ties, NaN and infinity."""
    names = ("gamma", "beta") if op == "frelu_batch_norm" else ("scale", "shift")
    case = frelu_case(
        "packed", "", batch_norm=op == "frelu_batch_norm", channels=72, height=19, width=16, kernel=kernel
    )
    arguments = case.make(dtype, memory_format=memory_format)
    agrees(case, arguments)
    if op == "frelu":
        input = torch.randint(-2, 3, arguments["input"].shape).to(dtype).contiguous(memory_format=memory_format)
        input[0, 0, 0, 0], input[0, 1, 0, 0] = torch.nan, torch.inf
        weight = torch.zeros_like(arguments["weight"])
        weight[:, :, kernel // 2, kernel // 2] = 1  # the convolution is the input: all values tie
        agrees(case, {"input": input, "weight": weight, names[0]: None, names[1]: None})


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_variance_survives_an_outlier(host: HostLibrary, memory_format: torch.memory_format, kernel: int) -> None:
    """Each channel's first value lies ten thousand deviations of the others away: what is summed around it is lost."""
    input = torch.randn(2, 3, 60, 70).contiguous(memory_format=memory_format)
    input[0, :, 0, 0] = 1e4
    weight = torch.rand(3, 1, kernel, kernel)
    forward = _backend.gpu_launcher("cuda", "frelu_batch_norm", "forward")
    _, mean, variance = forward(input, weight, None, None, 1e-5)
    convolved = torch.nn.functional.conv2d(input.double(), weight.double(), padding=kernel // 2, groups=3)
    expected = convolved.var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance, expected.float(), rtol=1e-5, atol=0)
    assert ((mean - convolved.mean((0, 2, 3))).abs() < 1e-5 * expected.sqrt()).all()


@needs_compiler
def test_frelu_refuses_a_window_that_does_not_fit(host: HostLibrary) -> None:
    forward = _backend.gpu_launcher("cuda", "frelu", "forward")
    with pytest.raises(ValueError, match=r"weight must have a window that fits in 48 KiB .* 181 x 181"):
        forward(torch.zeros(1, 1, 200, 200), torch.zeros(1, 1, 181, 181))


# Deterministic mode


@needs_compiler
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", SAMPLING_OPS)
def test_deterministic_mode_gives_the_same_bits_in_any_order(
    host: HostLibrary, op: str, dtype: str, layout: str
) -> None:
    chosen = [case for case in cases(op, "small", "edge") if case.elements <= 4_000]
    differs = False
    for case in chosen:
        arguments = case.make(DTYPES[dtype], memory_format=FORMATS[layout])
        grad_output = drawn_gradient(case, arguments, DTYPES[dtype])
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            found = agrees(case, arguments)
            host.reverse(True)
            again = run(case, arguments, grad_output)["input"].to(DTYPES[dtype])
            host.reverse(False)
            if deterministic:
                torch.testing.assert_close(again, found["input"].to(DTYPES[dtype]), rtol=0, atol=0, equal_nan=True)
            differs |= not deterministic and not torch.equal(again, found["input"].to(DTYPES[dtype]))
    assert host.called.count("fixed_point") > 0
    assert differs or DTYPES[dtype].itemsize == 2, "the order of additions never showed: equal bits prove nothing"


def gradients_in_both_orders(host: HostLibrary, op: str, *arguments: Any) -> Tensor:
    """The input's gradient of a backward launcher in deterministic mode, in float64; the order changes no bit."""
    torch.use_deterministic_algorithms(True)
    backward = _backend.gpu_launcher("cuda", op, "backward")
    found = backward(*arguments)[0]
    host.reverse(True)
    again = backward(*arguments)[0]
    host.reverse(False)
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)
    return found.double()


def agrees_by_plane(found: Tensor, wanted: Tensor) -> None:
    """Equal to float32's digits of the plane's largest, and NaN just where the other is not finite."""
    finite = wanted.isfinite()
    assert torch.equal(found.isnan(), ~finite) and 0 < finite.sum() < finite.numel()
    found, wanted = (torch.where(finite, tensor, 0.0) for tensor in (found, wanted))
    assert ((found - wanted).abs() <= 1e-6 * wanted.abs().amax((2, 3), keepdim=True)).all()


MAGNITUDES = (1e-38, 1e-20, 1.0, 1e20)
"""Of planes: each has its own unit."""


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("size", [(5, 7), (8, 4)])
def test_offset_sample2d_in_fixed_point(
    host: HostLibrary, size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    """Planes of very different sizes, numbers that are not finite, also where a NaN offset samples nothing."""
    shape = (2, 4, *size)
    input = torch.randn(shape).contiguous(memory_format=memory_format)
    offset = torch.randn(2, 8, *size)
    grad_output = torch.randn(shape).contiguous(memory_format=memory_format)
    grad_output *= torch.tensor(MAGNITUDES)[:, None, None]
    grad_output[0, 1, 2, 2], grad_output[1, 2, 0, 1], grad_output[1, 3, 3, 3] = torch.nan, torch.inf, -torch.inf
    offset[0, 4, 3, 1], grad_output[0, 2, 3, 1] = torch.nan, torch.nan
    found = gradients_in_both_orders(host, "offset_sample2d", grad_output, input, offset, "planar", (True, True))
    wide = [tensor.double().contiguous() for tensor in (grad_output, input, offset)]
    agrees_by_plane(found, cellops.reference.offset_sample2d.offset_sample2d_backward(*wide, "planar")[0])


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_all_points_in_one_pixel_do_not_overflow(host: HostLibrary, memory_format: torch.memory_format) -> None:
    grad_output = torch.full((1, 2, 30, 40), 2e35).contiguous(memory_format=memory_format)
    offset = torch.full((1, 4, 30, 40), -1e6)
    found = gradients_in_both_orders(
        host, "offset_sample2d", grad_output, torch.zeros_like(grad_output), offset, "planar", (True, False)
    )
    assert found.count_nonzero() == 2
    torch.testing.assert_close(found[:, :, 0, 0], torch.full((1, 2), 1200 * 2e35).double(), rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("groups", [1, 2, 8], ids=["groups1", "groups2", "depthwise"])
def test_deform_conv2d_in_fixed_point(host: HostLibrary, groups: int, memory_format: torch.memory_format) -> None:
    """Images of very different sizes, and numbers that are not finite in the gradient and in the mask."""
    case = deform_conv2d_case("fixed", "", batch=4, in_channels=8, out_channels=8, groups=groups, offset_groups=2)
    arguments = case.make(memory_format=memory_format)
    grad_output = drawn_gradient(case, arguments, torch.float32) * torch.tensor(MAGNITUDES)[:, None, None, None]
    grad_output = grad_output.contiguous(memory_format=memory_format)
    grad_output[2, 3, 1, 1], arguments["mask"][3, 2, 0, 0] = torch.nan, torch.inf
    pairs = [arguments[name] for name in ("stride", "padding", "dilation")]
    tensors = [grad_output, *(arguments[name] for name in ("input", "offset", "weight"))]
    wanted = (True, False, False, False, False)
    found = gradients_in_both_orders(host, "deform_conv2d", *tensors, *pairs, arguments["mask"], wanted)
    wide = [tensor.double().contiguous() for tensor in (*tensors, arguments["mask"])]
    reference = cellops.reference.deform_conv2d.deform_conv2d_backward(*wide[:4], *pairs, wide[4], wanted)[0]
    agrees_by_plane(found, reference)

"""Where tensors have 2^31 elements and more, no kernel leaves them: a few programs run without memory behind it.

Loads give zeros, masked ones what they name instead. A product of 32-bit integers that wraps around shows as an address
outside the tensor. And no grid is larger than a GPU takes, which needs no program to run.
"""

from __future__ import annotations

import functools
import importlib.util
from math import prod
from typing import Any

import numpy
import pytest
import torch
from conftest import INTERPRETER_ERROR
from torch import Tensor
from triton_calls import TRITON_OPS, arguments_of, empty, in_format

from cellops.testing import cases, forward_and_gradients
from cellops.testing._compile_kernels import call_launchers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETER_ERROR is not None, reason=str(INTERPRETER_ERROR)),
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is not used beside a GPU"),
]

CALLS = [(op, False) for op in TRITON_OPS] + [(op, True) for op in ("deform_conv2d", "offset_sample2d")]
"""Each op, and without atomics those that have them."""

REGION = 1 << 44  # addresses between two tensors


class Address:
    """A tensor as the interpreter takes it: a type and an address."""

    def __init__(self, name: str, tensor: Tensor, start: int) -> None:
        self.name, self.dtype, self.start = name, tensor.dtype, start
        spans = (size - 1 for size in tensor.shape)
        self.bytes = (sum(map(prod, zip(spans, tensor.stride(), strict=True))) + 1) * tensor.element_size()

    def data_ptr(self) -> int:
        return self.start


class Memory:
    """What the interpreter loads from and stores to: zeros, and what was touched outside the tensors."""

    def __init__(self) -> None:
        self.regions: list[Address] = []
        self.outside: set[str] = set()

    def arguments(self, launch: Any) -> list[Any]:
        """The launch's arguments, each tensor at an address of its own."""
        self.regions, found = [], []
        for name, value in zip(launch.kernel.arg_names, launch.arguments, strict=False):
            if isinstance(value, Tensor):
                value = Address(name, value, (len(self.regions) + 1) * REGION + REGION // 2)
                self.regions.append(value)
            found.append(value)
        return found

    def touch(self, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[numpy.broadcast_to(mask.data, pointers.data.shape)].astype(numpy.int64)
        for index in numpy.unique(addresses // REGION):
            region = self.regions[min(max(int(index), 1), len(self.regions)) - 1]
            reached = addresses[addresses // REGION == index] - region.start
            if reached.min() < 0 or reached.max() >= region.bytes:
                self.outside.add(f"{region.name}: bytes {reached.min()} to {reached.max()} of {region.bytes}")


def touched_outside(launch: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What the last program of a launch and the first beside it touch outside its tensors."""
    from triton.runtime.interpreter import GridExecutor, TensorHandle, interpreter_builder

    memory = Memory()

    def load(pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        memory.touch(pointers, mask)
        kind = pointers.get_element_ty()
        bits = {8: numpy.uint8, 16: numpy.uint16, 32: numpy.int32, 64: numpy.int64}[kind.primitive_bitwidth]
        number = {"fp16": numpy.float16, "fp32": numpy.float32}.get(str(kind), bits)
        found = numpy.zeros(pointers.data.shape, number)
        return TensorHandle(found if other is None else numpy.where(mask.data, found, other.data.astype(number)), kind)

    def store(pointers: Any, _: Any, mask: Any, *__: Any) -> None:
        memory.touch(pointers, mask)

    def add(_: Any, pointers: Any, values: Any, mask: Any, *__: Any) -> Any:
        memory.touch(pointers, mask)
        return values

    class Executor(GridExecutor):
        def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
            return args_dev, kwargs

        def _restore_args_dev(self, *_: Any) -> None:
            pass

    count, *others = (*launch.grid, 1, 1)[:3]
    programs = sorted({(x, *(at * (size - 1) for size in others)) for x in (0, count - 1) for at in (0, 1)})
    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", load)
        patch.setattr(interpreter_builder, "create_masked_store", store)
        patch.setattr(interpreter_builder, "create_atomic_rmw", add)
        patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: None)
        interpreter_builder.grid_dim = (*launch.grid, 1, 1)[:3]
        chosen = lambda x, *_: setattr(interpreter_builder, "grid_idx", programs[x])  # noqa: E731
        patch.setattr(interpreter_builder, "set_grid_idx", chosen)
        executor = Executor(launch.kernel.fn, launch.kernel.arg_names, (len(programs),))
        executor(*memory.arguments(launch), **launch.constants)
    return {f"{launch.kernel.__name__}: {text}" for text in memory.outside}


def check(op: str, arguments: dict[str, Any], deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellops.triton._launch import Limits, noted_launches

    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = in_format(arguments, memory_format)
        # Many programs, so that each has little to do; but these go through the sums of all parts.
        multiprocessors = 50 if op in ("eca", "squeeze_excite") else 1 << 20
        with noted_launches(Limits(multiprocessors, 232448)) as launches:
            call_launchers(op, given, deterministic)
        kernels = {(launch.kernel.__name__, str(launch.constants), launch.grid): launch for launch in launches}
        assert kernels
        outside = {text for launch in kernels.values() for text in touched_outside(launch, monkeypatch)}
        assert not outside, "\n".join(sorted(outside))


SIDE = 17600  # the eighth channel begins beyond 2^31
MANY = 2**31 // (8 * 63) + 1


def rows() -> list[Any]:
    """Each op with one image of 2^31 elements and with as many in a batch: the images that tell most are slow alone."""
    found = []
    for op in TRITON_OPS:
        for name, shape in (("image", (1, 8, SIDE, SIDE)), ("batch", (MANY, 8, 7, 9))):
            told = name == "image" and op in ("deform_conv2d", "offset_sample2d", "frelu", "group_conv1x1")
            marks = pytest.mark.slow if told else pytest.mark.exhaustive
            found.append(pytest.param(op, shape, marks=marks, id=f"{op}-{name}"))
    return found


@pytest.mark.parametrize(("op", "shape"), rows())
def test_no_program_leaves_the_tensors(op: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    check(op, arguments_of(op, empty(*shape)), False, monkeypatch)


def test_the_last_part_may_end_beyond_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many strips as elements, and fewer than 2^31 of them: the last part's numbers go on beyond that."""
    from cellops.triton._launch import Limits, noted_launches

    with noted_launches(Limits(1 << 16, 232448)) as launches:  # parts of eleven blocks
        call_launchers("frelu_batch_norm", arguments_of("frelu_batch_norm", empty(2**31 - 1, 1, 1, 1)), False)
    launch = launches[0]
    assert launch.kernel.__name__ == "depthwise_statistics_kernel"
    assert not touched_outside(launch, monkeypatch)


def test_a_row_of_a_strip_may_begin_beyond_2_31(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image so wide that a few rows on is more than 32 bits hold."""
    from cellops.triton._launch import noted_launches

    with noted_launches() as launches:
        call_launchers("frelu", arguments_of("frelu", empty(1, 1, 5, 2**29)), False)
    assert launches[0].kernel.__name__ == "depthwise_forward_kernel"
    assert not touched_outside(launches[0], monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", ["deform_conv2d", "offset_sample2d"])
def test_no_program_leaves_the_tensors_without_atomics(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels, since each of these programs takes all of an image's, and as many channels as one axis may have."""
    check(op, arguments_of(op, empty(1, 65532, 182, 182)), True, monkeypatch)


@pytest.mark.exhaustive
def test_two_maps_have_twice_as_many_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of("spatial_attention", empty(1, 1, 2**15, 2**15 + 2))
    check("spatial_attention", arguments | {"weight": empty(1, 2, 3, 3), "mode": "pool"}, False, monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("op", "deterministic"), [call for call in CALLS if call[0] != "spatial_attention"])
def test_no_program_of_a_turned_grid_leaves_the_tensors(
    op: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of spatial attention, where most programs go through all channels: minutes for each."""
    groups = 65540
    arguments = arguments_of(op, empty(1, 4 * groups, 32, 32))
    if op == "deform_conv2d":  # each group at its own offsets, or a program goes through all of them
        arguments |= {"offset": empty(1, 18 * groups, 32, 32), "mask": empty(1, 9 * groups, 32, 32)}
    check(op, arguments, deterministic, monkeypatch)


def launches_of(op: str, arguments: dict[str, Any], deterministic: bool) -> list[Any]:
    """In both memory formats."""
    from cellops.triton._launch import noted_launches

    with noted_launches() as launches:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            call_launchers(op, in_format(arguments, memory_format), deterministic)
    return launches


def wide_calls(op: str) -> list[dict[str, Any]]:
    """Calls with more blocks of channels than the second axis of a grid has programs, one also with as many images."""
    found = [
        arguments_of(op, empty(*shape)) for shape in ((1, 1 << 25, 1, 1), (1, 1 << 18, 32, 32), (70_000, 1 << 18, 1, 1))
    ]
    if op == "deform_conv2d":
        dense = arguments_of(op, empty(1, 8192, 1, 1)) | {"weight": empty(8192, 8192, 3, 3), "bias": None}
        own = {"offset": empty(1, 18 << 16, 1, 1), "mask": empty(1, 9 << 16, 1, 1)}
        depthwise = arguments_of(op, empty(1, 1 << 18, 1, 1)) | own | {"weight": empty(1 << 18, 1, 3, 3), "bias": None}
        found += [dense, depthwise]
    return found


@pytest.mark.parametrize("op", TRITON_OPS)
def test_no_grid_is_larger_than_a_gpu_takes(op: str) -> None:
    launches = [
        launch
        for arguments in wide_calls(op)
        for deterministic in (False, True)
        for launch in launches_of(op, arguments, deterministic)
    ]
    grids = {launch.kernel.__name__: [] for launch in launches}
    for launch in launches:
        assert all(0 < programs <= most for programs, most in zip(launch.grid, (2**31 - 1, 65535), strict=False))
        grids[launch.kernel.__name__].append(launch)
    for name, found in grids.items():
        if "AXIS" in found[0].constants:
            turned = [launch for launch in found if launch.constants["AXIS"] == 1]
            assert any(launch.grid[0] > 65535 for launch in turned), f"{name} is not asked for so many programs"


@pytest.mark.parametrize(
    ("op", "deterministic"),
    [pytest.param(*call, marks=pytest.mark.slow if call[0] == "deform_conv2d" else ()) for call in CALLS],
)
def test_turned_grids_give_the_same(op: str, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels do where blocks of channels are on the other axis, here with few of them."""
    from cellops.triton import _launch

    shapes = {"deform_conv2d": (1, 8, 3, 5), "offset_sample2d": (2, 16, 5, 9), "group_conv1x1": (2, 16, 3, 5)}
    few = arguments_of(op, empty(*shapes.get(op.removesuffix("_batch_norm"), (2, 72, 3, 5))))
    grids: dict[str, set[tuple[int, ...]]] = {}
    for launch in launches_of(op, few, deterministic):
        grids.setdefault(launch.kernel.__name__, set()).add(launch.grid)
    assert all(
        any(grid != grid[::-1] for grid in of_kernel) for of_kernel in grids.values() if len(min(of_kernel)) == 2
    )
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: torch.randn(value.shape, generator=generator) if isinstance(value, Tensor) else value
        for name, value in few.items()
    }
    torch.use_deterministic_algorithms(deterministic)
    call = functools.partial(forward_and_gradients, functools.partial(cases(op)[0].function, backend="triton"))
    usual = _launch._turned
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = in_format(drawn, memory_format)
        wanted = call(given)
        with monkeypatch.context() as patch:
            patch.setattr(_launch, "_turned", lambda grid, together: usual(grid, not together))
            found = call(given)
        for name, tensor in found.items():  # atomics add in the order of the programs
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5 if not deterministic else 0, msg=name)


def test_a_grid_that_no_gpu_takes_is_refused() -> None:
    from cellops.triton._launch import launch, noted_launches
    from cellops.triton.eca import eca_scale_kernel

    with (
        noted_launches(),
        pytest.raises(RuntimeError, match="eca_scale_kernel would need 70001 x 70000 programs, more"),
    ):
        launch(eca_scale_kernel, (70_000, 70_001), (), ())
    with noted_launches(), pytest.raises(RuntimeError, match=f"eca_scale_kernel would need {2**31} x 1 programs, more"):
        launch(eca_scale_kernel, (2**31, 1), (), ())


def test_addresses_outside_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from cellops.triton._launch import noted_launches

    with noted_launches() as launches:
        call_launchers("eca", arguments_of("eca", empty(2, 8, 7, 9)), False)
    launch = launches[-1]
    shorter = tuple(value[:1] if isinstance(value, Tensor) else value for value in launch.tensors)
    assert not touched_outside(launch, monkeypatch)
    assert touched_outside(launch._replace(tensors=shorter), monkeypatch)

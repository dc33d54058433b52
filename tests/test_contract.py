"""Every case of `cellops.testing.CASES` on every backend, dtype and memory format, against the float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import INTERPRETER_ERROR
from torch import Tensor

from cellops import _backend, _native
from cellops.testing import (
    STATISTICS,
    Case,
    assert_close_to_reference,
    cases,
    forward_and_gradients,
    to_dtype,
)

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _native.DTYPE_CODES}

INTERPRETED_ELEMENTS = 2000
INTERPRETED = (("float32", "nchw"), ("bfloat16", "channels_last"))
"""What Triton's interpreter runs by default; larger cases and the other types and layouts are marked exhaustive."""

SECOND_ORDER = (
    "plain",
    "v1",
    "crossed_groups",
    "offset_basic",
    "offset_interleaved",
    "group_conv1x1_basic",
    "group_conv1x1_bn_basic",
    "frelu_basic",
    "frelu_bn_basic",
    "spatial_basic",
    "spatial_pool3",
)
"""Cases that check second derivatives on every backend; they come from the reference, which checks all of its own."""


def rows(
    *tags: str,
    names: tuple[str, ...] = (),
    dtypes: tuple[str, ...] = tuple(DTYPES),
    formats: tuple[str, ...] = tuple(FORMATS),
    once: bool = False,
) -> list:
    """Case x backend x dtype x memory format; a backend that cannot run here is skipped with its reason.

    With `once`, everything that Triton's interpreter runs is marked exhaustive: another test has run the case already.
    """
    found = []
    for case in cases(None, *tags):
        if names and case.name not in names:
            continue
        for backend in (*_backend.OPS[case.op], "reference"):
            device = "cuda" if backend == "cuda" or (backend == "triton" and torch.cuda.is_available()) else "cpu"
            for dtype in dtypes:
                reason = _backend.why_not(backend, case.op, device, DTYPES[dtype])
                if backend == "triton" and device == "cpu":
                    reason = reason or INTERPRETER_ERROR
                if backend == "cuda" and not torch.cuda.is_available():
                    reason = reason or "no CUDA device; tests/test_cuda.py runs the kernels' bodies on the CPU"
                marks = [pytest.mark.skip(reason=str(reason))] if reason else []
                for layout in formats:
                    name = f"{case}-{backend}-{dtype}-{layout}"
                    interpreted = backend == "triton" and device == "cpu"
                    slow = interpreted and (case.elements > INTERPRETED_ELEMENTS or (dtype, layout) not in INTERPRETED)
                    more = [*marks, pytest.mark.exhaustive] if slow or (interpreted and once) else marks
                    found.append(pytest.param(case, backend, device, dtype, layout, marks=more, id=name))
    return found


@functools.cache
def expected(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients of the float64 reference, for the values that the dtype can hold."""
    return forward_and_gradients(case.reference, to_dtype(case.make(dtype), torch.float64), grad_dtype=dtype)


@functools.cache
def eager(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the eager reference makes of it at that dtype: the measure for half types."""
    return forward_and_gradients(case.reference, case.make(dtype))


def check(case: Case, backend: str, device: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    arguments = case.make(dtype, device, memory_format)
    found = forward_and_gradients(functools.partial(case.function, backend=backend), arguments)
    for name, tensor in found.items():
        measure = eager(case, dtype)[name] if dtype.itemsize == 2 else None
        terms = case.terms[name]
        assert_close_to_reference(tensor, expected(case, dtype)[name], terms=terms, eager=measure, what=name)
        if name in STATISTICS:
            continue
        assert tensor.dtype == dtype, name
        like = arguments["input" if name == "output" else name]
        if like.dim() == 4:
            assert tensor.is_contiguous(memory_format=_native.memory_format(like)), f"{name} has another memory format"
    # Of an op's results, compilers take for granted that none is a view of another.
    memory = [tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()]
    assert len(set(memory)) == len(memory), "two results share their memory"


@pytest.mark.parametrize(("case", "backend", "device", "dtype", "layout"), rows("small", "edge"))
def test_forward_and_gradients(case: Case, backend: str, device: str, dtype: str, layout: str) -> None:
    check(case, backend, device, DTYPES[dtype], FORMATS[layout])


@pytest.mark.parametrize(("case", "backend", "device", "dtype", "layout"), rows("real", dtypes=("float32",)))
def test_real_size(case: Case, backend: str, device: str, dtype: str, layout: str) -> None:
    check(case, backend, device, DTYPES[dtype], FORMATS[layout])


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("case", "backend", "device", "dtype", "layout"), rows("small", dtypes=("float32",), formats=("nchw",), once=True)
)
def test_other_values(case: Case, backend: str, device: str, dtype: str, layout: str, seed: int) -> None:
    arguments = case.make(DTYPES[dtype], device, FORMATS[layout], seed)
    found, wanted = (
        forward_and_gradients(function, given)["output"]
        for function, given in (
            (functools.partial(case.function, backend=backend), arguments),
            (case.reference, to_dtype(arguments, torch.float64)),
        )
    )
    assert_close_to_reference(found, wanted, terms=case.terms["output"])


@pytest.mark.parametrize(
    ("case", "backend", "device", "dtype", "layout"), rows("small", dtypes=("float64",), formats=("nchw",))
)
def test_first_and_second_derivatives(case: Case, backend: str, device: str, dtype: str, layout: str) -> None:
    arguments = case.make(DTYPES[dtype], device)
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        found = case.function(**{**arguments, **dict(zip(names, tensors, strict=True))}, backend=backend)
        return found[0] if isinstance(found, tuple) else found

    tensors = [arguments[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    if backend == "reference" or case.name in SECOND_ORDER:
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def non_contiguous(tensor: Tensor) -> Tensor:
    """The same values in every second element of a larger tensor, with its dimensions in reverse order in memory."""
    sizes = [2 * size for size in reversed(tensor.shape)]
    spread = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = spread.permute(*reversed(range(tensor.dim())))[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
@pytest.mark.parametrize(
    ("case", "backend", "device", "dtype", "layout"),
    rows("small", names=("plain", "crossed_groups", "depthwise"), dtypes=("float32",), formats=("nchw",), once=True),
)
def test_non_contiguous(case: Case, backend: str, device: str, dtype: str, layout: str, name: str) -> None:
    arguments = case.make(DTYPES[dtype], device)
    wanted = forward_and_gradients(functools.partial(case.function, backend=backend), arguments)
    view = non_contiguous(arguments[name])
    found = forward_and_gradients(functools.partial(case.function, backend=backend), {**arguments, name: view})
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=0)


@pytest.mark.parametrize("place", [0, 2**15 - 1, 2**15, 2**16 - 1, -1])
@pytest.mark.parametrize("wrong", [1.0, torch.nan, torch.inf])
def test_one_wrong_value_is_found(place: int, wrong: float) -> None:
    """Wherever it is: tensors are compared in blocks. The same NaN or infinity in both is right."""
    wanted = torch.zeros(70_001, dtype=torch.float64)
    found = wanted.float()
    found[place] = wrong
    with pytest.raises(AssertionError, match=r"sampled: [\s\S]*Mismatched elements: 1 / 70001"):
        assert_close_to_reference(found, wanted, terms=1, what="sampled")
    wanted[place] = wrong
    assert_close_to_reference(found, wanted, terms=1)


@pytest.mark.parametrize("bits", range(16))
@pytest.mark.parametrize("case", [case for case in cases(None, "small") if case.name in ("plain", "groups2")], ids=str)
def test_each_tensor_has_its_own_layout(case: Case, bits: int) -> None:
    arguments = case.make()
    four = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.dim() == 4]
    mixed = {
        **arguments,
        **{
            name: arguments[name].contiguous(memory_format=torch.channels_last)
            for bit, name in enumerate(four)
            if bits >> bit & 1
        },
    }
    found = forward_and_gradients(case.function, mixed)
    for name, tensor in found.items():
        assert_close_to_reference(tensor, expected(case, torch.float32)[name], terms=case.terms[name], what=name)
        like = mixed["input" if name == "output" else name]
        if like.dim() == 4:
            assert tensor.is_contiguous(memory_format=_native.memory_format(like))


@pytest.mark.parametrize("wanted", range(1, 32))
def test_only_wanted_gradients_are_computed(wanted: int) -> None:
    (case,) = (case for case in cases("deform_conv2d") if case.name == "plain")
    arguments = case.make()
    names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    leaves = {name: arguments[name].requires_grad_(bool(wanted >> bit & 1)) for bit, name in enumerate(names)}
    output = case.function(**{**arguments, **leaves})
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator, dtype=torch.float64).float())
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert_close_to_reference(leaf.grad, expected(case, torch.float32)[name], terms=case.terms[name], what=name)
        else:
            assert leaf.grad is None

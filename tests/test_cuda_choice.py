"""When the CUDA kernels are chosen, and why not where they are not; no GPU is needed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cellops import _backend, _native

CUDA_OPS = [op for op, backends in _backend.OPS.items() if "cuda" in backends]
HALF, FLOAT = torch.float16, torch.float32


class WithCuda:
    """Stands in for a library that was compiled with CUDA."""

    def build_info(self) -> dict[str, str]:
        return {"cuda": "nvcc 13.0: sm_90"}


@pytest.mark.parametrize("op", CUDA_OPS)
def test_launchers_are_called_like_tritons(op: str) -> None:
    for direction in ("forward", "backward"):
        parameters = [*inspect.signature(_backend.gpu_launcher("cuda", op, direction)).parameters]
        module = importlib.import_module(f"cellops.reference.{op.removesuffix('_batch_norm')}")
        if direction == "forward":
            assert parameters == [*inspect.signature(getattr(module, op)).parameters]
        else:
            assert parameters[0] == "grad_output" and "wanted" in parameters


@pytest.mark.parametrize("op", CUDA_OPS)
def test_it_stands_in_where_triton_is_missing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "library", WithCuda)
    monkeypatch.setattr(_backend, "_why_no_triton", lambda: None)
    choice = _backend.preferred(op, "cuda", torch.float16)
    first, second = [name for name in _backend.OPS[op] if name != "cpu"]
    assert choice.name == first
    elsewhere = _backend.CUDA_ELSEWHERE.get(op, "") if second == "cuda" else ""
    assert choice.reasons[second] == f"{first} is preferred here{elsewhere}"
    monkeypatch.setattr(_backend, "_why_no_triton", lambda: "triton is not installed")
    assert _backend.preferred(op, "cuda", torch.float16).name == "cuda"
    assert _backend.preferred(op, "cuda", torch.float64).name == "reference"


@pytest.mark.parametrize("op", CUDA_OPS)
def test_what_cannot_run_says_why(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run {op} on cpu .*: its kernels take tensors on a"):
        _backend.choose(op, "cpu", torch.float32, "cuda")
    with pytest.raises(RuntimeError, match="its dtypes are float32, bfloat16, float16"):
        _backend.choose(op, "cuda", torch.float64, "cuda")

    class WithoutCuda:
        def build_info(self) -> dict[str, str]:
            return {"cuda": "off: no nvcc was found when the library was built"}

    monkeypatch.setattr(_native, "library", WithoutCuda)
    _backend.choose.cache_clear()
    with pytest.raises(RuntimeError, match=r"built without CUDA \(off: no nvcc was found when the library was built\)"):
        _backend.choose(op, "cuda", torch.float32, "cuda")
    monkeypatch.setattr(_native, "error", ImportError("the library was taken away"))
    _backend.choose.cache_clear()
    with pytest.raises(ImportError, match="the library was taken away"):
        _backend.choose(op, "cuda", torch.float32, "cuda")
    _backend.choose.cache_clear()


@pytest.fixture
def triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CUDA kernels are there and Triton is not, for those who choose."""
    monkeypatch.setattr(_native, "library", WithCuda)
    monkeypatch.setattr(_backend, "_why_no_triton", lambda: "triton is not installed")
    _backend.choose.cache_clear()
    yield
    _backend.choose.cache_clear()


def test_deform_conv2d_takes_cuda_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward, and forward of many output channels in one group."""
    monkeypatch.setattr(_native, "library", WithCuda)
    monkeypatch.setattr(_backend, "_why_no_triton", lambda: None)
    _backend.choose.cache_clear()
    plan = importlib.import_module("cellops.ops._deform_conv2d_launch")._plan.__wrapped__
    for backend in (None, "triton", "cuda"):
        for channels, group_in in ((256, 64), (264, 64), (512, 32)):
            shapes = ((2, 64, 8, 8), (2, 18, 8, 8), (channels, group_in, 3, 3), None, None)
            dtypes = (HALF, HALF, HALF, None, None)
            found = plan("cuda", (True,) * 4, (1, 1, 1, 1, 1, 1, backend), *shapes, *dtypes)
            assert found.backend == (backend or ("cuda" if channels == 264 else "triton"))
            assert found.backend_of_backward == (backend or "cuda")
    reasons = _backend.preferred("deform_conv2d", "cuda", HALF).reasons
    assert "but for backward and for more than 256 output channels of a group" in reasons["cuda"]
    _backend.choose.cache_clear()


def planned(op: str, backend: str | None, dtype: torch.dtype, *shapes: tuple[int, ...]) -> str:
    """The backend that a call of tensors of these shapes on a GPU takes."""
    if op == "deform_conv2d":
        plan = importlib.import_module("cellops.ops._deform_conv2d_launch")._plan.__wrapped__
        config, more = (1, 1, 0, 0, 1, 1, backend), (None,) * (5 - len(shapes))
        dtypes = (*(dtype for _ in shapes), *more)
        return plan("cuda", (False,) * 4, config, *shapes, *more, *dtypes).backend
    operator = importlib.import_module(f"cellops.ops.{op}")._operator
    settings = ("planar",) if op == "offset_sample2d" else ()
    shapes += (None,) * (operator.count - len(shapes))
    dtypes = tuple(None if shape is None else dtype for shape in shapes)
    return operator._make_plan("cuda", (False,), (*settings, backend), shapes, dtypes).backend


@pytest.mark.parametrize(
    ("op", "dtype", "fits", "too_large", "reason"),
    [
        ("frelu", FLOAT, ((1, 2, 99, 99), (2, 1, 49, 49)), ((1, 2, 99, 99), (2, 1, 51, 51)), "window of its weight"),
        ("frelu", HALF, ((1, 2, 99, 99), (2, 1, 63, 63)), ((1, 2, 99, 99), (2, 1, 65, 65)), "window of its weight"),
        (
            "offset_sample2d",
            HALF,
            ((2, 4095, 1024, 1024), (2, 8190, 1024, 1024)),
            ((2, 4096, 1024, 1024), (2, 8192, 1024, 1024)),
            "images of fewer than 2",
        ),
        (
            "deform_conv2d",
            HALF,
            ((1, 1, 46340, 46340), (1, 2, 46340, 46340), (1, 1, 1, 1)),
            ((1, 1, 2**13, 2**14), (1, 2**28, 1, 1), (1, 1, 2**13, 2**14)),
            "rows of 2.27 samples",
        ),
    ],
)
def test_sizes_beyond_its_kernels_take_the_reference(
    triton_is_missing: None, op: str, dtype: torch.dtype, fits: Any, too_large: Any, reason: str
) -> None:
    """No error where the caller named no backend, and the recorded reason where they did."""
    assert planned(op, None, dtype, *fits) == planned(op, "cuda", dtype, *fits) == "cuda"
    assert planned(op, None, dtype, *too_large) == "reference"
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run {op} on cuda .*{reason}"):
        planned(op, "cuda", dtype, *too_large)

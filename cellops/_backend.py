"""Which backend runs an op on a tensor, and why not the others.

Without `backend=` the best one that can run is taken and the reference stands in where none can; an explicit `backend=`
runs or raises its recorded reason, it never falls back.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from cellops import _native

OPS: dict[str, tuple[str, ...]] = {
    "deform_conv2d": ("cpu", "triton", "cuda"),
    "offset_sample2d": ("cpu", "cuda", "triton"),
    "frelu": ("cpu", "triton", "cuda"),
    "frelu_batch_norm": ("cpu", "triton", "cuda"),
    "depthwise_conv2d": ("cpu", "triton"),
    "depthwise_conv2d_batch_norm": ("cpu", "triton"),
    "squeeze_excite": ("cpu", "triton"),
    "eca": ("cpu", "triton"),
    "group_conv1x1": ("cpu", "triton"),
    "group_conv1x1_batch_norm": ("cpu", "triton"),
    "spatial_attention": ("cpu", "triton"),
}
"""The kernels each op has, the preferred of a device first. Every op has the reference beside them.

"cuda" samples in CUDA C++ and leaves the products of `deform_conv2d` to torch (docs/cuda.md). Before or behind "triton"
it stands as an H200 measured them (docs/gpu.md); where that depends on the call, `deform_conv2d` says so itself.
"""

CUDA_ELSEWHERE = {"deform_conv2d": ", but for backward and for more than 256 output channels of a group"}
"""Calls of which the CUDA kernels take less time than the preferred ones."""

BACKENDS = ("cpu", "cuda", "triton", "reference")
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_GPU = (8, 0)  # compute capability, of the library's CUDA kernels


class Choice(NamedTuple):
    """The backend taken, and for each of the others the reason why not."""

    name: str
    reasons: dict[str, str]


@cache
def choose(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    backend: str | None = None,
    refused: str | None = None,
    refused_by_cuda: str | None = None,
    first: str | None = None,
) -> Choice:
    """Choose the backend of one call. The answer is cached: a repeated call costs about 0.1 µs.

    Args:
        op: name of the op, a key of `OPS`.
        device_type: `tensor.device.type` of the first argument.
        dtype: its dtype.
        backend: what the caller asked for; None leaves the choice open.
        refused: a reason why no kernel can take these very tensors (a size limit, say), or None. A constant string, or
            the cache grows.
        refused_by_cuda: the same of the CUDA kernels alone, as `refused_by_cuda` finds it.
        first: the backend to prefer for this very call, before the order in `OPS`.

    Returns:
        The backend and why not the others.

    Raises:
        ValueError: `backend` is no backend's name.
        ImportError: an explicit `backend` needs the compiled library or Triton, and it is missing.
        RuntimeError: an explicit `backend` cannot run for another reason.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
    if backend is None:
        choice = preferred(op, device_type, dtype, refused, refused_by_cuda, first)
        if choice.name == "reference" and device_type == "cpu" and "cpu" in OPS[op] and _native.error is not None:
            _warn_library_missing()
        return choice
    error = why_not(backend, op, device_type, dtype, refused, refused_by_cuda)
    if error is not None:
        what = f"backend={backend!r} cannot run {op} on {device_type} with {_short(dtype)}: {error}"
        raise type(error)(what) from error
    return Choice(backend, {other: "another backend was asked for" for other in BACKENDS if other != backend})


def preferred(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    refused: str | None = None,
    refused_by_cuda: str | None = None,
    first: str | None = None,
) -> Choice:
    """What `backend=None` takes, without a warning. Arguments as for `choose`."""
    reasons = {name: why_not(name, op, device_type, dtype, refused, refused_by_cuda) for name in BACKENDS}
    order = sorted(OPS[op], key=lambda name: name != first)
    kernels = [name for name in order if reasons[name] is None and not (name == "triton" and device_type == "cpu")]
    taken = (*kernels, "reference")[0]
    texts = {name: str(reason or f"{taken} is preferred here") for name, reason in reasons.items() if name != taken}
    if taken == "triton" and reasons["cuda"] is None:
        texts["cuda"] += CUDA_ELSEWHERE.get(op, "")
    return Choice(taken, texts)


def why_not(
    backend: str,
    op: str,
    device_type: str,
    dtype: torch.dtype,
    refused: str | None = None,
    refused_by_cuda: str | None = None,
) -> Exception | None:
    """The error that an explicit `backend` would raise for the arguments of `choose`; None if it can run."""
    if backend == "reference":
        return None
    if backend not in OPS[op]:
        return RuntimeError(f"{op} has no {backend} kernel")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if device_type != ("cpu" if backend == "cpu" else "cuda") and not (interpreted and device_type == "cpu"):
        return RuntimeError(_WRONG_DEVICE[backend])
    dtypes = tuple(_native.DTYPE_CODES) if backend == "cpu" else _GPU_DTYPES
    if dtype not in dtypes:
        return RuntimeError(f"its dtypes are {', '.join(map(_short, dtypes))}")
    if backend == "triton" and (missing := _why_no_triton()) is not None:
        return ImportError(missing)
    if backend in ("cpu", "cuda") and _native.error is not None:
        return ImportError(str(_native.error))
    if backend == "cuda" and (built := _native.library().build_info()["cuda"]).startswith("off"):
        return RuntimeError(f"the library was built without CUDA ({built})")
    if backend == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < _OLDEST_GPU:
        return RuntimeError("its kernels need compute capability 8.0 or newer")
    if backend == "cuda" and refused_by_cuda:
        return RuntimeError(refused_by_cuda)
    return RuntimeError(refused) if refused else None


def refused_by_cuda(
    op: str, device_type: str, shapes: Sequence[Any], dtype: torch.dtype, channels_last: bool
) -> str | None:
    """The reason, a constant, why the op's CUDA kernels cannot take tensors of these sizes; None where they can.

    Args:
        op, device_type, dtype: as for `choose`.
        shapes: of the op's tensors in order, the input's first; None for an absent one.
        channels_last: the input's memory format.
    """
    if device_type != "cuda" or "cuda" not in OPS[op]:
        return None
    module = importlib.import_module(f"cellops.cuda.{op.removesuffix('_batch_norm')}")
    return module.refuses(shapes, dtype, channels_last)


@cache
def gpu_launcher(backend: str, op: str, direction: str) -> Any:
    """`<op>_<direction>_<backend>` of `cellops/<backend>/<op>.py`, which is imported when it is first asked for.

    Args:
        backend: "triton" or "cuda".
        op: its name; "<op>_batch_norm" is found in the op's own file.
        direction: "forward" or "backward".
    """
    module = importlib.import_module(f"cellops.{backend}.{op.removesuffix('_batch_norm')}")
    return getattr(module, f"{op}_{direction}_{backend}")


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken installation may raise anything, and must not break the other backends
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


_WRONG_DEVICE = {
    "cpu": "its kernels take tensors on the CPU",
    "cuda": "its kernels take tensors on a CUDA device",
    "triton": "its kernels take tensors on a GPU, or on the CPU with TRITON_INTERPRET=1",
}


@cache
def _warn_library_missing() -> None:
    warnings.warn(
        f"cellops runs the slow reference on the CPU, because the compiled library is missing: {_native.error}",
        stacklevel=3,
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

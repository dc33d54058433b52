"""What every op's registration shares: the library handle, and questions about the state of autograd and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

library = torch.library.Library("cellops", "FRAGMENT")
"""Holds every registration; they last as long as this module."""

AUTOCAST_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda", "AutocastXPU": "xpu", "AutocastMPS": "mps"}
"""Dispatch keys of autocast and the device types they stand for."""

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
for _key in AUTOCAST_DEVICES:
    _AUTOCAST_KEYS = _AUTOCAST_KEYS.add(getattr(torch._C.DispatchKey, _key))


def define(schema: str, kernels: dict[str, Callable]) -> torch._ops.OpOverload:
    """Define `cellops::<schema>` with one kernel per dispatch key, and return the op.

    Args:
        schema: without the namespace.
        kernels: dispatch key, or "Fake", and its kernel. "CompositeExplicitAutograd" serves devices without their own.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key, kernel in kernels.items():
        if key == "Fake":
            torch.library.register_fake(f"cellops::{name}", kernel, lib=library)
        else:
            library.impl(name, kernel, key)
    return getattr(torch.ops.cellops, name).default


def autocast_disabled() -> torch._C._ExcludeDispatchKeyGuard:
    """A context in which no op casts: an implementation multiplies in the type that it was given."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context whose current device is the tensor's: kernels are launched on the current one."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as autocast hands it to a matmul: floating-point types but float64 become `dtype`."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def has_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD follows one of the tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def needs_dispatch() -> bool:
    """Whether a call must enter the dispatcher at the top: under a compiler, functorch, forward-mode AD or autocast.

    Elsewhere a public function may apply its Function itself, or go below autograd where no argument requires a
    gradient, and so cross from Python to the dispatcher once instead of twice (3 of 15 µs on an AMD EPYC).
    """
    return forward_ad._current_level >= 0 or _in_functorch() or _in_autocast() or _is_compiling()


def once_through_dispatcher() -> AbstractContextManager[object]:
    """A context for the backward op within a Function's backward: below autograd where nothing derives it again.

    There its Autograd kernel, in Python, would only call the op a second time.
    """
    if torch.is_grad_enabled() or needs_dispatch():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def is_traced() -> bool:
    """Whether `torch.jit.trace` records the ops: it would record a Function applied here as Python code."""
    return torch._C._get_tracing_state() is not None


def is_transformed_for_reverse_mode() -> bool:
    """Whether a public function must apply the Function that `torch.func` asks for.

    `torch.func.functionalize` knows no Functions: it gets the op itself.
    """
    if not _in_functorch() or forward_ad._current_level >= 0 or _is_compiling() or _in_autocast():
        return False
    return torch._C._functorch.peek_interpreter_stack().key() != torch._C._functorch.TransformType.Functionalize


def takes_formula(op: str, tensors: Iterable[Tensor | None], differentiable: bool, backend: str | None) -> bool:
    """Whether only the formula's own derivatives can follow: forward mode, or functorch around the op itself.

    Raises:
        RuntimeError: they must, and a backend other than the reference was asked for.
    """
    if not has_tangent(tensors) and not (differentiable and _in_functorch()):
        return False
    if backend not in (None, "reference"):
        raise RuntimeError(
            f"backend={backend!r} cannot run {op} in forward-mode AD, nor the raw op under torch.func: "
            "these derivatives are the reference's. Leave backend=None"
        )
    return True


def one_by_one(backward: Callable[[Tensor], Sequence[Tensor]], grad_output: Tensor) -> Sequence[Tensor]:
    """What a backward gives for a gradient, or for each of many.

    `is_grads_batched` and `vectorize=True` of `torch.autograd` give many at once by an older vmap than `torch.func`'s,
    which asks no op for a rule of its own and has none for ops that return lists.

    Args:
        backward: from one gradient to those of the tensors.
        grad_output: one, or many as one tensor of that vmap.
    """
    if _is_compiling() or not torch._C._functorch.is_legacy_batchedtensor(grad_output):
        return backward(grad_output)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    found = [backward(one) for one in torch._remove_batch_dim(grad_output, level, 1, 0)]
    return [torch._add_batch_dim(torch.stack(gradients), 0, level) for gradients in zip(*found, strict=True)]


def with_strides_of(tensor: Tensor, gradient: Tensor) -> Tensor:
    """A new gradient with its tensor's strides in dimensions of size 1 too, as PyTorch's own convolutions give it.

    They move no element, but DistributedDataParallel compares them and warns of copies: a channels_last weight
    [C, 1, k, k] or [O, C, 1, 1] is contiguous as well. Symbolic ones are not compared, which would guard them.
    """
    if tensor._has_symbolic_sizes_strides:  # type: ignore[attr-defined]
        return gradient
    wanted, found = tensor.stride(), gradient.stride()
    if wanted == found or any(
        size != 1 and one != other for size, one, other in zip(tensor.shape, wanted, found, strict=True)
    ):
        return gradient
    return gradient.as_strided(tensor.shape, wanted)


def integer(name: str, value: Any) -> int:
    """A setting as an integer: what counts as one in Python, if 64 bits hold it; a bool as 0 or 1.

    Raises:
        ValueError: it is none, naming the argument.
    """
    try:
        number = value if isinstance(value, (int, torch.SymInt)) else index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(number, bool):
        return int(number)
    if not _is_compiling() and not -(2**63) <= number < 2**63:  # a compiler would guard a symbolic one
        raise ValueError(f"{name} must be an integer of 64 bits, got {value!r}")
    return number  # type: ignore[return-value]  # a SymInt stands for an int


def expect(name: str, shape: Sequence[int] | None, expected: Sequence[int]) -> None:
    """Raise ValueError unless a tensor is absent or has the expected shape."""
    if shape is not None and tuple(shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(shape)}")


def expect_dense(name: str, tensor: Tensor | None) -> None:
    """Raise TypeError for a tensor that no kernel reads: a sparse one, or one in oneDNN's own layout."""
    if tensor is not None and tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {tensor.layout}")


def expect_eps(eps: float) -> None:
    """Raise ValueError unless what a normalisation adds to the variance is 0 or more."""
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, got {eps}")


def expect_window(weight: Sequence[int], channels: int) -> None:
    """Raise ValueError unless a shape is that of a depthwise convolution's weight, with an odd and square window."""
    if len(weight) != 4 or weight[2] != weight[3] or weight[2] % 2 != 1:
        raise ValueError(f"weight must have shape ({channels}, 1, k, k) with an odd k, got {tuple(weight)}")
    expect("weight", weight, (channels, 1, weight[2], weight[2]))


_in_functorch = torch._C._are_functorch_transforms_active
_in_autocast = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling

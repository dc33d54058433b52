"""An op in every layer of the dispatcher, from what is particular to it: its schema, its checks, its formula.

The op gets a kernel for the CPU and one for devices without their own, the fake, the Autograd key, autocast and vmap,
and a backward op of the same standing. First derivatives are the backend's; higher ones, and forward mode, come from
the formula in the reference.

An op may also return statistics, which have no gradient: what a batch normalisation keeps of its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _backend, _native
from cellops.ops._operator_functions import BackwardFunction, Function, FunctorchFunction, slices
from cellops.ops._registration import (
    AUTOCAST_DEVICES,
    autocast,
    autocast_disabled,
    define,
    device_of,
    expect,
    expect_dense,
    has_tangent,
    is_traced,
    is_transformed_for_reverse_mode,
    library,
    needs_dispatch,
    once_through_dispatcher,
    one_by_one,
    takes_formula,
    with_strides_of,
)

Shape = tuple[int, ...]
Tensors = tuple[Tensor | None, ...]
Config = tuple[Any, ...]
"""The op's settings, then the backend."""

Result = Tensor | tuple[Tensor, ...]
"""The output; the output and its statistics where the op has any."""


class Call(NamedTuple):
    """A call by its shapes, which may be symbolic; `None` for an absent tensor."""

    shapes: tuple[Shape | None, ...]
    settings: tuple[Any, ...]


class _Plan(NamedTuple):
    """All that a launch needs to know of a configuration, found once for all its calls."""

    backend: str
    params: Any  # the library's, None where another backend runs
    output_shape: Shape
    memory_format: torch.memory_format
    wide: torch.dtype  # what the library computes in


class Operator:
    """One op.

    Args:
        name: `cellops::<name>`, and the name of the entry points `<name>_forward_cpu` and `<name>_backward_cpu`.
        tensors: names of the tensor arguments; the first is "input", of 4 dimensions, whose memory format the output
            keeps. The library gets the others contiguous and in the input's dtype. Marks behind a name change that:
            "?" may be absent; "+" may be float32 beside a half input, is left alone by autocast, and reaches the
            library in the type that it computes in, or with "=" too in its own; "~" is of 4 dimensions and keeps its
            own memory format.
        settings: the schema's text for what follows the tensors: "str act, str gate".
        check: raises for a wrong `Call`, and returns the output's shape.
        params: from a valid `Call` and the keywords `dtype` (the library's code), `channels_last`, for each tensor
            marked "~" `<name>_channels_last` and for each marked "=" `<name>_dtype`, the library's parameters.
        formula: the reference, called with tensors and settings in order.
        formula_of_backward: the same for the gradients, called with grad_output, tensors and settings; one gradient for
            each tensor, None for an absent one. Made of differentiable ops, not of autograd: it runs under functorch.
        statistics: names of what the op returns after its output, each [output channels] in the type that the library
            computes in. Backward gets them after the tensors.
        refuses: the reason, a constant, why no kernel can take a valid `Call`; None where one can.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        settings: str,
        *,
        check: Callable[[Call], Shape],
        params: Callable[..., Any],
        formula: Callable[..., Any],
        formula_of_backward: Callable[..., Tensors],
        statistics: str = "",
        refuses: Callable[[Call], str | None] = lambda call: None,
    ) -> None:
        self.name = name
        words = tensors.split()
        self.names = tuple(word.rstrip("?+=~") for word in words)
        self.optional = tuple("?" in word for word in words)
        self.wide = tuple("+" in word for word in words)
        self.widened = tuple("+" in word and "=" not in word for word in words)
        self.own_dtype = tuple(i for i, word in enumerate(words) if "=" in word)
        self.own_format = tuple(i for i, word in enumerate(words) if "~" in word)
        self.count = len(self.names)
        self.statistics = tuple(statistics.split())
        self.check = check
        self.params = params
        self.refuses = refuses
        self.formula = formula
        self.formula_of_backward = formula_of_backward
        self._plan = lru_cache(maxsize=4096)(self._make_plan)
        arguments = ", ".join(
            f"Tensor{'?' * lacks} {word}" for word, lacks in zip(self.names, self.optional, strict=True)
        )
        settings = f"{settings}, " if settings else ""
        result = f"({', '.join(['Tensor'] * (1 + len(self.statistics)))})" if statistics else "Tensor"
        self.op = define(
            f"{name}({arguments}, {settings}str? backend=None) -> {result}",
            {
                "CPU": self.forward_cpu,
                "CompositeExplicitAutograd": self.forward_any_device,
                "Fake": self.forward_fake,
                "Autograd": self._autograd,
                **{key: self._autocast(device_type) for key, device_type in AUTOCAST_DEVICES.items()},
            },
        )
        saved = "".join(f", Tensor {name}" for name in self.statistics)
        self.backward_op = define(
            f"{name}_backward(Tensor grad_output, {arguments}{saved}, {settings}bool[{self.count}] wanted, "
            "str? backend=None) -> Tensor[]",
            {
                "CPU": self.backward_cpu,
                "CompositeExplicitAutograd": self.backward_any_device,
                "Fake": self.backward_fake,
                "Autograd": self._backward_autograd,
            },
        )
        self._arguments = len(self.op._schema.arguments)
        self._backward_arguments = len(self.backward_op._schema.arguments)
        torch.library.register_vmap(f"cellops::{name}", self._vmap, lib=library)
        torch.library.register_vmap(f"cellops::{name}_backward", self._backward_vmap, lib=library)

    def __call__(self, *arguments: Any) -> Any:
        """Call the op with tensors, settings and backend, in one crossing to the dispatcher where that is enough."""
        if needs_dispatch():
            if is_transformed_for_reverse_mode():
                return FunctorchFunction.apply(self, *arguments)
            return self.op(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[: self.count]) and not is_traced():
            return Function.apply(self, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments)

    # Checks

    def _check_devices(self, tensors: Tensors) -> None:
        input = tensors[0]
        assert input is not None
        device = input.device
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor is None:
                continue
            expect_dense(name, tensor)
            if tensor.device != device:
                raise RuntimeError(f"{name} must be on {device} like the input, got {tensor.device}")

    def _check(self, tensors: Tensors, settings: tuple[Any, ...]) -> Shape:
        self._check_devices(tensors)
        self._check_dtypes(tuple(None if tensor is None else tensor.dtype for tensor in tensors))
        return self._check_shapes(tuple(None if tensor is None else tensor.shape for tensor in tensors), settings)

    def _check_dtypes(self, dtypes: Sequence[torch.dtype | None]) -> None:
        if dtypes[0] not in _native.DTYPE_CODES:
            raise TypeError(f"input must be one of {', '.join(map(str, _native.DTYPE_CODES))}, got {dtypes[0]}")
        for name, wide, optional, dtype in zip(self.names, self.wide, self.optional, dtypes, strict=True):
            if dtype is None and not optional:
                raise TypeError(f"{name} must be a tensor, got None")
            if dtype is None or dtype == dtypes[0]:
                continue
            if not wide:
                raise TypeError(f"{name} must be {dtypes[0]} like the input, got {dtype}")
            if dtypes[0].itemsize != 2 or dtype != torch.float32:
                either = f"{dtypes[0]} like the input" + (" or torch.float32" if dtypes[0].itemsize == 2 else "")
                raise TypeError(f"{name} must be {either}, got {dtype}")

    def _check_shapes(self, shapes: tuple[Shape | None, ...], settings: tuple[Any, ...]) -> Shape:
        input = shapes[0]
        assert input is not None
        if len(input) != 4:
            raise ValueError(f"input must have 4 dimensions, got {len(input)}: shape {tuple(input)}")
        if input[1] < 1 or input[2] < 1 or input[3] < 1:
            raise ValueError(f"input must have at least one channel, row and column, got shape {tuple(input)}")
        return self.check(Call(shapes, settings))

    def _check_grad_output(self, grad_output: Tensor, input: Tensor | None, shape: Shape) -> None:
        assert input is not None
        expect("grad_output", grad_output.shape, shape)
        if grad_output.dtype != input.dtype:
            raise TypeError(f"grad_output must be {input.dtype} like the input, got {grad_output.dtype}")

    def _make_plan(
        self,
        device_type: str,
        channels_last: tuple[bool, ...],
        config: Config,
        shapes: tuple[Shape | None, ...],
        dtypes: tuple[torch.dtype | None, ...],
    ) -> _Plan:
        self._check_dtypes(dtypes)
        output_shape = self._check_shapes(shapes, config[:-1])
        assert dtypes[0] is not None
        call = Call(shapes, config[:-1])
        by_cuda = _backend.refused_by_cuda(self.name, device_type, shapes, dtypes[0], channels_last[0])
        backend = _backend.choose(self.name, device_type, dtypes[0], config[-1], self.refuses(call), by_cuda).name
        params = None
        if backend == "cpu":
            codes = [None if dtype is None else _native.DTYPE_CODES[dtype] for dtype in dtypes]
            more: dict[str, Any] = {f"{self.names[i]}_dtype": codes[i] for i in self.own_dtype}
            for i, flag in zip(self.own_format, channels_last[1:], strict=True):
                more[f"{self.names[i]}_channels_last"] = flag
            params = self.params(call, dtype=codes[0], channels_last=channels_last[0], **more)
        memory_format = torch.channels_last if channels_last[0] else torch.contiguous_format
        return _Plan(backend, params, output_shape, memory_format, _wide(dtypes[0]))

    def _plan_of(self, device_type: str, tensors: Tensors, config: Config, channels_last: tuple[bool, ...]) -> _Plan:
        shapes = tuple([None if tensor is None else tensor.shape for tensor in tensors])
        dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
        return self._plan(device_type, channels_last, config, shapes, dtypes)

    def _plan_of_any_device(self, input: Tensor, tensors: Tensors, config: Config) -> _Plan:
        """Checks what the plan does not know, so that a repeated call checks no shape again."""
        self._check_devices(tensors)
        channels_last = input.dim() == 4 and _native.is_channels_last(input)
        return self._plan_of(input.device.type, tensors, config, (channels_last,))

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Tensors, Config]:
        """Tensors, and settings with the backend, which the dispatcher leaves out where it is None."""
        arguments += (None,) * (self._arguments - len(arguments))
        return arguments[: self.count], arguments[self.count :]

    def _split_backward(self, arguments: tuple[Any, ...]) -> tuple[Tensors, Tensors, Config, Sequence[bool]]:
        """Tensors, statistics, settings with the backend, and which gradients are wanted."""
        arguments += (None,) * (self._backward_arguments - 1 - len(arguments))
        end = self.count + len(self.statistics)
        *settings, wanted, backend = arguments[end:]
        return arguments[: self.count], arguments[self.count : end], (*settings, backend), wanted

    # Kernels

    def forward_cpu(self, *arguments: Any) -> Result:
        """Kernel of the op for tensors on the CPU."""
        tensors, config = self._split(arguments)
        tensors, channels_last = self._dense(tensors)
        plan = self._plan_of("cpu", tensors, config, channels_last)
        if plan.params is None:
            return self._forward_without_library(plan, tensors, config)
        output = torch.empty(plan.output_shape, dtype=arguments[0].dtype, memory_format=plan.memory_format)
        kernel = getattr(_native.library(), f"{self.name}_forward_cpu")
        statistics = [torch.empty(plan.output_shape[1], dtype=plan.wide) for _ in self.statistics]
        tensors = self._widened(tensors, plan.wide)
        kernel(plan.params, torch.get_num_threads(), *map(_native.pointer, (*tensors, output, *statistics)))
        return (output, *statistics) if statistics else output

    def forward_any_device(self, *arguments: Any) -> Result:
        """Kernel of the op for devices without one of their own."""
        tensors, config = self._split(arguments)
        plan = self._plan_of_any_device(arguments[0], tensors, config)
        return self._forward_without_library(plan, tensors, config)

    def _forward_without_library(self, plan: _Plan, tensors: Tensors, config: Config) -> Result:
        kernel = self.formula
        if plan.backend != "reference":
            kernel = _backend.gpu_launcher(plan.backend, self.name, "forward")
            tensors = self._dense(tensors)[0]
        with autocast_disabled(), device_of(tensors[0]):
            found = kernel(*tensors, *config[:-1])
        if not self.statistics:
            return found.contiguous(memory_format=plan.memory_format)
        return (found[0].contiguous(memory_format=plan.memory_format), *found[1:])

    def forward_fake(self, *arguments: Any) -> Result:
        """What the op returns, without values: the checks and allocation of the other kernels."""
        tensors, config = self._split(arguments)
        input, shape = arguments[0], self._check(tensors, config[:-1])
        output = input.new_empty(shape).contiguous(memory_format=_native.memory_format(input))
        if not self.statistics:
            return output
        return (output, *(input.new_empty(shape[1], dtype=_wide(input.dtype)) for _ in self.statistics))

    def forward_formula(self, tensors: Tensors, config: Config) -> Result:
        """The op as differentiable PyTorch ops, for the derivatives that no kernel has."""
        self._check(tensors, config[:-1])
        with autocast_disabled():
            found = self.formula(*tensors, *config[:-1])
        output, *statistics = found if self.statistics else (found,)
        if not torch._C._are_functorch_transforms_active():  # vmap has no memory formats
            assert tensors[0] is not None
            output = output.contiguous(memory_format=_native.memory_format(tensors[0]))
        return (output, *(one.detach() for one in statistics)) if statistics else output

    def backward_cpu(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Kernel of the backward op for tensors on the CPU: the wanted gradients, in order."""
        given, statistics, config, wanted = self._split_backward(arguments)
        tensors, channels_last = self._dense(given)
        plan = self._plan_of("cpu", tensors, config, channels_last)
        self._check_grad_output(grad_output, tensors[0], plan.output_shape)
        if plan.params is None:
            return self._backward_without_library(plan, grad_output, given, statistics, config, wanted)
        gradients = [
            _empty_gradient(tensor, plan.wide if wide else tensor.dtype, i == 0 or i in self.own_format)
            if want and tensor is not None
            else None
            for i, (tensor, wide, want) in enumerate(zip(tensors, self.widened, wanted, strict=True))
        ]
        kernel = getattr(_native.library(), f"{self.name}_backward_cpu")
        grad_output = grad_output.contiguous(memory_format=plan.memory_format)
        tensors = self._widened(tensors, plan.wide)
        addresses = map(_native.pointer, (grad_output, *tensors, *statistics, *gradients))
        kernel(plan.params, torch.get_num_threads(), *addresses)
        return _like(gradients, given)

    def backward_any_device(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Kernel of the backward op for devices without one of their own."""
        tensors, statistics, config, wanted = self._split_backward(arguments)
        plan = self._plan_of_any_device(arguments[0], tensors, config)
        self._check_grad_output(grad_output, tensors[0], plan.output_shape)
        return self._backward_without_library(plan, grad_output, tensors, statistics, config, wanted)

    def _backward_without_library(
        self,
        plan: _Plan,
        grad_output: Tensor,
        tensors: Tensors,
        statistics: Tensors,
        config: Config,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        if plan.backend == "reference":
            return self.backward_formula(grad_output, tensors, config[:-1], wanted)
        kernel = _backend.gpu_launcher(plan.backend, self.name, "backward")
        grad_output = grad_output.contiguous(memory_format=plan.memory_format)
        with autocast_disabled(), device_of(grad_output):
            gradients = kernel(grad_output, *self._dense(tensors)[0], *statistics, *config[:-1], wanted)
        return _like(
            [
                gradient if want and tensor is not None else None
                for gradient, tensor, want in zip(gradients, tensors, wanted, strict=True)
            ],
            tensors,
        )

    def backward_fake(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """What the backward op returns, without values."""
        tensors, _, config, wanted = self._split_backward(arguments)
        shape = self._check(tensors, config[:-1])
        self._check_grad_output(grad_output, tensors[0], shape)
        return [
            with_strides_of(tensor, torch.empty_like(tensor, memory_format=_format(tensor)))
            for tensor, want in zip(tensors, wanted, strict=True)
            if want and tensor is not None
        ]

    def backward_formula(
        self, grad_output: Tensor, tensors: Tensors, settings: tuple[Any, ...], wanted: Sequence[bool]
    ) -> list[Tensor]:
        """The backward op as differentiable PyTorch ops."""
        with autocast_disabled():
            gradients = self.formula_of_backward(grad_output, *tensors, *settings)
        plain = torch._C._are_functorch_transforms_active()  # vmap has no memory formats
        return [
            gradient if plain else gradient.contiguous(memory_format=_format(tensor))
            for gradient, tensor, want in zip(gradients, tensors, wanted, strict=True)
            if want and gradient is not None
        ]

    def _dense(self, tensors: Tensors) -> tuple[Tensors, tuple[bool, ...]]:
        """The tensors as the library reads them, and which of those with a memory format are channels_last."""
        dense, flags = [], []
        for i, tensor in enumerate(tensors):
            keeps = i == 0 or i in self.own_format
            if tensor is not None and not tensor.is_contiguous():
                tensor = _native.dense(tensor) if keeps and tensor.dim() == 4 else tensor.contiguous()
            dense.append(tensor)
            if keeps:
                flags.append(tensor is not None and not tensor.is_contiguous())
        return tuple(dense), tuple(flags)

    def _widened(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        """The tensors, those marked "+" alone in the type that the library computes in."""
        if tensors[0].dtype == dtype:
            return tensors
        return tuple(
            tensor.to(dtype) if wide and tensor is not None else tensor
            for tensor, wide in zip(tensors, self.widened, strict=True)
        )

    # Derivatives

    def gradients(self, ctx: Any, grad_output: Tensor) -> Tensors:
        """The gradients that a Function owes for its tensors, by the backward op."""
        saved = ctx.saved_tensors  # once: checkpoints compute each again as it is asked for
        tensors = saved[: self.count]
        wanted = [
            need and tensor is not None
            for need, tensor in zip(ctx.needs_input_grad[1 : self.count + 1], tensors, strict=True)
        ]
        *settings, backend = ctx.config
        with once_through_dispatcher():
            found = iter(one_by_one(lambda one: self.backward_op(one, *saved, *settings, wanted, backend), grad_output))
        return tuple(next(found) if want else None for want in wanted)

    def _autograd(self, *arguments: Any) -> Result:
        tensors, config = self._split(arguments)
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
        if takes_formula(self.name, tensors, differentiable, config[-1]):
            return self.forward_formula(tensors, config)
        if differentiable:
            return Function.apply(self, *tensors, *config)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*tensors, *config)

    def _backward_autograd(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, statistics, (*settings, backend), wanted = self._split_backward(arguments)
        every = (grad_output, *tensors)
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*every)
        if has_tangent(every) or (differentiable and torch._C._are_functorch_transforms_active()):
            return self.backward_formula(grad_output, tensors, tuple(settings), wanted)
        if differentiable:
            return list(BackwardFunction.apply(self, *every, *statistics, (*settings, wanted, backend)))
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op(*every, *statistics, *settings, wanted, backend)

    def _autocast(self, device_type: str) -> Callable[..., Result]:
        def kernel(*arguments: Any) -> Result:
            tensors, config = self._split(arguments)
            dtype = torch.get_autocast_dtype(device_type)
            with autocast_disabled():
                cast = [
                    tensor if wide else autocast(tensor, dtype) for tensor, wide in zip(tensors, self.wide, strict=True)
                ]
                return self.op(*cast, *config)

        return kernel

    # vmap: one call for each slice

    def _vmap(self, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        found = [self.op(*one) for one in slices(info.batch_size, dims, arguments)]
        if not self.statistics:
            return torch.stack(found), 0
        stacked = tuple(torch.stack(each) for each in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)

    def _backward_vmap(
        self, info: Any, dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[list[Tensor], list[int]]:
        found = [self.backward_op(*one) for one in slices(info.batch_size, dims, arguments)]
        stacked = [torch.stack(gradients) for gradients in zip(*found, strict=True)]
        return stacked, [0] * len(stacked)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type that the library computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _format(tensor: Tensor) -> torch.memory_format:
    return _native.memory_format(tensor) if tensor.dim() == 4 else torch.contiguous_format


def _like(gradients: Sequence[Tensor | None], tensors: Tensors) -> list[Tensor]:
    """The gradients there are, each in its tensor's shape, dtype, memory format and strides.

    Reshaping to the same shape would change the strides of dimensions of size 1.
    """
    return [
        with_strides_of(
            tensor,
            (gradient if gradient.shape == tensor.shape else gradient.reshape(tensor.shape))
            .to(tensor.dtype)
            .contiguous(memory_format=_format(tensor)),
        )
        for gradient, tensor in zip(gradients, tensors, strict=True)
        if gradient is not None and tensor is not None
    ]


def _empty_gradient(tensor: Tensor, dtype: torch.dtype, keeps_format: bool) -> Tensor:
    """A gradient without values, as the library writes it."""
    memory_format = _format(tensor) if keeps_format else torch.contiguous_format
    return torch.empty_like(tensor, dtype=dtype, memory_format=memory_format)

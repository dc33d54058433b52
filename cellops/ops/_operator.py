"""An op in every layer of the dispatcher, from what is particular to it: its schema, its checks, its formula.

The op gets a kernel for the CPU and one for devices without their own, the fake, the Autograd key, autocast and vmap,
and a backward op of the same standing. First derivatives are the backend's; higher ones, and forward mode, come from
the formula in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _backend, _native
from cellops.ops._registration import (
    AUTOCAST_DEVICES,
    autocast,
    autocast_disabled,
    define,
    expect,
    has_tangent,
    is_transformed_for_reverse_mode,
    library,
    needs_dispatch,
    takes_formula,
)

Shape = tuple[int, ...]
Tensors = tuple[Tensor | None, ...]
Config = tuple[Any, ...]
"""The op's settings, then the backend."""


class Call(NamedTuple):
    """A call by its shapes, which may be symbolic; `None` for an absent tensor."""

    shapes: tuple[Shape | None, ...]
    settings: tuple[Any, ...]


class _Plan(NamedTuple):
    """All that a launch needs to know of a configuration, found once for all its calls."""

    params: Any  # the library's, None where the reference runs
    output_shape: Shape
    memory_format: torch.memory_format


class Operator:
    """One op.

    Args:
        name: `cellops::<name>`, and the name of the entry points `<name>_forward_cpu` and `<name>_backward_cpu`.
        tensors: names of the tensor arguments, optional ones with a "?"; the first is "input", of 4 dimensions, whose
            memory format the output keeps. The others are handed to the library contiguous.
        settings: the schema's text for what follows the tensors: "str act, str gate".
        check: raises for a wrong `Call`, and returns the output's shape.
        params: from a valid `Call` and the keywords `dtype` (the library's code) and `channels_last`, the library's
            parameters.
        formula: the reference, called with tensors and settings in order.
        formula_of_backward: the same for the gradients, called with grad_output, tensors and settings; one gradient for
            each tensor, None for an absent one. Made of differentiable ops, not of autograd: it runs under functorch.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        settings: str,
        *,
        check: Callable[[Call], Shape],
        params: Callable[..., Any],
        formula: Callable[..., Tensor],
        formula_of_backward: Callable[..., Tensors],
    ) -> None:
        self.name = name
        self.names = tuple(word.rstrip("?") for word in tensors.split())
        self.optional = tuple(word.endswith("?") for word in tensors.split())
        self.count = len(self.names)
        self.check = check
        self.params = params
        self.formula = formula
        self.formula_of_backward = formula_of_backward
        self._plan = lru_cache(maxsize=4096)(self._make_plan)
        arguments = ", ".join(
            f"Tensor{'?' * lacks} {word}" for word, lacks in zip(self.names, self.optional, strict=True)
        )
        settings = f"{settings}, " if settings else ""
        self.op = define(
            f"{name}({arguments}, {settings}str? backend=None) -> Tensor",
            {
                "CPU": self.forward_cpu,
                "CompositeExplicitAutograd": self.forward_any_device,
                "Fake": self.forward_fake,
                "Autograd": self._autograd,
                **{key: self._autocast(device_type) for key, device_type in AUTOCAST_DEVICES.items()},
            },
        )
        self.backward_op = define(
            f"{name}_backward(Tensor grad_output, {arguments}, {settings}bool[{self.count}] wanted, "
            "str? backend=None) -> Tensor[]",
            {
                "CPU": self.backward_cpu,
                "CompositeExplicitAutograd": self.backward_any_device,
                "Fake": self.backward_fake,
                "Autograd": self._backward_autograd,
            },
        )
        torch.library.register_vmap(f"cellops::{name}", self._vmap, lib=library)
        torch.library.register_vmap(f"cellops::{name}_backward", self._backward_vmap, lib=library)

    def __call__(self, *arguments: Any) -> Tensor:
        """Call the op with tensors, settings and backend, in one crossing to the dispatcher where that is enough."""
        if needs_dispatch():
            if is_transformed_for_reverse_mode():
                return _FunctorchFunction.apply(self, *arguments)
            return self.op(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[: self.count]):
            return _Function.apply(self, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments)

    # Checks

    def _check(self, tensors: Tensors, settings: tuple[Any, ...]) -> Shape:
        input = tensors[0]
        assert input is not None
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor is not None and tensor.device != input.device:
                raise RuntimeError(f"{name} must be on {input.device} like the input, got {tensor.device}")
        self._check_dtypes(tuple(None if tensor is None else tensor.dtype for tensor in tensors))
        return self._check_shapes(tuple(None if tensor is None else tensor.shape for tensor in tensors), settings)

    def _check_dtypes(self, dtypes: Sequence[torch.dtype | None]) -> None:
        if dtypes[0] not in _native.DTYPE_CODES:
            raise TypeError(f"input must be one of {', '.join(map(str, _native.DTYPE_CODES))}, got {dtypes[0]}")
        for name, dtype in zip(self.names, dtypes, strict=True):
            if dtype is not None and dtype != dtypes[0]:
                raise TypeError(f"{name} must be {dtypes[0]} like the input, got {dtype}")

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
        channels_last: bool,
        config: Config,
        shapes: tuple[Shape | None, ...],
        dtypes: tuple[torch.dtype | None, ...],
    ) -> _Plan:
        self._check_dtypes(dtypes)
        output_shape = self._check_shapes(shapes, config[:-1])
        assert dtypes[0] is not None
        backend = _backend.choose(self.name, device_type, dtypes[0], config[-1]).name
        params = None
        if backend == "cpu":
            code = _native.DTYPE_CODES[dtypes[0]]
            params = self.params(Call(shapes, config[:-1]), dtype=code, channels_last=channels_last)
        return _Plan(params, output_shape, torch.channels_last if channels_last else torch.contiguous_format)

    def _plan_of(self, device_type: str, tensors: Tensors, config: Config, channels_last: bool) -> _Plan:
        shapes = tuple([None if tensor is None else tensor.shape for tensor in tensors])
        dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
        return self._plan(device_type, channels_last, config, shapes, dtypes)

    def _split(self, arguments: tuple[Any, ...], more: int = 0) -> tuple[Tensors, Config]:
        """Tensors, and settings with the backend, which the dispatcher leaves out where it is None."""
        wanted = len(self.op._schema.arguments) + more
        arguments += (None,) * (wanted - len(arguments))
        return arguments[: self.count], arguments[self.count :]

    # Kernels

    def forward_cpu(self, *arguments: Any) -> Tensor:
        """Kernel of the op for tensors on the CPU."""
        tensors, config = self._split(arguments)
        tensors, channels_last = _dense(tensors)
        plan = self._plan_of("cpu", tensors, config, channels_last)
        if plan.params is None:
            return self._reference(tensors, config, plan.memory_format)
        output = torch.empty(plan.output_shape, dtype=arguments[0].dtype, memory_format=plan.memory_format)
        kernel = getattr(_native.library(), f"{self.name}_forward_cpu")
        kernel(plan.params, torch.get_num_threads(), *map(_native.pointer, tensors), output.data_ptr())
        return output

    def forward_any_device(self, *arguments: Any) -> Tensor:
        """Kernel of the op for devices without one of their own."""
        tensors, config = self._split(arguments)
        self._check(tensors, config[:-1])
        memory_format = _native.memory_format(arguments[0])
        self._plan_of(arguments[0].device.type, tensors, config, memory_format is torch.channels_last)
        return self._reference(tensors, config, memory_format)

    def _reference(self, tensors: Tensors, config: Config, memory_format: torch.memory_format) -> Tensor:
        with autocast_disabled():
            return self.formula(*tensors, *config[:-1]).contiguous(memory_format=memory_format)

    def forward_fake(self, *arguments: Any) -> Tensor:
        """What the op returns, without values: the checks and allocation of the other kernels."""
        tensors, config = self._split(arguments)
        shape = self._check(tensors, config[:-1])
        return arguments[0].new_empty(shape).contiguous(memory_format=_native.memory_format(arguments[0]))

    def forward_formula(self, tensors: Tensors, config: Config) -> Tensor:
        """The op as differentiable PyTorch ops, for the derivatives that no kernel has."""
        self._check(tensors, config[:-1])
        with autocast_disabled():
            output = self.formula(*tensors, *config[:-1])
        if torch._C._are_functorch_transforms_active():
            return output  # vmap has no memory formats
        assert tensors[0] is not None
        return output.contiguous(memory_format=_native.memory_format(tensors[0]))

    def backward_cpu(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Kernel of the backward op for tensors on the CPU: the wanted gradients, in order."""
        tensors, (*settings, wanted, backend) = self._split(arguments, 1)
        tensors, channels_last = _dense(tensors)
        plan = self._plan_of("cpu", tensors, (*settings, backend), channels_last)
        self._check_grad_output(grad_output, tensors[0], plan.output_shape)
        if plan.params is None:
            return self.backward_formula(grad_output, tensors, tuple(settings), wanted)
        gradients = self._allocate(tensors, wanted)
        kernel = getattr(_native.library(), f"{self.name}_backward_cpu")
        grad_output = grad_output.contiguous(memory_format=plan.memory_format)
        addresses = map(_native.pointer, (grad_output, *tensors, *gradients))
        kernel(plan.params, torch.get_num_threads(), *addresses)
        return [gradient for gradient in gradients if gradient is not None]

    def backward_any_device(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Kernel of the backward op for devices without one of their own."""
        tensors, (*settings, wanted, backend) = self._split(arguments, 1)
        shape = self._check(tensors, tuple(settings))
        self._check_grad_output(grad_output, tensors[0], shape)
        self._plan_of(grad_output.device.type, tensors, (*settings, backend), False)
        return self.backward_formula(grad_output, tensors, tuple(settings), wanted)

    def backward_fake(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """What the backward op returns, without values."""
        tensors, (*settings, wanted, _) = self._split(arguments, 1)
        shape = self._check(tensors, tuple(settings))
        self._check_grad_output(grad_output, tensors[0], shape)
        return [gradient for gradient in self._allocate(tensors, wanted) if gradient is not None]

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

    def _allocate(self, tensors: Tensors, wanted: Sequence[bool]) -> list[Tensor | None]:
        """The gradients without values, each in its tensor's layout, None where not wanted."""
        return [
            torch.empty_like(tensor, memory_format=_format(tensor)) if want and tensor is not None else None
            for tensor, want in zip(tensors, wanted, strict=True)
        ]

    # Derivatives

    def gradients(self, ctx: Any, grad_output: Tensor) -> Tensors:
        """The gradients that a Function owes for its tensors, by the backward op."""
        wanted = [
            need and tensor is not None
            for need, tensor in zip(ctx.needs_input_grad[1 : self.count + 1], ctx.saved_tensors, strict=True)
        ]
        found = iter(self.backward_op(grad_output, *ctx.saved_tensors, *ctx.config[:-1], wanted, ctx.config[-1]))
        return tuple(next(found) if want else None for want in wanted)

    def _autograd(self, *arguments: Any) -> Tensor:
        tensors, config = self._split(arguments)
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
        if takes_formula(self.name, tensors, differentiable, config[-1]):
            return self.forward_formula(tensors, config)
        if differentiable:
            return _Function.apply(self, *tensors, *config)
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*tensors, *config)

    def _backward_autograd(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, (*settings, wanted, backend) = self._split(arguments, 1)
        every = (grad_output, *tensors)
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*every)
        if has_tangent(every) or (differentiable and torch._C._are_functorch_transforms_active()):
            return self.backward_formula(grad_output, tensors, tuple(settings), wanted)
        if differentiable:
            return list(_BackwardFunction.apply(self, grad_output, *tensors, (*settings, wanted, backend)))
        with torch._C._AutoDispatchBelowAutograd():
            return self.backward_op(grad_output, *tensors, *settings, wanted, backend)

    def _autocast(self, device_type: str) -> Callable[..., Tensor]:
        def kernel(*arguments: Any) -> Tensor:
            tensors, config = self._split(arguments)
            dtype = torch.get_autocast_dtype(device_type)
            with autocast_disabled():
                return self.op(*(autocast(tensor, dtype) for tensor in tensors), *config)

        return kernel

    # vmap: one call for each slice

    def _vmap(self, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        slices = _slices(info.batch_size, dims, arguments)
        return torch.stack([self.op(*one) for one in slices]), 0

    def _backward_vmap(
        self, info: Any, dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[list[Tensor], list[int]]:
        found = [self.backward_op(*one) for one in _slices(info.batch_size, dims, arguments)]
        stacked = [torch.stack(gradients) for gradients in zip(*found, strict=True)]
        return stacked, [0] * len(stacked)


def _slices(size: int, dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[list[Any]]:
    return [
        [
            argument if dim is None or not isinstance(argument, Tensor) else argument.select(dim, i)
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        for i in range(size)
    ]


def _format(tensor: Tensor | None) -> torch.memory_format:
    return _native.memory_format(tensor) if tensor is not None and tensor.dim() == 4 else torch.contiguous_format


def _dense(tensors: Tensors) -> tuple[Tensors, bool]:
    """The tensors as the library reads them, and whether the first is channels_last."""
    input, *others = tensors
    assert input is not None
    channels_last = False
    if not input.is_contiguous() and input.dim() == 4:
        input = _native.dense(input)
        channels_last = not input.is_contiguous()
    return (input, *[tensor if tensor is None else tensor.contiguous() for tensor in others]), channels_last


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator.op(*arguments)
        ctx.operator = operator
        ctx.save_for_backward(*arguments[: operator.count])
        ctx.config = arguments[operator.count :]
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensors:
        return None, *ctx.operator.gradients(ctx, grad_output), *(None for _ in ctx.config)


class _FunctorchFunction(torch.autograd.Function):
    """The form that `torch.func` transforms ask for; in eager mode it costs three times as much."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Operator, *arguments: Any) -> Tensor:
        return operator.op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operator, *arguments = inputs
        ctx.save_for_backward(*arguments[: ctx.operator.count])
        ctx.config = tuple(arguments[ctx.operator.count :])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensors:
        return None, *ctx.operator.gradients(ctx, grad_output), *(None for _ in ctx.config)


class _BackwardFunction(torch.autograd.Function):
    """First derivatives by the backend, their derivatives by the formula."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, ctx.config = arguments
        ctx.operator = operator
        with torch._C._AutoDispatchBelowAutograd():
            gradients = operator.backward_op(*tensors, *ctx.config)
        ctx.save_for_backward(*tensors)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor) -> Tensors:
        create_graph = torch.is_grad_enabled()
        *settings, wanted, _ = ctx.config
        with torch.enable_grad():
            # views, so that what one argument may owe to another does not count as its own
            grad_output, *tensors = (None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors)
            gradients = ctx.operator.backward_formula(grad_output, tuple(tensors), tuple(settings), wanted)
        needs = ctx.needs_input_grad[1:-1]
        leaves = [tensor for tensor, need in zip((grad_output, *tensors), needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(gradients, leaves, grad_gradients, create_graph=create_graph, allow_unused=True)
        )
        return None, *(next(found) if need else None for need in needs), None

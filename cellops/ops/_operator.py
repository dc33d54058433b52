"""An op in every layer of the dispatcher, from what is particular to it: its schema, its checks, its formula.

The op gets a kernel for the CPU and one for devices without their own, the fake, the Autograd key, autocast and vmap,
and a backward op of the same standing. First derivatives are the backend's; higher ones, and forward mode, come from
the formula in the reference.

An op may also return statistics, which have no gradient: what a batch normalisation keeps of its batch. And it may
have a second forward op, for training alone, which returns what would be dear to compute again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _backend, _native
from cellops.ops._operator_arguments import Arguments, Call, Shape, Tensors, wide_type
from cellops.ops._operator_functions import BackwardFunction, Function, FunctorchFunction, slices
from cellops.ops._registration import (
    AUTOCAST_DEVICES,
    autocast,
    autocast_disabled,
    define,
    device_of,
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

Config = tuple[Any, ...]
"""The op's settings, then the backend."""

Result = Tensor | tuple[Tensor, ...]
"""The output; the output and its statistics where the op has any."""


class _Plan(NamedTuple):
    """All that a launch needs to know of a configuration, found once for all its calls."""

    backend: str
    params: Any  # the library's, None where another backend runs
    output_shape: Shape
    memory_format: torch.memory_format
    wide: torch.dtype  # what the library computes in


class Operator(Arguments):
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
        saves: names of what `cellops::<name>_for_backward` returns after that, for backward to get as well: on the CPU,
            whose library fills it, in one dimension as many numbers as the output has and one more, in the type that
            it computes in; else without elements.
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
        saves: str = "",
        refuses: Callable[[Call], str | None] = lambda call: None,
    ) -> None:
        self.name = name
        super().__init__(tensors, statistics, saves, check)
        self.params = params
        self.refuses = refuses
        self.formula = formula
        self.formula_of_backward = formula_of_backward
        self._plan = lru_cache(maxsize=4096)(self._make_plan)
        arguments = ", ".join(
            f"Tensor{'?' * lacks} {word}" for word, lacks in zip(self.names, self.optional, strict=True)
        )
        settings = f"{settings}, " if settings else ""
        forward = f"({arguments}, {settings}str? backend=None)"
        self.op = self.training_op = self._define_forward(name, forward, saves=False)
        if self.saved:
            self.training_op = self._define_forward(f"{name}_for_backward", forward, saves=True)
        known = "".join(f", Tensor {name}" for name in self.statistics)
        saved = "".join(f", Tensor? {name}=None" for name in self.saved)  # last and optional: older graphs lack them
        self.backward_op = define(
            f"{name}_backward(Tensor grad_output, {arguments}{known}, {settings}bool[{self.count}] wanted, "
            f"str? backend=None{saved}) -> Tensor[]",
            {
                "CPU": self.backward_cpu,
                "CompositeExplicitAutograd": self.backward_any_device,
                "Fake": self.backward_fake,
                "Autograd": self._backward_autograd,
            },
        )
        self._arguments = len(self.op._schema.arguments)
        self._backward_arguments = len(self.backward_op._schema.arguments)
        torch.library.register_vmap(f"cellops::{name}_backward", self._backward_vmap, lib=library)

    def _define_forward(self, name: str, arguments: str, *, saves: bool) -> torch._ops.OpOverload:
        """Define a forward op, which returns its output, the statistics and, with `saves`, what it saves."""
        count = 1 + len(self.statistics) + saves * len(self.saved)
        op = define(
            f"{name}{arguments} -> {'Tensor' if count == 1 else '(' + ', '.join(['Tensor'] * count) + ')'}",
            {
                "CPU": partial(self.forward_cpu, saves=saves),
                "CompositeExplicitAutograd": partial(self.forward_any_device, saves=saves),
                "Fake": partial(self.forward_fake, saves=saves),
                "Autograd": partial(self._autograd, saves=saves),
                **{key: partial(self._autocast, device, saves=saves) for key, device in AUTOCAST_DEVICES.items()},
            },
        )
        torch.library.register_vmap(f"cellops::{name}", partial(self._vmap, op), lib=library)
        return op

    def __call__(self, *arguments: Any) -> Any:
        """Call the op with tensors, settings and backend, in one crossing to the dispatcher where that is enough."""
        if needs_dispatch():
            if is_transformed_for_reverse_mode():
                return self._returned(FunctorchFunction.apply(self, *arguments))
            return self.op(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[: self.count]) and not is_traced():
            return self._returned(Function.apply(self, *arguments))
        with torch._C._AutoDispatchBelowAutograd():
            return self.op(*arguments)

    def _returned(self, result: Result) -> Result:
        """What the op returns of what `training_op` does."""
        return result[: 1 + len(self.statistics)] if self.saved else result

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
        return _Plan(backend, params, output_shape, memory_format, wide_type(dtypes[0]))

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
        """Tensors, what forward returned beside the output, settings with the backend, and the wanted gradients."""
        arguments += (None,) * (self._backward_arguments - 1 - len(arguments))
        first, last = self.count + len(self.statistics), len(arguments) - len(self.saved)
        *settings, wanted, backend = arguments[first:last]
        of_forward = arguments[self.count : first] + arguments[last:]
        return arguments[: self.count], of_forward, (*settings, backend), wanted

    def call_backward(self, tensors: Tensors, of_forward: Tensors, config: Config, wanted: Sequence[bool]) -> Any:
        """The backward op of grad_output and the tensors, and of what forward returned beside its output."""
        *settings, backend = config
        count = len(self.statistics)
        return self.backward_op(*tensors, *of_forward[:count], *settings, wanted, backend, *of_forward[count:])

    # Kernels

    def forward_cpu(self, *arguments: Any, saves: bool = False) -> Result:
        """Kernel of the op for tensors on the CPU."""
        tensors, config = self._split(arguments)
        tensors, channels_last = self._dense(tensors)
        plan = self._plan_of("cpu", tensors, config, channels_last)
        if plan.params is None:
            return self._forward_without_library(plan, tensors, config, saves)
        output = torch.empty(plan.output_shape, dtype=arguments[0].dtype, memory_format=plan.memory_format)
        kernel = getattr(_native.library(), f"{self.name}_forward_cpu")
        statistics = [torch.empty(plan.output_shape[1], dtype=plan.wide) for _ in self.statistics]
        saved = self._saved(output, config, saves)
        tensors = self._widened(tensors, plan.wide)
        written = (output, *statistics, *(saved or [None] * len(self.saved)))
        kernel(plan.params, torch.get_num_threads(), *map(_native.pointer, (*tensors, *written)))
        return (output, *statistics, *saved) if statistics else output

    def forward_any_device(self, *arguments: Any, saves: bool = False) -> Result:
        """Kernel of the op for devices without one of their own."""
        tensors, config = self._split(arguments)
        plan = self._plan_of_any_device(arguments[0], tensors, config)
        return self._forward_without_library(plan, tensors, config, saves)

    def _forward_without_library(self, plan: _Plan, tensors: Tensors, config: Config, saves: bool) -> Result:
        kernel = self.formula
        if plan.backend != "reference":
            kernel = _backend.gpu_launcher(plan.backend, self.name, "forward")
            tensors = self._dense(tensors)[0]
        with autocast_disabled(), device_of(tensors[0]):
            found = kernel(*tensors, *config[:-1])
        if not self.statistics:
            return found.contiguous(memory_format=plan.memory_format)
        output = found[0].contiguous(memory_format=plan.memory_format)
        return (output, *found[1:], *(one.zero_() for one in self._saved(output, config, saves)))

    def forward_fake(self, *arguments: Any, saves: bool = False) -> Result:
        """What the op returns, without values: the checks and allocation of the other kernels."""
        tensors, config = self._split(arguments)
        input, shape = arguments[0], self._check(tensors, config[:-1])
        output = input.new_empty(shape).contiguous(memory_format=_native.memory_format(input))
        if not self.statistics:
            return output
        statistics = [input.new_empty(shape[1], dtype=wide_type(input.dtype)) for _ in self.statistics]
        return (output, *statistics, *self._saved(output, config, saves))

    def _saved(self, output: Tensor, config: Config, saves: bool) -> list[Tensor]:
        """Room for what is saved, if it is: as many numbers as the output has and one more, which tells their order.

        Its shape follows from the device and the backend that was asked for alone, as what was compiled is kept in
        caches, which know no more. Elsewhere than in the library nobody fills or reads it.
        """
        if not saves:
            return []
        if output.device.type != "cpu" or config[-1] not in (None, "cpu"):
            return [output.new_empty(0) for _ in self.saved]
        return [output.new_empty(output.numel() + 1, dtype=wide_type(output.dtype)) for _ in self.saved]

    def forward_formula(self, tensors: Tensors, config: Config, saves: bool) -> Result:
        """The op as differentiable PyTorch ops, for the derivatives that no kernel has."""
        self._check(tensors, config[:-1])
        with autocast_disabled():
            found = self.formula(*tensors, *config[:-1])
        output, *statistics = found if self.statistics else (found,)
        if not torch._C._are_functorch_transforms_active():  # vmap has no memory formats
            assert tensors[0] is not None
            output = output.contiguous(memory_format=_native.memory_format(tensors[0]))
        if not statistics:
            return output
        return (
            output,
            *(one.detach() for one in statistics),
            *(one.zero_() for one in self._saved(output, config, saves)),
        )

    def backward_cpu(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Kernel of the backward op for tensors on the CPU: the wanted gradients, in order."""
        given, of_forward, config, wanted = self._split_backward(arguments)
        tensors, channels_last = self._dense(given)
        plan = self._plan_of("cpu", tensors, config, channels_last)
        self._check_grad_output(grad_output, tensors[0], plan.output_shape)
        if plan.params is None:
            return self._backward_without_library(plan, grad_output, given, of_forward, config, wanted)
        gradients = [
            _empty_gradient(tensor, plan.wide if wide else tensor.dtype, i == 0 or i in self.own_format)
            if want and tensor is not None
            else None
            for i, (tensor, wide, want) in enumerate(zip(tensors, self.widened, wanted, strict=True))
        ]
        kernel = getattr(_native.library(), f"{self.name}_backward_cpu")
        grad_output = grad_output.contiguous(memory_format=plan.memory_format)
        tensors = self._widened(tensors, plan.wide)
        of_forward = self._of_forward(of_forward, plan.output_shape, plan.wide)
        addresses = map(_native.pointer, (grad_output, *tensors, *of_forward, *gradients))
        kernel(plan.params, torch.get_num_threads(), *addresses)
        return _like(gradients, given)

    def backward_any_device(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        """Kernel of the backward op for devices without one of their own."""
        tensors, of_forward, config, wanted = self._split_backward(arguments)
        plan = self._plan_of_any_device(arguments[0], tensors, config)
        self._check_grad_output(grad_output, tensors[0], plan.output_shape)
        return self._backward_without_library(plan, grad_output, tensors, of_forward, config, wanted)

    def _backward_without_library(
        self,
        plan: _Plan,
        grad_output: Tensor,
        tensors: Tensors,
        of_forward: Tensors,
        config: Config,
        wanted: Sequence[bool],
    ) -> list[Tensor]:
        if plan.backend == "reference":
            return self.backward_formula(grad_output, tensors, config[:-1], wanted)
        kernel = _backend.gpu_launcher(plan.backend, self.name, "backward")
        grad_output = grad_output.contiguous(memory_format=plan.memory_format)
        with autocast_disabled(), device_of(grad_output):
            known = of_forward[: len(self.statistics)]
            gradients = kernel(grad_output, *self._dense(tensors)[0], *known, *config[:-1], wanted)
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

    # Derivatives

    def gradients(self, ctx: Any, grad_output: Tensor) -> Tensors:
        """The gradients that a Function owes for its tensors, by the backward op."""
        saved = ctx.saved_tensors  # once: checkpoints compute each again as it is asked for
        tensors = saved[: self.count]
        wanted = [
            need and tensor is not None
            for need, tensor in zip(ctx.needs_input_grad[1 : self.count + 1], tensors, strict=True)
        ]
        of_forward = saved[self.count :]
        with once_through_dispatcher():
            found = iter(
                one_by_one(lambda one: self.call_backward((one, *tensors), of_forward, ctx.config, wanted), grad_output)
            )
        return tuple(next(found) if want else None for want in wanted)

    def _autograd(self, *arguments: Any, saves: bool) -> Result:
        tensors, config = self._split(arguments)
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
        if takes_formula(self.name, tensors, differentiable, config[-1]):
            return self.forward_formula(tensors, config, saves)
        if differentiable:
            result = Function.apply(self, *tensors, *config)
            return result if saves else self._returned(result)
        with torch._C._AutoDispatchBelowAutograd():
            return self._forward(saves)(*tensors, *config)

    def _forward(self, saves: bool) -> torch._ops.OpOverload:
        return self.training_op if saves else self.op

    def _backward_autograd(self, grad_output: Tensor, *arguments: Any) -> list[Tensor]:
        tensors, of_forward, config, wanted = self._split_backward(arguments)
        every = (grad_output, *tensors)
        differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*every)
        if has_tangent(every) or (differentiable and torch._C._are_functorch_transforms_active()):
            return self.backward_formula(grad_output, tensors, config[:-1], wanted)
        if differentiable:
            return list(BackwardFunction.apply(self, *every, *of_forward, (config, wanted)))
        with torch._C._AutoDispatchBelowAutograd():
            return self.call_backward(every, of_forward, config, wanted)

    def _autocast(self, device_type: str, *arguments: Any, saves: bool) -> Result:
        tensors, config = self._split(arguments)
        dtype = torch.get_autocast_dtype(device_type)
        with autocast_disabled():
            cast = [
                tensor if wide else autocast(tensor, dtype) for tensor, wide in zip(tensors, self.wide, strict=True)
            ]
            return self._forward(saves)(*cast, *config)

    # vmap: one call for each slice

    def _vmap(self, op: Any, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        found = [op(*one) for one in slices(info.batch_size, dims, arguments)]
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

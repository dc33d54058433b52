"""The autograd Functions of `Operator`, and the slices that its vmap goes through.

An op may return more after its output, statistics and what it saves: they have no gradient and are saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]


class Function(torch.autograd.Function):
    """The op with its backward op behind it."""

    @staticmethod
    def forward(ctx: Any, operator: Any, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result = operator.training_op(*arguments)
        ctx.set_materialize_grads(False)  # what has no gradient may be as large as the output: no zeros for it
        ctx.operator = operator
        ctx.config = arguments[operator.count :]
        statistics = _statistics(ctx, result)
        ctx.save_for_backward(*arguments[: operator.count], *statistics)
        return result

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Tensors:
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, *ctx.operator.gradients(ctx, grad_output), *(None for _ in ctx.config)


class FunctorchFunction(torch.autograd.Function):
    """The form that `torch.func` transforms ask for; in eager mode it costs three times as much."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Any, *arguments: Any) -> Any:
        return operator.training_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator, *arguments = inputs
        ctx.config = tuple(arguments[ctx.operator.count :])
        statistics = _statistics(ctx, output)
        ctx.save_for_backward(*arguments[: ctx.operator.count], *statistics)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *_: Any) -> Tensors:
        return None, *ctx.operator.gradients(ctx, grad_output), *(None for _ in ctx.config)


def _statistics(ctx: Any, result: Any) -> tuple[Tensor, ...]:
    """What the op returned after its output, marked as having no gradient."""
    if isinstance(result, Tensor):
        return ()
    ctx.mark_non_differentiable(*result[1:])
    return tuple(result[1:])


class BackwardFunction(torch.autograd.Function):
    """First derivatives by the backend, their derivatives by the formula."""

    @staticmethod
    def forward(ctx: Any, operator: Any, *arguments: Any) -> tuple[Tensor, ...]:
        *tensors, (config, wanted) = arguments
        ctx.operator, ctx.settings, ctx.wanted = operator, config[:-1], wanted
        count = 1 + operator.count
        with torch._C._AutoDispatchBelowAutograd():
            gradients = operator.call_backward(tensors[:count], tensors[count:], config, wanted)
        ctx.save_for_backward(*tensors[:count])  # the formula finds the statistics again
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor) -> Tensors:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that what one argument may owe to another does not count as its own
            views = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            gradients = ctx.operator.backward_formula(views[0], tuple(views[1:]), ctx.settings, ctx.wanted)
        needs = ctx.needs_input_grad[1 : 1 + len(views)]
        leaves = [tensor for tensor, need in zip(views, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad(gradients, leaves, grad_gradients, create_graph=create_graph, allow_unused=True)
        )
        owed = [next(found) if need else None for need in needs]
        return None, *owed, *(None for _ in (*ctx.operator.statistics, *ctx.operator.saved)), None


def slices(size: int, dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[list[Any]]:
    """The arguments of each of `size` calls that a vmapped call stands for."""
    return [
        [
            argument if dim is None or not isinstance(argument, Tensor) else argument.select(dim, i)
            for argument, dim in zip(arguments, dims, strict=True)
        ]
        for i in range(size)
    ]

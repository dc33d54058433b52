"""Deformable convolution: y[o, p] = bias[o] + sum over c, k: weight[o, c, k] * mask[k, p] * x[c](p + k + offset[k, p]).

Dai et al. 2017 (v1) and Zhu et al. 2019 (v2, with a mask). Arguments, sampling and the order of the offset's channels
are torchvision's. Saved for backward: input, offset, weight, mask; columns are computed again.

The op takes stride, padding and dilation as six integers: as three lists they would cost 1.4 µs more at every crossing
from Python to the dispatcher (4.2 against 2.8 µs on an AMD EPYC with torch 2.15).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cellops.ops import _deform_conv2d_launch as launch
from cellops.ops._registration import (
    AUTOCAST_DEVICES,
    autocast,
    autocast_disabled,
    define,
    has_tangent,
    integer,
    is_traced,
    is_transformed_for_reverse_mode,
    library,
    needs_dispatch,
    once_through_dispatcher,
    one_by_one,
    takes_formula,
)

Gradients = tuple[Tensor | None, ...]

_below_autograd = torch._C._AutoDispatchBelowAutograd


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    dilation: int | tuple[int, int] = (1, 1),
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Deformable convolution, v2 with a `mask` and v1 without; stands in for `torchvision.ops.deform_conv2d`.

    Output pixel (oy, ox) samples tap (i, j) bilinearly at `y = oy * stride - padding + i * dilation + dy`, x likewise.
    A point with y < -1, y >= H, x < -1 or x >= W, so also an infinite one, gives 0; a corner outside the image counts
    as 0. A NaN coordinate gives NaN. On the integer grid the offset's gradient is the right derivative.

    Args:
        input: [N, C, H, W], NCHW or channels_last; the output keeps its memory format.
        offset: [N, D*KH*KW*2, OH, OW] in pixels: offset-group-major, taps row-major, (dy, dx) per tap. May be float32
            beside a half-precision input.
        weight: [O, C/G, KH, KW]. The number of groups G follows from it, the number of offset groups D from `offset`.
        bias: [O], or None.
        stride, padding, dilation: an integer or (vertical, horizontal), in pixels.
        mask: [N, D*KH*KW, OH, OW], a factor for each sample, or None.
        backend: "cpu", "cuda", "triton" or "reference", which then runs forward and backward or raises. None takes the
            best. Second derivatives and forward-mode AD go through the reference.

    Returns:
        [N, O, OH, OW] of the input's dtype.

    Raises:
        ValueError: a shape, `stride`, `padding`, `dilation` or `backend` is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: tensors are on different devices, or the backend asked for cannot run.
        ImportError: the backend asked for is not installed.
    """
    if needs_dispatch():
        config = (*pair("stride", stride), *pair("padding", padding), *pair("dilation", dilation), backend)
        if is_transformed_for_reverse_mode():
            return _DeformConv2dFunctorch.apply(input, offset, weight, bias, mask, *config)
        return _op(input, offset, weight, bias, mask, *config)
    try:
        (stride_y, stride_x), (pad_y, pad_x), (dilation_y, dilation_x) = stride, padding, dilation  # type: ignore[misc]
    except (TypeError, ValueError):
        stride_y, stride_x = pair("stride", stride)
        pad_y, pad_x = pair("padding", padding)
        dilation_y, dilation_x = pair("dilation", dilation)
    if input is None or offset is None or weight is None:
        missing = ("input", "offset", "weight")[(input, offset, weight).index(None)]
        raise TypeError(f"{missing} must be a tensor, got None")
    differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(input, offset, weight, bias, mask)
    try:
        if differentiable and not is_traced():
            config = (stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, backend)
            return _DeformConv2d.apply(input, offset, weight, bias, mask, config)
        with _below_autograd():
            return _call(
                input, offset, weight, bias, mask, stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, backend
            )
    except RuntimeError:  # perhaps the dispatcher's, of what is no integer: it names the six of the schema
        for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
            pair(name, value)
        raise


def pair(name: str, value: Any) -> tuple[int, int]:
    """An integer, or a pair of them, as (vertical, horizontal).

    Raises:
        ValueError: it is neither, naming the argument.
    """
    both = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
    if not all(isinstance(one, (int, torch.SymInt)) or hasattr(one, "__index__") for one in both):
        raise ValueError(f"{name} must be an integer or a pair (vertical, horizontal), got {value!r}")
    return integer(name, both[0]), integer(name, both[1])


# Reverse mode


class _DeformConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        config: launch.Config,
    ) -> Tensor:
        with _below_autograd():
            output = _call(input, offset, weight, bias, mask, *config)
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.config = config
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        return *_gradients(ctx, grad_output), None


class _DeformConv2dFunctorch(torch.autograd.Function):
    """The form that `torch.func` transforms ask for; in eager mode it costs three times as much."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *config: Any
    ) -> Tensor:
        return _op(input, offset, weight, bias, mask, *config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, offset, weight, _, mask, *config = inputs
        ctx.save_for_backward(input, offset, weight, mask)
        ctx.config = tuple(config)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        return *_gradients(ctx, grad_output), *(None for _ in ctx.config)


def _gradients(ctx: Any, grad_output: Tensor) -> Gradients:
    wanted = ctx.needs_input_grad[:5]
    sizes, backend = ctx.config[:6], ctx.config[6]
    saved = ctx.saved_tensors
    with once_through_dispatcher():
        found = iter(one_by_one(lambda one: _backward_op(one, *saved, *sizes, wanted, backend), grad_output))
    return tuple(next(found) if want else None for want in wanted)


class _DeformConv2dBackward(torch.autograd.Function):
    """First derivatives by the backend, their derivatives by the reference."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        tensors, ctx.config = arguments[:5], arguments[5]
        with _below_autograd():
            gradients = _backward_op(*tensors, *ctx.config)
        ctx.save_for_backward(*tensors)
        return tuple(gradients)

    @staticmethod
    def backward(ctx: Any, *grad_gradients: Tensor) -> Gradients:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, so that what one argument may owe to another does not count as its own
            tensors = [None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            gradients = launch.backward_formula(*tensors, *ctx.config)
        leaves = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad, strict=False) if need]
        found = iter(
            torch.autograd.grad(gradients, leaves, grad_gradients, create_graph=create_graph, allow_unused=True)
        )
        return *(next(found) if need else None for need in ctx.needs_input_grad[:5]), None


def _autograd(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *config: Any
) -> Tensor:
    tensors = (input, offset, weight, bias, mask)
    config += launch.DEFAULTS[len(config) :]
    differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    if takes_formula("deform_conv2d", tensors, differentiable, config[6]):
        return launch.forward_formula(*tensors, *config)
    if differentiable:
        return _DeformConv2d.apply(*tensors, config)
    with _below_autograd():
        return _op(*tensors, *config)


def _backward_autograd(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *config: Any
) -> list[Tensor]:
    tensors = (grad_output, input, offset, weight, mask)
    differentiable = torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    if has_tangent(tensors) or (differentiable and torch._C._are_functorch_transforms_active()):
        return launch.backward_formula(*tensors, *config)
    if differentiable:
        return list(_DeformConv2dBackward.apply(*tensors, config))
    with _below_autograd():
        return _backward_op(*tensors, *config)


def _autocast(device_type: str) -> Callable[..., Tensor]:
    """Casts all but the offset, whose coordinates need more than a half type's digits; it may stay float32."""

    def kernel(
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        *config: Any,
    ) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with autocast_disabled():
            input, weight, bias, mask = (autocast(tensor, dtype) for tensor in (input, weight, bias, mask))
            if offset.dtype != input.dtype:
                offset = autocast(offset, torch.float32)
            return _op(input, offset, weight, bias, mask, *config)

    return kernel


# vmap: the mapped dimension becomes part of the batch, or, where every sample has its own weight, of the groups


def _front(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The tensor with the mapped dimension first."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _into_batch(tensor: Tensor | None) -> Tensor | None:
    """[B, N, ...] -> [B*N, ...]."""
    return None if tensor is None else tensor.flatten(0, 1)


def _into_channels(tensor: Tensor | None) -> Tensor | None:
    """[B, N, C, H, W] -> [N, B*C, H, W]."""
    return None if tensor is None else tensor.transpose(0, 1).flatten(1, 2)


def _vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
    size, config = info.batch_size, arguments[5:]
    input, offset, weight, bias, mask = arguments[:5]
    _, _, weight_dim, bias_dim, _ = dims[:5]
    input, offset, mask = (_front(arguments[i], dims[i], size) for i in (0, 1, 4))
    if weight_dim is None and bias_dim is None:
        output = _op(_into_batch(input), _into_batch(offset), weight, bias, _into_batch(mask), *config)
        return output.unflatten(0, (size, -1)), 0
    weight, bias = _into_batch(_front(weight, weight_dim, size)), _into_batch(_front(bias, bias_dim, size))
    output = _op(_into_channels(input), _into_channels(offset), weight, bias, _into_channels(mask), *config)
    return output.unflatten(1, (size, -1)), 1


def _backward_vmap(info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[list[Tensor], list[int]]:
    size, config = info.batch_size, arguments[5:]
    grad_output, input, offset, weight, mask = (
        _front(tensor, dim, size) for tensor, dim in zip(arguments[:5], dims[:5], strict=True)
    )
    images = (_into_channels(tensor) for tensor in (grad_output, input, offset))
    found = _backward_op(*images, _into_batch(weight), _into_channels(mask), *config)
    wanted: Sequence[bool] = config[6]
    split_dims = [dim for dim, want in zip((1, 1, 0, 0, 1), wanted, strict=True) if want]
    return [gradient.unflatten(dim, (size, -1)) for gradient, dim in zip(found, split_dims, strict=True)], split_dims


_op = define(
    "deform_conv2d(Tensor input, Tensor offset, Tensor weight, Tensor? bias=None, Tensor? mask=None, "
    "SymInt stride_height=1, SymInt stride_width=1, SymInt pad_height=0, SymInt pad_width=0, "
    "SymInt dilation_height=1, SymInt dilation_width=1, str? backend=None) -> Tensor",
    {
        "CPU": launch.forward_cpu,
        "CompositeExplicitAutograd": launch.forward_any_device,
        "Fake": launch.forward_fake,
        "Autograd": _autograd,
        **{key: _autocast(device_type) for key, device_type in AUTOCAST_DEVICES.items()},
    },
)
_call = _op._op  # the overload without its Python frame: 0.25 µs a call
_backward_op = define(
    "deform_conv2d_backward(Tensor grad_output, Tensor input, Tensor offset, Tensor weight, Tensor? mask, "
    "SymInt stride_height, SymInt stride_width, SymInt pad_height, SymInt pad_width, "
    "SymInt dilation_height, SymInt dilation_width, bool[5] wanted, str? backend=None) -> Tensor[]",
    {
        "CPU": launch.backward_cpu,
        "CompositeExplicitAutograd": launch.backward_any_device,
        "Fake": launch.backward_fake,
        "Autograd": _backward_autograd,
    },
)
torch.library.register_vmap("cellops::deform_conv2d", _vmap, lib=library)
torch.library.register_vmap("cellops::deform_conv2d_backward", _backward_vmap, lib=library)

"""One call of deformable convolution below autograd: is it valid, which backend takes it, run it.

Every kernel here takes the op's arguments as the dispatcher gives them: trailing defaults are left out of `config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _backend, _native
from cellops.ops._registration import autocast_disabled, device_of, expect, expect_dense, with_strides_of
from cellops.reference import deform_conv2d as reference

Shape = Sequence[int]
Config = tuple[Any, ...]
"""stride_height, stride_width, pad_height, pad_width, dilation_height, dilation_width, backend."""

DEFAULTS: Config = (1, 1, 0, 0, 1, 1, None)
_NCHW = (False, False, False, False)


class Sizes(NamedTuple):
    """What the shapes of a valid call say."""

    output: tuple[int, int, int, int]
    groups: int
    offset_groups: int


def check_shapes(
    input: Shape, offset: Shape, weight: Shape, bias: Shape | None, mask: Shape | None, config: Config
) -> Sizes:
    """Check a call by its shapes, which may be symbolic.

    Raises:
        ValueError: naming the argument, what it was and what was expected.
    """
    for name, shape in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask)):
        if shape is not None and len(shape) != 4:
            raise ValueError(f"{name} must have 4 dimensions, got {len(shape)}: shape {tuple(shape)}")
    batch, channels, height, width = input
    out_channels, group_channels, kernel_height, kernel_width = weight
    if channels < 1 or height < 1 or width < 1:
        raise ValueError(f"input must have at least one channel, row and column, got shape {tuple(input)}")
    if out_channels < 1 or group_channels < 1 or kernel_height < 1 or kernel_width < 1:
        raise ValueError(f"weight must have no empty dimension, got shape {tuple(weight)}")
    for name, first, least in (("stride", 0, 1), ("padding", 2, 0), ("dilation", 4, 1)):
        if config[first] < least or config[first + 1] < least:
            raise ValueError(f"{name} must be at least {least}, got {config[first : first + 2]}")
    if channels % group_channels:
        raise ValueError(
            f"weight must have a number of channels per group that divides the input's {channels} channels, "
            f"got {group_channels}: shape {tuple(weight)}"
        )
    groups = channels // group_channels
    if out_channels % groups:
        raise ValueError(
            f"weight must have a multiple of {groups} output channels for {groups} groups, got shape {tuple(weight)}"
        )

    out_height, out_width = (
        (size + 2 * config[2 + axis] - config[4 + axis] * (kernel - 1) - 1) // config[axis] + 1
        for axis, size, kernel in ((0, height, kernel_height), (1, width, kernel_width))
    )
    if out_height < 1 or out_width < 1:
        raise ValueError(
            f"input is too small: {height} x {width} pixels with a {kernel_height} x {kernel_width} kernel, "
            f"stride {config[0:2]}, padding {config[2:4]} and dilation {config[4:6]} give an output of "
            f"{out_height} x {out_width}"
        )
    taps = kernel_height * kernel_width
    offset_groups = offset[1] // (2 * taps)
    if offset_groups < 1 or offset[1] % (2 * taps) or channels % offset_groups:
        raise ValueError(
            f"offset must have offset_groups * 2 * {taps} channels, offset_groups a divisor of the input's {channels} "
            f"channels, got {offset[1]} channels: shape {tuple(offset)}"
        )
    expect("offset", offset, (batch, offset[1], out_height, out_width))
    expect("mask", mask, (batch, offset_groups * taps, out_height, out_width))
    expect("bias", bias, (out_channels,))
    return Sizes((batch, out_channels, out_height, out_width), groups, offset_groups)


def check_dtypes(
    input: torch.dtype, offset: torch.dtype, weight: torch.dtype, bias: torch.dtype | None, mask: torch.dtype | None
) -> None:
    """Check a call by its dtypes.

    Raises:
        TypeError: naming the argument, what it was and what was expected.
    """
    if input not in _native.DTYPE_CODES:
        raise TypeError(f"input must be one of {', '.join(map(str, _native.DTYPE_CODES))}, got {input}")
    for name, dtype in (("weight", weight), ("bias", bias), ("mask", mask)):
        if dtype is not None and dtype != input:
            raise TypeError(f"{name} must be {input} like the input, got {dtype}")
    if offset != input and not (offset == torch.float32 and input.itemsize == 2):
        also = " or torch.float32" if input.itemsize == 2 else ""
        raise TypeError(f"offset must be {input} like the input{also}, got {offset}")


def check_devices(input: Tensor, **others: Tensor | None) -> None:
    """Check that all tensors are dense, and where the input is.

    Raises:
        TypeError: naming the argument and its layout.
        RuntimeError: naming the argument, where it is and where it was expected.
    """
    expect_dense("input", input)
    for name, tensor in others.items():
        expect_dense(name, tensor)
        if tensor is not None and tensor.device != input.device:
            raise RuntimeError(f"{name} must be on {input.device} like the input, got {tensor.device}")


class _Plan(NamedTuple):
    """All that a launch needs to know of a configuration, found once for all its calls."""

    backend: str
    backend_of_backward: str
    params: Any  # _C.DeformConv2dParams, None where another backend runs
    output_shape: tuple[int, int, int, int]
    output_strides: tuple[int, ...]
    memory_format: torch.memory_format
    config: Config


def first_of_gpu(group_out: int) -> tuple[str, str]:
    """The backend that a GPU takes first in forward and in backward, for so many output channels of a group.

    CUDA's kernels win where Triton's would sample the input again for more output channels, and in backward, whose
    additions they make in shared memory.
    """
    return "cuda" if group_out > 256 else "triton", "cuda"


@lru_cache(maxsize=4096)
def _plan(
    device_type: str,
    layouts: tuple[bool, bool, bool, bool],
    config: Config,
    input: Shape,
    offset: Shape,
    weight: Shape,
    bias: Shape | None,
    mask: Shape | None,
    input_dtype: torch.dtype,
    offset_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    mask_dtype: torch.dtype | None,
) -> _Plan:
    """Check a configuration and choose its backend.

    Args:
        device_type: of every tensor.
        layouts: whether input, offset, weight and mask are channels_last.
        config: may lack trailing defaults.
        input, offset, weight, bias, mask: shapes, None for an absent tensor.
        input_dtype, offset_dtype, weight_dtype, bias_dtype, mask_dtype: None for an absent tensor.
    """
    config += DEFAULTS[len(config) :]
    check_dtypes(input_dtype, offset_dtype, weight_dtype, bias_dtype, mask_dtype)
    sizes = check_shapes(input, offset, weight, bias, mask, config)
    refused = _refuses(device_type, input, weight, sizes.output, config)
    by_cuda = _backend.refused_by_cuda("deform_conv2d", device_type, (input, offset), input_dtype, layouts[0])
    backend, of_backward = (
        _backend.choose("deform_conv2d", device_type, input_dtype, config[6], refused, by_cuda, first).name
        for first in first_of_gpu(weight[0] // sizes.groups)
    )
    memory_format = torch.channels_last if layouts[0] else torch.contiguous_format
    strides = torch.empty(sizes.output, device="meta", memory_format=memory_format).stride()
    if backend != "cpu":
        return _Plan(backend, of_backward, None, sizes.output, strides, memory_format, config)
    params = _native.library().DeformConv2dParams(
        batch=input[0],
        in_channels=input[1],
        in_height=input[2],
        in_width=input[3],
        out_channels=weight[0],
        out_height=sizes.output[2],
        out_width=sizes.output[3],
        kernel_height=weight[2],
        kernel_width=weight[3],
        stride_height=config[0],
        stride_width=config[1],
        pad_height=config[2],
        pad_width=config[3],
        dilation_height=config[4],
        dilation_width=config[5],
        groups=sizes.groups,
        offset_groups=sizes.offset_groups,
        dtype=_native.DTYPE_CODES[input_dtype],
        offset_dtype=_native.DTYPE_CODES[offset_dtype],
        input_channels_last=layouts[0],
        offset_channels_last=layouts[1],
        weight_channels_last=layouts[2],
        mask_channels_last=layouts[3],
        output_channels_last=layouts[0],
    )
    return _Plan(backend, of_backward, params, sizes.output, strides, memory_format, config)


def _refuses(device_type: str, input: Shape, weight: Shape, output: Shape, config: Config) -> str | None:
    """Why no kernel that the call may take can index its images, a constant; None where one can.

    The library numbers the pixels of an image in 32 bits, those of an output in 64; so does CUDA, which says itself
    where it ends. Triton's kernels number both in 32 bits, up to a block beyond the last one, and weights too.
    """
    pixels, out_pixels = input[2] * input[3], output[2] * output[3]
    if pixels >= 2**31:
        return "an image has 2^31 pixels or more"
    if max(input[2] + 2 * config[2], input[3] + 2 * config[3]) >= 2**31:
        return "a padded image has 2^31 rows or columns or more"
    if config[6] in ("cpu", "cuda") or (device_type == "cpu" and config[6] is None):
        return None
    if max(pixels, out_pixels) > 2**31 - _LARGEST_BLOCK:
        return "an image or its output has about 2^31 pixels or more"
    return "the weight has 2^31 elements or more" if math.prod(weight) >= 2**31 else None


_LARGEST_BLOCK = 128  # of pixels, in Triton's kernels


def _plan_of(
    device_type: str,
    layouts: tuple[bool, bool, bool, bool],
    config: Config,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
) -> _Plan:
    return _plan(
        device_type,
        layouts,
        config,
        input.shape,
        offset.shape,
        weight.shape,
        None if bias is None else bias.shape,
        None if mask is None else mask.shape,
        input.dtype,
        offset.dtype,
        weight.dtype,
        None if bias is None else bias.dtype,
        None if mask is None else mask.dtype,
    )


def _dense(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """The tensors, each dense in one of its two layouts, and whether it is channels_last."""
    tensors = [
        tensor if tensor is None or tensor.dim() != 4 else _native.dense(tensor)
        for tensor in (input, offset, weight, mask)
    ]
    return (*tensors, tuple(tensor is not None and not tensor.is_contiguous() for tensor in tensors))


def forward_cpu(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *config: Any
) -> Tensor:
    """Kernel of the op for tensors on the CPU."""
    layouts = _NCHW
    if not (
        input.is_contiguous()
        and offset.is_contiguous()
        and weight.is_contiguous()
        and (mask is None or mask.is_contiguous())
    ):
        if input.numel() >= 2**31:  # refused before gigabytes are copied
            _plan_of("cpu", _NCHW, config, input, offset, weight, bias, mask)
        input, offset, weight, mask, layouts = _dense(input, offset, weight, mask)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    plan = _plan(
        "cpu",
        layouts,
        config,
        input.shape,
        offset.shape,
        weight.shape,
        None if bias is None else bias.shape,
        None if mask is None else mask.shape,
        input.dtype,
        offset.dtype,
        weight.dtype,
        None if bias is None else bias.dtype,
        None if mask is None else mask.dtype,
    )
    if plan.params is None:
        return _forward_without_library(plan, input, offset, weight, bias, mask)
    output = input.new_empty_strided(plan.output_shape, plan.output_strides)  # 0.7 µs less than torch.empty(shape)
    _native._C.deform_conv2d_forward_cpu(
        plan.params,
        torch.get_num_threads(),
        input.data_ptr(),
        offset.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
    )
    return output


def forward_any_device(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *config: Any
) -> Tensor:
    """Kernel of the op for devices without one of their own."""
    check_devices(input, offset=offset, weight=weight, bias=bias, mask=mask)
    layouts = (_native.is_channels_last(input), False, False, False) if input.dim() == 4 else _NCHW
    plan = _plan_of(input.device.type, layouts, config, input, offset, weight, bias, mask)
    return _forward_without_library(plan, input, offset, weight, bias, mask)


def _forward_without_library(
    plan: _Plan, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    stride, padding, dilation = plan.config[0:2], plan.config[2:4], plan.config[4:6]
    kernel = reference.deform_conv2d
    if plan.backend != "reference":
        kernel = _backend.gpu_launcher(plan.backend, "deform_conv2d", "forward")
        input, offset, weight, mask, _ = _dense(input, offset, weight, mask)
        bias = None if bias is None else bias.contiguous()
    with autocast_disabled(), device_of(input):
        output = kernel(input, offset, weight, bias, stride, padding, dilation, mask)
        return output.contiguous(memory_format=plan.memory_format)


def forward_fake(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None, *config: Any
) -> Tensor:
    """What the op returns, without values: the checks and allocation of the other kernels."""
    sizes = _check_fake(input, offset, weight, bias, mask, config)
    return torch.empty(sizes.output, dtype=input.dtype, device=input.device, memory_format=_native.memory_format(input))


def forward_formula(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *config: Any
) -> Tensor:
    """The op as differentiable PyTorch ops, for the derivatives that no kernel has."""
    _check_fake(input, offset, weight, bias, mask, config)
    with autocast_disabled():
        output = reference.deform_conv2d(input, offset, weight, bias, config[0:2], config[2:4], config[4:6], mask)
    if torch._C._are_functorch_transforms_active():
        return output  # vmap has no memory formats
    return output.contiguous(memory_format=_native.memory_format(input))


def _check_fake(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, config: Config
) -> Sizes:
    check_devices(input, offset=offset, weight=weight, bias=bias, mask=mask)
    tensors = (input, offset, weight, bias, mask)
    check_dtypes(*(None if tensor is None else tensor.dtype for tensor in tensors))
    shapes = (None if tensor is None else tensor.shape for tensor in tensors)
    return check_shapes(*shapes, config + DEFAULTS[len(config) :])  # type: ignore[call-arg]


# Backward: `config` is the six integers, the flags `wanted` for (input, offset, weight, bias, mask), and the backend.


def backward_cpu(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *config: Any
) -> list[Tensor]:
    """Kernel of the backward op for tensors on the CPU: the wanted gradients, in order."""
    config, wanted = _split(config)
    input, offset, weight, mask, layouts = _dense(input, offset, weight, mask)
    plan = _plan_of("cpu", layouts, config, input, offset, weight, None, mask)
    _check_grad_output(grad_output, input, plan.output_shape)
    if plan.params is None:
        return _backward_without_library(plan, grad_output, input, offset, weight, mask, wanted)
    gradients = _allocate(input, offset, weight, mask, wanted)
    grad_input, grad_offset, grad_weight, grad_bias, grad_mask = map(_native.pointer, gradients)
    grad_output = grad_output.contiguous(memory_format=plan.memory_format)
    _native.library().deform_conv2d_backward_cpu(
        plan.params,
        torch.get_num_threads(),
        grad_output.data_ptr(),
        input.data_ptr(),
        offset.data_ptr(),
        _native.pointer(mask),
        weight.data_ptr(),
        grad_input,
        grad_offset,
        grad_mask,
        grad_weight,
        grad_bias,
    )
    return _there(gradients, weight)


def backward_any_device(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *config: Any
) -> list[Tensor]:
    """Kernel of the backward op for devices without one of their own."""
    config, wanted = _split(config)
    check_devices(input, grad_output=grad_output, offset=offset, weight=weight, mask=mask)
    layouts = (_native.is_channels_last(input), False, False, False) if input.dim() == 4 else _NCHW
    plan = _plan_of(input.device.type, layouts, config, input, offset, weight, None, mask)
    _check_grad_output(grad_output, input, plan.output_shape)
    return _backward_without_library(plan, grad_output, input, offset, weight, mask, wanted)


def _backward_without_library(
    plan: _Plan,
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    stride, padding, dilation = plan.config[0:2], plan.config[2:4], plan.config[4:6]
    formats = _formats(input, offset, weight, mask)
    kernel = reference.deform_conv2d_backward
    if plan.backend != "reference":
        kernel = _backend.gpu_launcher(plan.backend_of_backward, "deform_conv2d", "backward")
        grad_output = grad_output.contiguous(memory_format=plan.memory_format)
        input, offset, weight, mask, _ = _dense(input, offset, weight, mask)
    with autocast_disabled(), device_of(input):
        gradients = kernel(grad_output, input, offset, weight, stride, padding, dilation, mask, wanted)
    dtypes = (input.dtype, offset.dtype, weight.dtype, weight.dtype, input.dtype)
    found = [
        None if gradient is None else gradient.to(dtype).contiguous(memory_format=memory_format)
        for gradient, dtype, memory_format in zip(gradients, dtypes, formats, strict=True)
    ]
    return _there(found, weight)


def _there(gradients: list[Tensor | None], weight: Tensor) -> list[Tensor]:
    """The gradients there are, that of the weight with its strides."""
    if gradients[2] is not None:
        gradients[2] = with_strides_of(weight, gradients[2])
    return [gradient for gradient in gradients if gradient is not None]


def backward_fake(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *config: Any
) -> list[Tensor]:
    """What the backward op returns, without values."""
    config, wanted = _split(config)
    sizes = _check_fake(input, offset, weight, None, mask, config)
    check_devices(input, grad_output=grad_output)
    _check_grad_output(grad_output, input, sizes.output)
    return _there(_allocate(input, offset, weight, mask, wanted), weight)


def backward_formula(
    grad_output: Tensor, input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, *config: Any
) -> list[Tensor]:
    """The backward op as differentiable PyTorch ops."""
    stride, padding, dilation, wanted = config[0:2], config[2:4], config[4:6], config[6]
    with autocast_disabled():
        gradients = reference.deform_conv2d_backward(
            grad_output, input, offset, weight, stride, padding, dilation, mask, wanted
        )
    return [gradient for gradient in gradients if gradient is not None]


def _split(config: Config) -> tuple[Config, Sequence[bool]]:
    return config[:6] + config[7:], config[6]


def _check_grad_output(grad_output: Tensor, input: Tensor, shape: Shape) -> None:
    expect("grad_output", grad_output.shape, shape)
    if grad_output.dtype != input.dtype:
        raise TypeError(f"grad_output must be {input.dtype} like the input, got {grad_output.dtype}")


def _formats(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> list[torch.memory_format]:
    """Memory formats of the five gradients."""
    of_input, of_offset, of_weight, of_mask = (
        torch.contiguous_format if tensor is None else _native.memory_format(tensor)
        for tensor in (input, offset, weight, mask)
    )
    return [of_input, of_offset, of_weight, torch.contiguous_format, of_mask]


def _allocate(
    input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The five gradients without values, each in its tensor's layout, None where not wanted."""
    tensors = (input, offset, weight, None, mask)
    gradients = [
        torch.empty_like(tensor, memory_format=memory_format) if want and tensor is not None else None
        for tensor, memory_format, want in zip(tensors, _formats(input, offset, weight, mask), wanted, strict=True)
    ]
    if wanted[3]:
        gradients[3] = weight.new_empty(weight.shape[0])
    return gradients

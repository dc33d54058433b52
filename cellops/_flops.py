"""FLOP formulas of the ops for `torch.utils.flop_counter.FlopCounterMode`, registered with the import of cellops.

They follow torch's counter: two for each multiply-add of a convolution or product, none for what is done element by
element (normalisation, activation, pooling, gates). A fused op so counts as its plain composition does. A bilinear
sample counts as the four multiply-adds that it is. Work that a kernel does twice counts once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = Sequence[int]

SAMPLE = 2 * 4
"""Of one bilinear sample."""


def _convolution(input: Shape, weight: Shape, pixels: int) -> int:
    """Of a convolution with `weight` [O, C / groups, *kernel] at so many pixels of each image."""
    return 2 * input[0] * pixels * math.prod(weight)


def _pixels(shape: Shape) -> int:
    return math.prod(shape[2:])


def _wanted(arguments: Sequence[Any]) -> Sequence[bool]:
    """Which gradients a backward op was asked for: its only argument that is a list of flags."""
    (found,) = (
        one
        for one in arguments
        if isinstance(one, (list, tuple)) and one and all(isinstance(flag, bool) for flag in one)
    )
    return found


def deform_conv2d(input: Shape, offset: Shape, weight: Shape, *_: Any, out_shape: Shape, **kwargs: Any) -> int:
    """Every tap of every input channel is sampled once for each output pixel, then convolved."""
    samples = input[0] * input[1] * _pixels(weight) * _pixels(out_shape)
    return SAMPLE * samples + _convolution(input, weight, _pixels(out_shape))


def deform_conv2d_backward(
    grad_output: Shape, input: Shape, offset: Shape, weight: Shape, *arguments: Any, **kwargs: Any
) -> int:
    """A convolution for the columns' gradient where input, offset or mask wants one, and one for the weight's."""
    to_input, to_offset, to_weight, _, to_mask = _wanted(arguments)
    samples = input[0] * input[1] * _pixels(weight) * _pixels(grad_output)
    convolution = _convolution(input, weight, _pixels(grad_output))
    through_columns = to_input or to_offset or to_mask
    return (through_columns + to_weight) * convolution + SAMPLE * samples * (to_input + 2 * to_offset + to_mask)


def offset_sample2d(input: Shape, *_: Any, **kwargs: Any) -> int:
    """One sample of each value's own plane."""
    return SAMPLE * math.prod(input)


def offset_sample2d_backward(grad_output: Shape, *arguments: Any, **kwargs: Any) -> int:
    """Four corners get a part of the gradient; each of the two coordinates' is a sum over them."""
    to_input, to_offset = _wanted(arguments)
    return SAMPLE * math.prod(grad_output) * (to_input + 2 * to_offset)


def convolution(input: Shape, weight: Shape, *_: Any, **kwargs: Any) -> int:
    """Of `frelu`, `depthwise_conv2d`, `group_conv1x1`, with batch statistics or not, at every pixel of the input."""
    return _convolution(input, weight, _pixels(input))


def convolution_backward(grad_output: Shape, input: Shape, weight: Shape, *arguments: Any, **kwargs: Any) -> int:
    """One convolution for the input's gradient and one for the weight's."""
    wanted = _wanted(arguments)
    return _convolution(input, weight, _pixels(input)) * (wanted[0] + wanted[1])


def squeeze_excite(input: Shape, weight1: Shape, bias1: Shape | None, weight2: Shape, *_: Any, **kwargs: Any) -> int:
    """Two products for each image."""
    return 2 * input[0] * (math.prod(weight1) + math.prod(weight2))


def squeeze_excite_backward(
    grad_output: Shape,
    input: Shape,
    weight1: Shape,
    bias1: Shape | None,
    weight2: Shape,
    *arguments: Any,
    **kwargs: Any,
) -> int:
    """The products for the gradients to both layers' inputs and weights."""
    wanted = _wanted(arguments)
    first, second = 2 * input[0] * math.prod(weight1), 2 * input[0] * math.prod(weight2)
    return first * (wanted[0] + wanted[1]) + second * (any(wanted[:3]) + wanted[3])


def eca(input: Shape, weight: Shape, *_: Any, **kwargs: Any) -> int:
    """A convolution over the channels of each image."""
    return 2 * input[0] * input[1] * math.prod(weight)


def eca_backward(grad_output: Shape, input: Shape, weight: Shape, *arguments: Any, **kwargs: Any) -> int:
    """The same for the gradients to the means and to the weight."""
    return eca(input, weight) * sum(_wanted(arguments))


def spatial_attention(input: Shape, weight: Shape, *_: Any, **kwargs: Any) -> int:
    """The convolution that makes the map."""
    return _convolution(input, weight, _pixels(input))


FORMULAS: dict[str, Callable[..., int]] = {
    "deform_conv2d": deform_conv2d,
    "deform_conv2d_backward": deform_conv2d_backward,
    "offset_sample2d": offset_sample2d,
    "offset_sample2d_backward": offset_sample2d_backward,
    "frelu": convolution,
    "frelu_backward": convolution_backward,
    "frelu_batch_norm": convolution,
    "frelu_batch_norm_backward": convolution_backward,
    "depthwise_conv2d": convolution,
    "depthwise_conv2d_backward": convolution_backward,
    "depthwise_conv2d_batch_norm": convolution,
    "depthwise_conv2d_batch_norm_backward": convolution_backward,
    "group_conv1x1": convolution,
    "group_conv1x1_backward": convolution_backward,
    "group_conv1x1_batch_norm": convolution,
    "group_conv1x1_batch_norm_for_backward": convolution,
    "group_conv1x1_batch_norm_backward": convolution_backward,
    "squeeze_excite": squeeze_excite,
    "squeeze_excite_backward": squeeze_excite_backward,
    "eca": eca,
    "eca_backward": eca_backward,
    "spatial_attention": spatial_attention,
    "spatial_attention_backward": convolution_backward,
}
"""By the op's name in `torch.ops.cellops`."""

for _name, _formula in FORMULAS.items():
    register_flop_formula(getattr(torch.ops.cellops, _name))(_formula)

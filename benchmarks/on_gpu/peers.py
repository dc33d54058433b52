"""What a user could run on a GPU instead of each op, as functions of the op's own arguments.

"eager" is the composition of PyTorch's ops, which gives the same answer; the others are measures of speed alone: the
dense or grouped convolution of cuDNN of the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Peer = Callable[..., Tensor]
EPS = 1e-5


def eager(op: str) -> Peer:
    """The composition for an op, "<op>_batch_norm" included."""
    return _EAGER[op]


def others(op: str) -> dict[str, tuple[Peer, bool]]:
    """Further peers by name, and whether their answer is the op's; that torchvision is missing is seen when it runs."""
    if op == "deform_conv2d":
        return {"torchvision": (_torchvision, True), "dense": (_dense, False)}
    if op.startswith(("frelu", "depthwise_conv2d")):
        return {"depthwise conv": (_depthwise, False)}
    if op.startswith("group_conv1x1"):
        return {"grouped conv": (_grouped, False)}
    return {}


def prepared(op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as the eager peer takes them: a grid for `grid_sample`, ready-made."""
    if op != "offset_sample2d":
        return arguments
    input, offset = arguments["input"], arguments["offset"]
    height, width = offset.shape[2:]
    rows, columns = (torch.arange(size, device=offset.device) for size in (height, width))
    here = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    points = here + offset.float().reshape(-1, 2, height, width)
    last = torch.tensor([max(height - 1, 1), max(width - 1, 1)], device=offset.device).reshape(2, 1, 1)
    grid = (points * 2 / last - 1).flip(1).permute(0, 2, 3, 1).contiguous()
    return {"planes": input.contiguous().flatten(0, 1).unsqueeze(1), "grid": grid}


def batch_norm(input: Tensor, weight: Tensor, *, running: Tensor) -> Tensor:
    """In evaluation, by running mean and variance [2, C]: one op of PyTorch's, for the cost of a call."""
    return F.batch_norm(input, running[0], running[1], weight, eps=EPS)


def _grid_sample(planes: Tensor, grid: Tensor) -> Tensor:
    """Beside half types in float32, as [-1, 1] is too coarse in those; the conversions are timed."""
    found = F.grid_sample(planes.to(grid.dtype), grid, "bilinear", padding_mode="border", align_corners=True)
    return found.to(planes.dtype)


def _deform_conv2d(**arguments: Any) -> Tensor:
    from cellops.reference.deform_conv2d import deform_conv2d

    return deform_conv2d(**arguments)


def _torchvision(**arguments: Any) -> Tensor:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(**arguments)


def _dense(
    *, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, **_: Any
) -> Tensor:
    return F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1] // weight.shape[1])


def _depthwise(*, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return F.conv2d(input, weight, padding=weight.shape[2] // 2, groups=input.shape[1])


def _grouped(*, input: Tensor, weight: Tensor, groups: int, **_: Any) -> Tensor:
    return F.conv2d(input, weight, groups=groups)


def _normalized(z: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float | None) -> Tensor:
    """By the batch's statistics with an eps, by running ones of mean 0 and variance 1 without.

    An eps of 0, which would give the op's answer to the last digit, is refused by some versions of PyTorch.
    """
    if eps is not None:
        return F.batch_norm(z, None, None, gamma, beta, training=True, eps=eps)
    zeros = torch.zeros(z.shape[1], device=z.device, dtype=z.dtype)
    return F.batch_norm(z, zeros, zeros + 1, gamma, beta, eps=EPS)


def _depthwise_normalized(
    *, input: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float | None = None
) -> Tensor:
    return _normalized(_depthwise(input=input, weight=weight), scale, shift, eps)


def _frelu(*, input: Tensor, **arguments: Any) -> Tensor:
    return torch.maximum(input, _depthwise_normalized(input=input, **arguments))


def _frelu_batch_norm(*, gamma: Tensor | None, beta: Tensor | None, **arguments: Any) -> Tensor:
    return _frelu(scale=gamma, shift=beta, **arguments)


def _depthwise_conv2d(*, activation: str, **arguments: Any) -> Tensor:
    return _ACTIVATIONS[activation](_depthwise_normalized(**arguments))


def _depthwise_conv2d_batch_norm(*, gamma: Tensor | None, beta: Tensor | None, **arguments: Any) -> Tensor:
    return _depthwise_conv2d(scale=gamma, shift=beta, **arguments)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
}


def _group_conv1x1(
    *,
    input: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    activation: str,
    shuffle: bool,
    eps: float | None = None,
) -> Tensor:
    z = _normalized(_grouped(input=input, weight=weight, groups=groups), scale, shift, eps)
    y = _ACTIVATIONS[activation](z)
    return F.channel_shuffle(y, groups) if shuffle else y


def _group_conv1x1_batch_norm(*, gamma: Tensor | None, beta: Tensor | None, **arguments: Any) -> Tensor:
    return _group_conv1x1(scale=gamma, shift=beta, **arguments)


def _squeeze_excite(
    *,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
) -> Tensor:
    hidden = _ACTIVATIONS[act](F.conv2d(input.mean((2, 3), keepdim=True), weight1, bias1))
    return input * _ACTIVATIONS[gate](F.conv2d(hidden, weight2, bias2))


def _eca(*, input: Tensor, weight: Tensor) -> Tensor:
    mean = input.mean((2, 3)).unsqueeze(1)
    scale = F.conv1d(mean, weight, padding=weight.shape[2] // 2).sigmoid()
    return input * scale.transpose(1, 2).unsqueeze(-1)


def _spatial_attention(*, input: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    source = input
    if mode == "pool":
        source = torch.cat((input.amax(dim=1, keepdim=True), input.mean(dim=1, keepdim=True)), dim=1)
    return input * F.conv2d(source, weight, bias, padding=weight.shape[2] // 2).sigmoid()


_EAGER: dict[str, Peer] = {
    "deform_conv2d": _deform_conv2d,
    "offset_sample2d": _grid_sample,
    "frelu": _frelu,
    "frelu_batch_norm": _frelu_batch_norm,
    "depthwise_conv2d": _depthwise_conv2d,
    "depthwise_conv2d_batch_norm": _depthwise_conv2d_batch_norm,
    "squeeze_excite": _squeeze_excite,
    "eca": _eca,
    "spatial_attention": _spatial_attention,
    "group_conv1x1": _group_conv1x1,
    "group_conv1x1_batch_norm": _group_conv1x1_batch_norm,
}

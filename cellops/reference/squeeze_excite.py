"""Squeeze-and-excitation (Hu et al. 2018) in eager PyTorch: input * gate(fc2(act(fc1(mean over pixels)))).

Pooling and the two products are float32 for half types; the scales are rounded to the storage type, as eager's are.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = {"relu": torch.relu, "silu": lambda x: x * x.sigmoid()}
GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": lambda x: (x + 3).clamp(0, 6) / 6}


def squeeze_excite(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Scale the channels; the arguments must be valid (`cellops.squeeze_excite` checks them).

    Args:
        input: [N, C, H, W].
        weight1, weight2: [R, C, 1, 1] and [C, R, 1, 1].
        bias1, bias2: [R] and [C], or None.
        act: a key of `ACTIVATIONS`.
        gate: a key of `GATES`.
    """
    hidden = ACTIVATIONS[act](_linear(_mean(input), weight1, bias1))
    scale = GATES[gate](_linear(hidden, weight2, bias2))
    return input * scale.to(input.dtype)[:, :, None, None]


def squeeze_excite_backward(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str = "relu",
    gate: str = "sigmoid",
) -> tuple[Tensor | None, ...]:
    """Gradients to the five tensors; arguments as in `squeeze_excite`, grad_output [N, C, H, W]."""
    mean = _mean(input)
    dtype = mean.dtype
    before = _linear(mean, weight1, bias1)
    hidden = ACTIVATIONS[act](before)
    logits = _linear(hidden, weight2, bias2)
    scale = GATES[gate](logits)
    grad_scale = (grad_output.to(dtype) * input.to(dtype)).sum((2, 3))
    zero = torch.zeros((), dtype=dtype, device=input.device)
    if gate == "sigmoid":
        grad_logits = grad_scale * scale * (1 - scale)
    else:
        grad_logits = torch.where((logits > -3) & (logits < 3), grad_scale / 6, zero)
    grad_hidden = grad_logits @ weight2.to(dtype).flatten(1)
    if act == "relu":
        grad_before = torch.where(before <= 0, zero, grad_hidden)
    else:
        sigmoid = before.sigmoid()
        grad_before = grad_hidden * sigmoid * (1 + before * (1 - sigmoid))
    grad_mean = grad_before @ weight1.to(dtype).flatten(1) / (input.shape[2] * input.shape[3])
    grad_input = grad_output * scale.to(input.dtype)[:, :, None, None] + grad_mean.to(input.dtype)[:, :, None, None]
    return (
        grad_input,
        (grad_before.T @ mean).reshape(weight1.shape).to(weight1.dtype),
        None if bias1 is None else grad_before.sum(0).to(bias1.dtype),
        (grad_logits.T @ hidden).reshape(weight2.shape).to(weight2.dtype),
        None if bias2 is None else grad_logits.sum(0).to(bias2.dtype),
    )


def _mean(input: Tensor) -> Tensor:
    return input.to(torch.float64 if input.dtype == torch.float64 else torch.float32).mean((2, 3))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    output = input @ weight.to(input.dtype).flatten(1).T
    return output if bias is None else output + bias.to(input.dtype)

"""Squeeze-and-excitation in Triton: y = x * gate(fc2(act(fc1(mean over pixels)))).

Pooling and scaling, with the bytes they move and their bound, are in `_channel_attention.py`; what is here handles
[N, C] and [N, R] numbers and the two weights only, 4 * C * R operations an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._channel_attention import channel_sums, chunks, scale_channels
from cellops.triton._launch import launch, power_of_2


@triton.jit
def squeeze_excite_scale_kernel(
    sums,  # [N, parts, C] float32
    weight1,  # [R, C]
    bias1,  # [R], or None
    weight2,  # [C, R]
    bias2,  # [C], or None
    scale,  # [N, C] float32
    channels,
    hidden,
    pixels,
    parts,
    SILU: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK_C: tl.constexpr,  # all channels
    BLOCK_R: tl.constexpr,
):
    """scale[n] = gate(weight2 @ act(weight1 @ mean[n] + bias1) + bias2), an image for each program."""
    image = tl.program_id(0)
    channel = tl.arange(0, BLOCK_C)
    mean = tl.zeros([BLOCK_C], tl.float32)
    for part in range(parts):
        mean += tl.load(sums + (image * parts + part) * channels + channel, channel < channels, 0.0)
    mean = mean / pixels
    logits = tl.zeros([BLOCK_C], tl.float32)
    if bias2 is not None:
        logits += tl.load(bias2 + channel, channel < channels, 0.0).to(tl.float32)
    for start in range(0, hidden, BLOCK_R):
        unit = start + tl.arange(0, BLOCK_R)
        valid = (unit < hidden)[:, None] & (channel < channels)[None, :]
        squeeze = tl.load(weight1 + unit[:, None] * channels + channel[None, :], valid, 0.0).to(tl.float32)
        squeezed = tl.sum(squeeze * mean[None, :], 1)
        if bias1 is not None:
            squeezed += tl.load(bias1 + unit, unit < hidden, 0.0).to(tl.float32)
        if SILU:
            squeezed = squeezed * tl.sigmoid(squeezed)
        else:
            squeezed = tl.where(squeezed <= 0, 0.0, squeezed)  # NaN stays
        excite = tl.load(weight2 + channel[None, :] * hidden + unit[:, None], valid, 0.0).to(tl.float32)
        logits += tl.sum(tl.where(valid, excite * squeezed[:, None], 0.0), 0)
    if HARD:
        gate = tl.where(logits <= -3, 0.0, tl.where(logits >= 3, 1.0, (logits + 3) / 6))
    else:
        gate = tl.sigmoid(logits)
    tl.store(scale + image * channels + channel, gate, channel < channels)


def _scale(
    sums: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
    pixels: int,
) -> Tensor:
    batch, parts, channels = sums.shape
    scale = torch.empty(batch, channels, dtype=torch.float32, device=sums.device)
    block_c = power_of_2(channels, 16)
    constants = {"BLOCK_C": block_c, "BLOCK_R": power_of_2(weight1.shape[0], 1, max(8192 // block_c, 1))}
    launch(
        squeeze_excite_scale_kernel,
        (batch,),
        *(sums, weight1, bias1, weight2, bias2, scale),
        *(channels, weight1.shape[0], pixels, parts),
        SILU=act == "silu",
        HARD=gate == "hard_sigmoid",
        **constants,
        num_warps=8,
    )
    return scale


def squeeze_excite_forward_triton(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.squeeze_excite`."""
    output, pixels = torch.empty_like(input), input.shape[2] * input.shape[3]
    for images in chunks(input):
        sums, _ = channel_sums(input[images])
        scale = _scale(sums, weight1, bias1, weight2, bias2, act, gate, pixels)
        scale_channels(input[images], scale, None, output[images])
    return output


def squeeze_excite_backward_triton(
    grad_output: Tensor,
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    gate: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients to the five tensors. The products of [N, C] and [N, R] matrices are PyTorch's."""
    pixels = input.shape[2] * input.shape[3]
    sums, products = channel_sums(input, grad_output)
    mean = sums.sum(1) / pixels
    squeeze, excite = weight1.flatten(1).float(), weight2.flatten(1).float()
    before = mean @ squeeze.T if bias1 is None else torch.addmm(bias1.float(), mean, squeeze.T)
    sigmoid = before.sigmoid()
    hidden = before * sigmoid if act == "silu" else before.relu()
    logits = hidden @ excite.T if bias2 is None else torch.addmm(bias2.float(), hidden, excite.T)
    grad_scale = products.sum(1)
    if gate == "sigmoid":
        scale = logits.sigmoid()
        grad_logits = grad_scale * scale * (1 - scale)
    else:
        scale = (logits + 3).clamp(0, 6) / 6
        grad_logits = torch.where((logits > -3) & (logits < 3), grad_scale / 6, 0.0)
    grad_hidden = grad_logits @ excite
    if act == "silu":
        grad_before = grad_hidden * sigmoid * (1 + before * (1 - sigmoid))
    else:
        grad_before = torch.where(before <= 0, 0.0, grad_hidden)
    grad_input = None
    if wanted[0]:
        grad_input = torch.empty_like(grad_output)
        scale_channels(grad_output, scale, grad_before @ squeeze / pixels, grad_input)
    return grad_input, grad_before.T @ mean, grad_before.sum(0), grad_logits.T @ hidden, grad_logits.sum(0)

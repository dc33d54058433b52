"""What fused modules ask of the `nn.BatchNorm2d` they hold: what it would have done."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellops.ops._registration import is_traced


def uses_batch_statistics(bn: nn.BatchNorm2d) -> bool:
    """Whether the normalisation is by the batch at hand, not by the running statistics."""
    return bn.training or (bn.running_mean is None and bn.running_var is None)


def folded(bn: nn.BatchNorm2d, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of the normalisation by running statistics, float32 or wider.

    Args:
        bn: holds running statistics.
        bias: [C], of the convolution before it, or None.
    """
    assert bn.running_mean is not None and bn.running_var is not None
    wide = torch.float64 if bn.running_var.dtype == torch.float64 else torch.float32
    scale = (bn.running_var.to(wide) + bn.eps).rsqrt()
    if bn.weight is not None:
        scale = scale * bn.weight
    mean = bn.running_mean.to(wide) if bias is None else bn.running_mean.to(wide) - bias
    shift = -mean * scale if bn.bias is None else torch.addcmul(bn.bias.to(wide), mean, scale, value=-1)
    return scale, shift


def affine(bn: nn.BatchNorm2d, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias [C] of the normalisation by the batch, None for 1 and 0.

    The bias of the convolution cancels there, its gradient is 0: zero times it is added, for autograd to say so.
    """
    if bias is None:
        return bn.weight, bn.bias
    return bn.weight, torch.add(torch.zeros_like(bias) if bn.bias is None else bn.bias, bias, alpha=0)


def behind(bn: nn.Module | None, activation: str) -> str:
    """The activation that is left to apply where the normalisation is called: timm's `BatchNormAct2d` has it inside."""
    inside = bn is not None and any(type(child) is not nn.Identity for child in bn.children())
    return "none" if inside else activation


def check_batch(shape: torch.Size) -> None:
    """Raise as `nn.BatchNorm2d` does where a channel has one value to be normalised by itself.

    Raises:
        ValueError: [N, C, H, W] has one value per channel.
    """
    if shape[0] * shape[2] * shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def update_running_statistics(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, bias: Tensor | None, count: int) -> None:
    """Do to the buffers what `nn.BatchNorm2d` in training does.

    Args:
        bn: in evaluation, or without buffers, it stays as it is.
        mean: [C], of the convolution without its bias; without gradient, as `var`.
        var: [C], biased.
        bias: [C], of the convolution, or None.
        count: values per channel.
    """
    if not (bn.training and bn.track_running_stats):
        return
    factor = 0.0 if bn.momentum is None else bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = 1.0 / float(bn.num_batches_tracked)
    if bn.running_mean is None or bn.running_var is None or count == 0:
        return
    running_mean, running_var = bn.running_mean, bn.running_var
    if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or is_traced()):
        # Without a new version, as nn.BatchNorm2d: where it is called too, its backward has saved them.
        running_mean, running_var = running_mean.data, running_var.data
    # Not under no_grad: torch 2.15 cannot load an exported program in which grad mode changes around buffers alone.
    mean = mean if bias is None else mean + bias.detach()
    running_mean.lerp_(mean.to(running_mean.dtype), factor)
    unbiased = var * count / (count - 1)  # no quotient of counts: a symbolic one cannot be saved by torch.export
    running_var.lerp_(unbiased.to(running_var.dtype), factor)

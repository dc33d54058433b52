"""Batch normalisation by the images of all processes together, as one process with the whole batch would do it."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

KNOWN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNormAct2d)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class SharedBatchNorm(_BatchNorm):
    """What `nn.SyncBatchNorm` computes, on the CPU too, where that raises.

    Takes over the parameters and buffers of `norm`, and what it does after the normalisation (timm's activations).
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from two on."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] -> [N, C, ...]."""
        output = self._shared(input) if self.training else super().forward(input)
        for child in self.children():
            output = child(output)
        return output

    def _shared(self, input: Tensor) -> Tensor:
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        values = input.float()
        # The batches of the processes may differ in size, so the mean of their means is not the mean.
        count = _Sum.apply(values.new_tensor(float(values[:, 0].numel())))
        mean = _Sum.apply(values.sum(axes)) / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self._track(mean, variance * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        output = centred * scale.view(shape)
        return (output if self.bias is None else output + self.bias.view(shape)).to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(variance.to(self.running_var.dtype), factor)


def synchronise(network: nn.Module, device: torch.device) -> list[str]:
    """Replace every batch normalisation of a network, in place, by one over all processes.

    The modules of cellops that fuse a `BatchNorm2d` call it as it is once it is replaced.

    Returns:
        The names of normalisations of an unknown class, which are left as they are.
    """
    left = []
    for name, module in list(network.named_modules()):
        if not isinstance(module, _BatchNorm):
            continue
        if type(module) not in KNOWN:
            left.append(f"{name} ({type(module).__name__})")
            continue
        parent, _, own = name.rpartition(".")
        # torch's own has a kernel, for GPUs only.
        shared = SharedBatchNorm(module) if device.type == "cpu" else convert_sync_batchnorm(module)
        setattr(network.get_submodule(parent), own, shared)
    return left

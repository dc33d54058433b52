"""A module beside the composition of PyTorch's modules that it stands for: what tests of such modules share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

CHANNELS = 12
"""Of the modules that are compared."""

each_layout = pytest.mark.parametrize(
    "layout", [pytest.param(torch.contiguous_format, id="nchw"), pytest.param(torch.channels_last, id="channels_last")]
)


def assert_same(ours: nn.Module, theirs: nn.Module, layout: torch.memory_format, steps: int = 3) -> None:
    """The same outputs, gradients and buffers over some batches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        input = torch.randn(3, CHANNELS, 9, 7, generator=generator).contiguous(memory_format=layout)
        inputs = [input.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
        outputs = [module(leaf) for module, leaf in zip((ours, theirs), inputs, strict=True)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
        assert outputs[0].is_contiguous(memory_format=layout)
        for output in outputs:
            output.square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-3)
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], rtol=1e-4, atol=1e-5)


def called_children(module: nn.Module, input: Tensor) -> int:
    """How often children are called: never where the module runs fused.

    Their classes are watched. A child with a hook, or a `forward` of its own, wants to be called.
    """
    calls: list[int] = []

    def counted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: object) -> Tensor:
            calls.append(1)
            return forward(*arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind in {type(child) for child in module.children()}:
            patch.setattr(kind, "forward", counted(kind.forward))
        copy.deepcopy(module)(input)
    return len(calls)

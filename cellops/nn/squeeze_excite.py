"""The module of `squeeze_excite`."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from cellops.nn import _children, _compiled
from cellops.ops._registration import integer
from cellops.ops.squeeze_excite import check_names, squeeze_excite
from cellops.reference import squeeze_excite as reference


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018); stands in for timm's `SEModule` and `SqueezeExcite`.

    The children `fc1` and `fc2` are 1x1 convolutions, as in timm's `SEModule` and torchvision's `SqueezeExcitation`.
    They are called where one is not what it was made as (an adapter, one prepared for quantisation) or has hooks.

    Args:
        channels: C.
        rd_ratio: hidden channels per channel, rounded to a multiple of `rd_divisor` as timm's `SEModule` does.
        rd_channels: the number of hidden channels itself; `rd_ratio` and `rd_divisor` then do not count.
        rd_divisor: what the number of hidden channels is a multiple of.
        act: "relu" or "silu".
        gate: "sigmoid" or "hard_sigmoid".

    Raises:
        ValueError: `channels`, `rd_channels` or `rd_divisor` is less than 1 or no integer; `act` or `gate` is unknown,
            at the first call.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        act: str = "relu",
        gate: str = "sigmoid",
    ) -> None:
        super().__init__()
        channels, rd_divisor = integer("channels", channels), integer("rd_divisor", rd_divisor)
        for name, number in (("channels", channels), ("rd_divisor", rd_divisor)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if rd_channels is None:
            rd_channels = max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)
        rd_channels = integer("rd_channels", rd_channels)
        if rd_channels < 1:
            raise ValueError(f"rd_channels must be at least 1, got {rd_channels}")
        self.act = act
        self.gate = gate
        self.fc1 = nn.Conv2d(channels, rd_channels, 1)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.squeeze_excite`."""
        return excite(input, self.fc1, self.fc2, self.act, self.gate)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, gate={self.gate!r}"


def excite(input: Tensor, fc1: nn.Module, fc2: nn.Module, act: str, gate: str) -> Tensor:
    """The op with the weights of two convolutions or linear layers, or the composition: where that compiles to faster
    code, and where a layer wants to be called."""
    if not (is_linear(fc1) and is_linear(fc2)) or _children.watched(fc1, fc2):
        return compose(input, fc1, fc2, act, gate)
    parameters = (_weight_1x1(fc1), fc1.bias, _weight_1x1(fc2), fc2.bias)
    if _compiled.stands_back("squeeze_excite", input, *parameters):
        known = act in reference.ACTIVATIONS and gate in reference.GATES
        if known and input.shape[1] == parameters[0].shape[1]:  # the op says what is wrong
            return reference.squeeze_excite(input, *parameters, act, gate)
    return squeeze_excite(input, *parameters, act=act, gate=gate)


def compose(input: Tensor, fc1: nn.Module, fc2: nn.Module, act: str, gate: str) -> Tensor:
    """What the op computes, by PyTorch's own ops and calls of the two layers, which take [N, C, 1, 1]."""
    check_names(act, gate)
    pooled = input.mean((2, 3), keepdim=True)
    return input * reference.GATES[gate](fc2(reference.ACTIVATIONS[act](fc1(pooled))))


def is_linear(layer: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    """Whether it is PyTorch's own linear layer, or its 1x1 convolution over all channels."""
    if type(layer) is not nn.Conv2d:
        return type(layer) is nn.Linear
    return layer.kernel_size == (1, 1) and layer.groups == 1 and _children.keeps_size(layer)


def _weight_1x1(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """The weight [O, C, 1, 1] of a 1x1 convolution, or of a linear layer seen as one."""
    return layer.weight[:, :, None, None] if isinstance(layer, nn.Linear) else layer.weight

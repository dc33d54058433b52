"""The module of `squeeze_excite`."""

from __future__ import annotations

from torch import Tensor, nn

from cellops.ops.squeeze_excite import squeeze_excite


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018); stands in for timm's `SEModule` and `SqueezeExcite`.

    The children `fc1` and `fc2` are 1x1 convolutions, as in timm's `SEModule` and torchvision's `SqueezeExcitation`.

    Args:
        channels: C.
        rd_ratio: hidden channels per channel, rounded to a multiple of `rd_divisor` as timm's `SEModule` does.
        rd_channels: the number of hidden channels itself; `rd_ratio` and `rd_divisor` then do not count.
        rd_divisor: what the number of hidden channels is a multiple of.
        act: "relu" or "silu".
        gate: "sigmoid" or "hard_sigmoid".

    Raises:
        ValueError: `rd_channels` is less than 1; `act` or `gate` is unknown, at the first call.
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
        if rd_channels is None:
            rd_channels = max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)
        if rd_channels < 1:
            raise ValueError(f"rd_channels must be at least 1, got {rd_channels}")
        self.act = act
        self.gate = gate
        self.fc1 = nn.Conv2d(channels, rd_channels, 1)
        self.fc2 = nn.Conv2d(rd_channels, channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.squeeze_excite`."""
        fc1, fc2 = self.fc1, self.fc2
        return squeeze_excite(input, fc1.weight, fc1.bias, fc2.weight, fc2.bias, act=self.act, gate=self.gate)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, gate={self.gate!r}"

"""The module of `offset_sample2d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cellops.ops._registration import integer
from cellops.ops.offset_sample2d import check_layout, offset_sample2d


class ConvOffset2d(nn.Module):
    """Predicts an offset for every pixel of every channel and samples the input there: HQNet's layer.

    The child `conv` is a 3x3 convolution from C to 2C channels without bias, drawn from N(0, init_std): the layer
    starts close to the identity. Weights of the port that is itself a convolution load too: its `weight` is `conv`'s.

    Args:
        channels: C.
        layout: of the offset: "planar", or "interleaved" for weights of a port that views the convolution's output as
            [N * C, H, W, 2] without a permute; see `cellops.offset_sample2d`.
        init_std: standard deviation of the initial weight.

    Raises:
        ValueError: `layout` is unknown, or `channels` is no integer.
    """

    def __init__(self, channels: int, layout: str = "planar", init_std: float = 0.01) -> None:
        super().__init__()
        check_layout(layout)
        channels = integer("channels", channels)
        self.layout = layout
        self.init_std = init_std
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, init_std)."""
        nn.init.normal_(self.conv.weight, std=self.init_std)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.offset_sample2d`."""
        return offset_sample2d(input, self.conv(input), self.layout)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        if (ports := f"{prefix}weight") in state_dict:
            state_dict.setdefault(f"{prefix}conv.weight", state_dict.pop(ports))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        return f"layout={self.layout!r}, init_std={self.init_std}"

"""HQNet (Yang and Teoh 2022): a residual network whose every convolution samples its input at learned offsets.

Stem and blocks are those of the paper's Fig. 5, and with 5 classes the parameters are its 469,831,237. What it leaves
open: that stages 2 to 4 halve the map, here on the 3x3 and on the shortcut's 1x1; the dropout's probability (0.5 here,
PyTorch's default), and how weights start (He et al. 2015; offsets from N(0, 0.01), so that each layer starts close to a
plain convolution; the last normalisation of a branch at 0, so that each block starts as its shortcut).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from timm.layers import drop_path
from torch import Tensor, nn

from cellops import ConvOffset2d, DeformConv2dPack
from cellops.models.blocks import Classifier, check_output_stride, drop_path_rates
from cellops.models.registry import Config, register_network

CONFIG: Config = {"first_conv": "conv1", "classifier": "fc", "pool_size": (2, 2)}
CONFIG["feature_cfg"] = {"flatten_sequential": True}

Convolution = Callable[[int, int, int, int], nn.Module]
"""Builds a convolution without bias from channels, output channels, kernel size and stride."""


class OffsetConv2d(nn.Sequential):
    """Every channel sampled at its own offsets (`offset`), then a convolution without bias (`conv`).

    Args:
        in_channels, out_channels, kernel_size, stride: of the convolution; zero padding keeps a size with stride 1.
        layout: of the offsets; see `cellops.ConvOffset2d`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, layout: str = "planar"
    ) -> None:
        super().__init__()
        self.offset = ConvOffset2d(in_channels, layout)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def pack(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> DeformConv2dPack:
    """A modulated deformable convolution in place of an `OffsetConv2d`."""
    return DeformConv2dPack(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the width; GELU after the first two and after the sum.

    Args:
        in_channels: C.
        width: of the 3x3.
        stride: of the 3x3 and of the shortcut.
        convolution: builds each convolution, the shortcut's too.
        drop_path_rate: how often the branch is left out in training.
    """

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, convolution: Convolution, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        out_channels = width * self.expansion
        self.conv1 = convolution(in_channels, width, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = convolution(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = convolution(width, out_channels, 1, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = convolution(in_channels, out_channels, 1, stride)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4 * width, ceil(H / stride), ceil(W / stride)]."""
        branch = self.act(self.bn1(self.conv1(x)))
        branch = self.act(self.bn2(self.conv2(branch)))
        branch = drop_path(self.bn3(self.conv3(branch)), self.drop_path_rate, self.training)
        return self.act(branch + (x if self.downsample is None else self.downsample(x)))


class HQNet(Classifier):
    """HQNet; the last map has the image's height and width over 128, rounded up.

    Args:
        num_classes: width of the logits.
        in_chans: channels of the images.
        depths: blocks of each stage.
        width: of the stem and the first stage; each further stage has twice as many channels.
        layout: of the offsets: "planar", or "interleaved" for weights of the port that views them so.
        convolution: builds a block's convolutions in place of `OffsetConv2d`.
        drop_rate: dropout before the classifier.
        drop_path_rate: of leaving a block's branch out in training, in the last block; from 0 evenly up to it.
        global_pool: what makes a vector of the last map, by timm's names.
        output_stride: 128; no other is possible.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        depths: tuple[int, ...] = (3, 4, 10, 3),
        width: int = 64,
        layout: str = "planar",
        convolution: Convolution | None = None,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 128,
    ) -> None:
        super().__init__()
        check_output_stride(output_stride, 128)
        convolution = convolution or partial(OffsetConv2d, layout=layout)
        self.conv1 = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.GELU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.feature_info = [{"num_chs": width, "reduction": 8, "module": "act"}]
        channels, stages = width, []
        for i, rates in enumerate(drop_path_rates(depths, drop_path_rate)):
            blocks = []
            for j, rate in enumerate(rates):
                blocks.append(Bottleneck(channels, width << i, 2 if i and j == 0 else 1, convolution, rate))
                channels = (width << i) * Bottleneck.expansion
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 16 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.make_head(in_chans, num_classes, global_pool, drop_rate)

    def last_norms(self) -> Iterator[nn.BatchNorm2d]:
        """Of every block."""
        return (block.bn3 for stage in self.stages for block in stage)


@register_network(**CONFIG)
def hqnet(num_classes: int, in_chans: int, **options: Any) -> HQNet:
    """The paper's network: 469,831,237 parameters with 5 classes."""
    return HQNet(num_classes, in_chans, **options)


@register_network(**CONFIG)
def hqnet_tiny(num_classes: int, in_chans: int, **options: Any) -> HQNet:
    """A quarter of the width and 5 blocks, for tests and for trying things out; not of the paper."""
    return HQNet(num_classes, in_chans, **{"depths": (1, 1, 2, 1), "width": 16, **options})


@register_network(**CONFIG)
def hqnet_dcn(num_classes: int, in_chans: int, **options: Any) -> HQNet:
    """HQNet with modulated deformable convolutions, whose offsets are shared by all channels; not of the paper."""
    return HQNet(num_classes, in_chans, **{"convolution": pack, **options})

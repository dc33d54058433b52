"""DResNet (Wang et al. 2019): a light network for an embedded board, of grouped 1x1 and depthwise 3x3 convolutions.

Depths and maps are those of its Table 1 (112, 57, 29, 15, 8 pixels at 224: the pool is padded and rounds up). No
channels are shuffled, for which the paper gives its reasons. It leaves open, and here is chosen:

- widths 96, 192, 384 and 768 behind a stem of 64, 4 groups, and a sixteenth of the channels inside squeeze-excite. With
  1000 classes the parameters take 10.8 MiB, the file 10.9: between the two sizes it prints for @1 (11.2 in Table 3,
  10.7 in Table 4), within 3 % of either;
- @.5 and @.25 halve and quarter every width. The sizes printed for them (7.4 and 1.7) follow from 11.2 by no single
  rule of scaling: `benchmarks/paper_tables.py` puts ours beside them;
- w_c is of a block's output channels, also where the input has fewer; squeeze-excite has no groups;
- normalisation behind every convolution; ReLU behind all but the last, which squeeze-excite follows, and the sum;
- in a Match_Block the 3x3, the 1x1 beside it and the shortcut's 1x1 have the stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import drop_path
from torch import Tensor, nn

from cellops import DepthwiseConv2d, GroupConv1x1, SqueezeExcite
from cellops.models.blocks import Classifier, check_output_stride, drop_path_rates
from cellops.models.registry import Config, register_network

CONFIG: Config = {"first_conv": "conv1", "classifier": "fc", "pool_size": (8, 8)}
CONFIG["feature_cfg"] = {"flatten_sequential": True}


class SeparableConv2d(nn.Module):
    """Depthwise 3x3 with the stride, normalisation, ReLU, and a grouped 1x1 with the same behind it."""

    def __init__(self, channels: int, groups: int, stride: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(channels, 3, stride)
        self.pointwise = GroupConv1x1(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, ceil(H / stride), ceil(W / stride)]."""
        return self.pointwise(self.depthwise(x))


class Block(nn.Module):
    """The paper's DRes_Block; with another width or a stride its Match_Block.

    Args:
        in_channels, out_channels: C and O.
        stride: 1 or 2.
        groups: of every 1x1 convolution.
        compression: w_c, channels of the two branches together for each output channel.
        split: w_s, the part of these that only a 1x1 convolution sees.
        two_branches: False sends all channels through the 3x3.
        squeeze_excite: whether channels are weighted at the end.
        drop_path_rate: how often the branch is left out in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        compression: float,
        split: float,
        two_branches: bool,
        squeeze_excite: bool,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        middle = _multiple(out_channels * compression, 2 * groups)
        self.narrow = _multiple(middle * split, groups) if two_branches else 0
        self.stride, self.drop_path_rate = stride, drop_path_rate
        self.compress = GroupConv1x1(in_channels, middle, groups)
        self.branch1 = GroupConv1x1(self.narrow, self.narrow, groups) if two_branches else None
        self.branch3 = SeparableConv2d(middle - self.narrow, groups, stride)
        self.fuse = GroupConv1x1(middle, out_channels, groups, activation="none")
        self.se = SqueezeExcite(out_channels, rd_divisor=1) if squeeze_excite else nn.Identity()
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = GroupConv1x1(in_channels, out_channels, groups, activation="none")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)]."""
        middle = self.compress(x)
        seen = self.branch3(middle[:, self.narrow :])
        if self.branch1 is not None:
            seen = torch.cat([self.branch1(self._strided(middle[:, : self.narrow])), seen], dim=1)
        shortcut = x if self.shortcut is None else self.shortcut(self._strided(x))
        return torch.relu(shortcut + drop_path(self.se(self.fuse(seen)), self.drop_path_rate, self.training))

    def _strided(self, x: Tensor) -> Tensor:
        """What a 1x1 convolution with the stride would see."""
        return x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]


def _multiple(channels: float, of: int) -> int:
    """The multiple of `of` nearest to `channels`, at least one."""
    return max(of, round(channels / of) * of)


class DResNet(Classifier):
    """DResNet; the last map has about a 32nd of the image's height and width, 8 at 224.

    Args:
        num_classes: width of the logits.
        in_chans: channels of the images.
        depths: blocks behind the Match_Block of each stage.
        width: of the first stage as a part of 96, and so of every layer.
        groups: of every 1x1 convolution.
        compression, split: the paper's w_c and w_s.
        two_branches, squeeze_excite: switches of its ablations.
        drop_rate: dropout before the classifier.
        drop_path_rate: of leaving a block's branch out in training, in the last block; from 0 evenly up to it.
        global_pool: what makes a vector of the last map, by timm's names.
        output_stride: 32; no other is possible.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        depths: tuple[int, ...] = (1, 2, 4, 2),
        width: float = 1.0,
        groups: int = 4,
        compression: float = 1.0,
        split: float = 0.5,
        two_branches: bool = True,
        squeeze_excite: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        check_output_stride(output_stride, 32)
        channels = _multiple(64 * width, groups)
        self.conv1 = nn.Conv2d(in_chans, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.feature_info = [{"num_chs": channels, "reduction": 2, "module": "act1"}]
        options = (groups, compression, split, two_branches, squeeze_excite)
        stages = []
        for i, rates in enumerate(drop_path_rates([1 + depth for depth in depths], drop_path_rate)):
            out_channels = _multiple((96 << i) * width, 2 * groups)
            blocks = [Block(channels, out_channels, 2 if i else 1, *options, rates[0])]
            blocks += [Block(out_channels, out_channels, 1, *options, rate) for rate in rates[1:]]
            stages.append(nn.Sequential(*blocks))
            channels = out_channels
            self.feature_info.append({"num_chs": channels, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.make_head(in_chans, num_classes, global_pool, drop_rate)

    def last_norms(self) -> Iterator[nn.BatchNorm2d]:
        """Of the blocks beside an identity."""
        return (block.fuse.bn for stage in self.stages for block in stage if block.shortcut is None)


@register_network(**CONFIG)
def dresnet(num_classes: int, in_chans: int, **options: Any) -> DResNet:
    """DResNet@1."""
    return DResNet(num_classes, in_chans, **options)


@register_network(**CONFIG)
def dresnet_050(num_classes: int, in_chans: int, **options: Any) -> DResNet:
    """DResNet@.5: half of every width."""
    return DResNet(num_classes, in_chans, **{"width": 0.5, **options})


@register_network(**CONFIG)
def dresnet_025(num_classes: int, in_chans: int, **options: Any) -> DResNet:
    """DResNet@.25: a quarter of every width."""
    return DResNet(num_classes, in_chans, **{"width": 0.25, **options})

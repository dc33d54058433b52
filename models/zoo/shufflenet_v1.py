"""ShuffleNet (Zhang et al. 2018): bottlenecks of grouped 1x1 convolutions whose channels are shuffled in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import drop_path
from torch import Tensor, nn

from cellops import DepthwiseConv2d, GroupConv1x1
from cellops.models.blocks import Classifier, check_output_stride, drop_path_rates
from cellops.models.registry import register_network

WIDTHS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}
"""Channels of the first stage by the number of groups; each further stage has twice as many. Table 1 of the paper."""


class Unit(nn.Module):
    """Grouped 1x1 to a quarter of the channels and shuffle, depthwise 3x3, grouped 1x1 back.

    With stride 2 the output is the 3x3 average of the input beside the branch, else the sum of both.

    Args:
        in_channels, out_channels: C and O; equal with stride 1.
        groups: of both 1x1 convolutions.
        stride: 1 or 2.
        first_groups: of the first one where it differs: the very first unit has too few channels for groups.
        drop_path_rate: how often the branch is left out of a sum in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        stride: int,
        first_groups: int | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        middle = out_channels // 4
        branch = out_channels if stride == 1 else out_channels - in_channels
        self.stride, self.drop_path_rate = stride, drop_path_rate
        self.shrink = GroupConv1x1(in_channels, middle, first_groups or groups, shuffle=True)
        self.depthwise = DepthwiseConv2d(middle, 3, stride, activation="none")
        self.expand = GroupConv1x1(middle, branch, groups, activation="none")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)]."""
        branch = self.expand(self.depthwise(self.shrink(x)))
        if self.stride == 1:
            return torch.relu(x + drop_path(branch, self.drop_path_rate, self.training))
        shortcut = nn.functional.avg_pool2d(x, 3, 2, 1)
        return torch.relu(torch.cat([shortcut, branch], dim=1))


class ShuffleNetV1(Classifier):
    """ShuffleNet; the last map has the image's height and width over 32, rounded up.

    Args:
        num_classes: width of the logits.
        in_chans: channels of the images.
        groups: of the 1x1 convolutions, a key of `WIDTHS`.
        depths: units of the three stages, the one with stride 2 included.
        drop_rate: dropout before the classifier.
        drop_path_rate: of leaving a block's branch out in training, in the last block; from 0 evenly up to it.
        global_pool: what makes a vector of the last map, by timm's names.
        output_stride: 32; no other is possible.

    Raises:
        ValueError: `groups` is none of the paper's, or another argument is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        groups: int = 3,
        depths: tuple[int, ...] = (4, 8, 4),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        check_output_stride(output_stride, 32)
        if groups not in WIDTHS:
            raise ValueError(f"groups must be one of {', '.join(map(str, WIDTHS))}, got {groups}")
        channels, width = 24, WIDTHS[groups]
        self.conv1 = nn.Conv2d(in_chans, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.feature_info = [
            {"num_chs": channels, "reduction": 2, "module": "act1"},
            {"num_chs": channels, "reduction": 4, "module": "pool"},
        ]
        stages = []
        for i, rates in enumerate(drop_path_rates(depths, drop_path_rate)):
            units = [Unit(channels, width << i, groups, 2, first_groups=1 if i == 0 else None)]
            units += [Unit(width << i, width << i, groups, 1, drop_path_rate=rate) for rate in rates[1:]]
            stages.append(nn.Sequential(*units))
            channels = width << i
            self.feature_info.append({"num_chs": channels, "reduction": 8 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.make_head(in_chans, num_classes, global_pool, drop_rate)

    def last_norms(self) -> Iterator[nn.BatchNorm2d]:
        """Of the units beside an identity; the others' output is their own."""
        return (unit.expand.bn for stage in self.stages for unit in stage if unit.stride == 1)


@register_network(first_conv="conv1", classifier="fc", pool_size=(7, 7), feature_cfg={"flatten_sequential": True})
def shufflenet_v1_g3(num_classes: int, in_chans: int, **options: Any) -> ShuffleNetV1:
    """ShuffleNet 1x with three groups: 1,865,728 parameters at 1000 classes."""
    return ShuffleNetV1(num_classes, in_chans, **{"groups": 3, **options})

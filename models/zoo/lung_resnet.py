"""ResNet-ours(50) of Kim and Kang 2023 for lung pathology: pre-activation, funnels, depthwise convolutions, attention.

What the paper says is kept:

- a stem of two 4x4 convolutions, 32 channels with stride 2, then 64;
- bottlenecks [3, 4, 6, 3] in pre-activation order: BN, FReLU, depthwise, 1x1 that shrinks; BN, FReLU, 3x3; BN, FReLU,
  depthwise, 1x1 that expands to four times the width; then channel attention (eq. 1) and spatial attention (eq. 2);
- every stage, the first too, opens with a downsampling block: the stride of 2 is on the 3x3, and the shortcut is a 2x2
  average and a 1x1 with stride 1;
- BN, FReLU, average pool and one fully connected layer at the end. `num_classes=1` gives the paper's one logit.

Its Keras is kept where it shows: batch normalisation with eps 1e-3 and momentum 0.99 (0.01 in PyTorch's counting), and
"same" padding of the 4x4, which is one more pixel at the right and bottom where it is uneven.

What it leaves open, and was chosen:

- no max-pool: the stem and four stages with stride 2 make the usual 32 without one;
- BN and FReLU between the two convolutions of the stem; those behind the second are the first block's;
- the depthwise convolutions are 3x3, and what precedes a 1x1 has no activation in between;
- residual blocks have stride 1, though the text has 2 "in the Downsampling Block and Residual Block of all stages";
- spatial attention is one map for all channels (eq. 2);
- a shortcut with a convolution starts from the pre-activated input, as in He et al. 2016 (Identity mappings);
- the 3x3 with stride 2 is padded by one pixel on each side; widths are 64, 128, 256, 512 and four times that;
- FReLU with its authors' normalisation inside, 3x3; ECA's kernel size from the channels; no biases before a BN;
- weights start as in He et al. 2015 and not as Keras draws them.
"""

from __future__ import annotations

from typing import Any

from timm.layers import drop_path
from torch import Tensor, nn
from torch.nn import functional as F

from cellops import DepthwiseConv2d, EfficientChannelAttention, FReLU, GroupConv1x1, SpatialAttention
from cellops.models.blocks import Classifier, check_output_stride, drop_path_rates, norms
from cellops.models.registry import register_network


class Conv2dSame(nn.Conv2d):
    """4x4 with stride 1 or 2, padded as Keras' "same" does: one pixel at the left and top, two at the right and bottom.

    With stride 2 and an even size Keras pads one pixel less there, which no window would reach.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 4, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)]."""
        return super().forward(F.pad(input, (1, 2, 1, 2)))


def depthwise(channels: int) -> DepthwiseConv2d:
    """Depthwise 3x3 without bias, and nothing behind it."""
    return DepthwiseConv2d(channels, norm=False, activation="none")


class Block(nn.Module):
    """Bottleneck in pre-activation order with channel and spatial attention at its end.

    Args:
        in_channels: C.
        width: of the 3x3; the output has four times as many channels.
        downsample: whether the 3x3 has stride 2 and the shortcut an average and a 1x1; else C must be 4 * width.
        drop_path_rate: how often the branch is left out in training.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, downsample: bool, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        out_channels = width * self.expansion
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.act1 = FReLU(in_channels)
        self.depthwise1 = depthwise(in_channels)
        self.shrink = GroupConv1x1(in_channels, width, 1, activation="none")  # with the BN before the 3x3
        self.act2 = FReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, 2 if downsample else 1, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.act3 = FReLU(width)
        self.depthwise3 = depthwise(width)
        self.expand = nn.Conv2d(width, out_channels, 1, bias=False)
        self.channel_attention = EfficientChannelAttention(out_channels)
        self.spatial_attention = SpatialAttention(out_channels)
        self.shortcut: nn.Module | None = None
        if downsample:
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
            self.shortcut = nn.Sequential(pool, nn.Conv2d(in_channels, out_channels, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4 * width, H, W], or with half the rows and columns, rounded up."""
        activated = self.act1(self.norm1(x))
        branch = self.act2(self.shrink(self.depthwise1(activated)))
        branch = self.act3(self.norm3(self.conv2(branch)))
        branch = self.expand(self.depthwise3(branch))
        branch = self.spatial_attention(self.channel_attention(branch))
        branch = drop_path(branch, self.drop_path_rate, self.training)
        return branch + (x if self.shortcut is None else self.shortcut(activated))


class LungResNet(Classifier):
    """ResNet-ours; the last map has the image's height and width over 32, rounded up.

    Args:
        num_classes: width of the logits; 1 for the paper's cancer or not.
        in_chans: channels of the images.
        depths: blocks of each stage.
        width: of the first stage's 3x3; each further stage has twice as many channels.
        norm_eps, norm_momentum: of every batch normalisation, in PyTorch's counting.
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
        depths: tuple[int, ...] = (3, 4, 6, 3),
        width: int = 64,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        output_stride: int = 32,
    ) -> None:
        super().__init__()
        check_output_stride(output_stride, 32)
        self.stem = nn.Sequential(
            Conv2dSame(in_chans, width // 2, 2),
            nn.BatchNorm2d(width // 2),
            FReLU(width // 2),
            Conv2dSame(width // 2, width),
        )
        self.feature_info = [{"num_chs": width, "reduction": 2, "module": "stem.3"}]
        channels, stages = width, []
        for i, rates in enumerate(drop_path_rates(depths, drop_path_rate)):
            blocks = []
            for j, rate in enumerate(rates):
                blocks.append(Block(channels, width << i, downsample=j == 0, drop_path_rate=rate))
                channels = (width << i) * Block.expansion
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(channels)
        self.act = FReLU(channels)
        self.make_head(in_chans, num_classes, global_pool, drop_rate)
        for norm in norms(self):
            norm.eps, norm.momentum = norm_eps, norm_momentum


@register_network(
    input_size=(3, 240, 320),
    pool_size=(8, 10),
    crop_pct=1.0,
    first_conv="stem.0",
    classifier="fc",
    feature_cfg={"flatten_sequential": True},
)
def lung_resnet50(num_classes: int, in_chans: int, **options: Any) -> LungResNet:
    """The paper's network, for 320 x 240 images."""
    return LungResNet(num_classes, in_chans, **options)

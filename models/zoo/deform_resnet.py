"""ResNet-50 with modulated deformable 3x3 convolutions in its last three stages (Zhu et al. 2019), on timm's ResNet.

Parameters are named as in timm's, torchvision's and mmdetection's networks, whose weights load; the packs' are mmcv's.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from cellops import DeformConv2dPack
from cellops.models.registry import register_network


def deform(network: nn.Module, stages: tuple[str, ...] = ("layer2", "layer3", "layer4")) -> nn.Module:
    """Replace `conv2` in the blocks of a timm ResNet by packs that compute the same until they are trained.

    A pack's masks start at a half, so its weight starts at twice the convolution's.
    """
    for stage in stages:
        for block in network.get_submodule(stage):
            conv = block.conv2
            pack = DeformConv2dPack(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                bias=False,
            ).to(conv.weight.device, conv.weight.dtype)
            with torch.no_grad():
                pack.weight.copy_(2 * conv.weight)
            block.conv2 = pack
    return network


@register_network(takes_pretrained=True, first_conv="conv1", classifier="fc")
def deform_resnet50(num_classes: int, in_chans: int, pretrained: bool = False, **options: Any) -> nn.Module:
    """The 3x3 convolutions of conv3 to conv5 are deformable. `pretrained` starts from timm's ResNet-50."""
    network = timm.create_model("resnet50", pretrained, num_classes=num_classes, in_chans=in_chans, **options)
    return deform(network)

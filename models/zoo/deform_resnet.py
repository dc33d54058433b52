"""ResNet-50 with modulated deformable 3x3 convolutions in its last three stages (Zhu et al. 2019), on timm's ResNet.

Parameters are named as in timm's, torchvision's and mmdetection's networks, whose weights load; the packs' are mmcv's.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from cellops import DeformConv2dPack
from cellops.models.blocks import reset_parameters
from cellops.models.registry import Config, register_network


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


class DeformResNet(ResNet):
    """timm's ResNet with the 3x3 convolutions of conv3 to conv5 deformable.

    Args:
        options: of timm's `ResNet`.

    Raises:
        ValueError: `num_classes` is not 0 where `global_pool` is "": timm's linear layer takes no map.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("global_pool") == "" and options.get("num_classes"):
            raise ValueError("global_pool must not be '' where a linear layer follows: num_classes is not 0")
        super().__init__(**options)
        self.in_chans = options.get("in_chans", 3)  # as the following, not set by every timm
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        deform(self)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As the newest timm's, and with an error that it leaves out.

        Raises:
            ValueError: `num_classes` is not 0 where `global_pool` is "".
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        if not pool and num_classes:
            raise ValueError(f"global_pool must not be '' where a linear layer follows: num_classes is {num_classes}")
        like = next(self.parameters())
        super().reset_classifier(num_classes, pool)
        self.fc.to(like.device, like.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def init_weights(self, zero_init_last: bool = True) -> None:
        """Draw all weights anew and reset all statistics: timm's start, which the packs compute as well."""
        packs = [module for module in self.modules() if isinstance(module, DeformConv2dPack)]
        if packs:  # not yet where timm constructs
            reset_parameters(self)
        super().init_weights(zero_init_last)
        for pack in packs:
            fan_out = pack.out_channels // pack.groups * math.prod(pack.kernel_size)
            nn.init.normal_(pack.weight, std=2 * math.sqrt(2 / fan_out))
            nn.init.zeros_(pack.conv_offset.weight)


_RESNET50 = timm.get_pretrained_cfg("resnet50").to_dict(remove_source=True)
CONFIG: Config = {key: _RESNET50[key] for key in ("mean", "std", "crop_pct", "interpolation", "pool_size")}
"""How timm prepares images for the weights that `pretrained` starts from."""


@register_network(takes_pretrained=True, first_conv="conv1", classifier="fc", **CONFIG)
def deform_resnet50(num_classes: int, in_chans: int, pretrained: bool = False, **options: Any) -> nn.Module:
    """The 3x3 convolutions of conv3 to conv5 are deformable. `pretrained` starts from timm's ResNet-50."""
    options = {"num_classes": num_classes, "in_chans": in_chans, **options}
    network = DeformResNet(**{"block": Bottleneck, "layers": (3, 4, 6, 3), **options})
    if pretrained:
        network.load_state_dict(deform(timm.create_model("resnet50", pretrained=True, **options)).state_dict())
    return network

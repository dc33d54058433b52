"""Networks of timm: those that the papers compare with or build on."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from cellops.models.registry import add

NAMES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet50c",
    "resnet50d",
    "resnext50_32x4d",
    "densenet121",
    "vgg16",
    "vgg19",
    "mobilenetv1_100",
    "mobilenetv2_100",
    "ghostnet_100",
    "convnext_base",
    "coat_mini",
)


def build(num_classes: int, in_chans: int, pretrained: bool = False, *, name: str, **options: Any) -> nn.Module:
    """timm's network `name`, which may have a tag that chooses weights. Errors are those of `timm.create_model`."""
    return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options)


for _name in NAMES:
    add(_name, "timm", build)

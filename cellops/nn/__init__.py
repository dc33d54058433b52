"""Modules around the ops; each holds parameters and calls its op. One file per op."""

from cellops.nn.deform_conv2d import DeformConv2d, DeformConv2dPack
from cellops.nn.depthwise_conv2d import DepthwiseConv2d
from cellops.nn.eca import EfficientChannelAttention
from cellops.nn.frelu import FReLU
from cellops.nn.group_conv1x1 import GroupConv1x1
from cellops.nn.offset_sample2d import ConvOffset2d
from cellops.nn.spatial_attention import SpatialAttention
from cellops.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "ConvOffset2d",
    "DeformConv2d",
    "DeformConv2dPack",
    "DepthwiseConv2d",
    "EfficientChannelAttention",
    "FReLU",
    "GroupConv1x1",
    "SpatialAttention",
    "SqueezeExcite",
]

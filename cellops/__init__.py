"""Operators of lightweight convolutional networks, with native kernels."""

from cellops import _flop_hook, _source_tree, testing
from cellops._explain import explain
from cellops._version import __version__
from cellops.convert import accelerate, fuse
from cellops.nn import (
    ConvOffset2d,
    DeformConv2d,
    DeformConv2dPack,
    DepthwiseConv2d,
    EfficientChannelAttention,
    FReLU,
    GroupConv1x1,
    SpatialAttention,
    SqueezeExcite,
)
from cellops.ops.deform_conv2d import deform_conv2d
from cellops.ops.depthwise_conv2d import depthwise_conv2d
from cellops.ops.eca import eca
from cellops.ops.frelu import frelu
from cellops.ops.group_conv1x1 import group_conv1x1
from cellops.ops.offset_sample2d import offset_sample2d
from cellops.ops.spatial_attention import spatial_attention
from cellops.ops.squeeze_excite import squeeze_excite

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
    "__version__",
    "accelerate",
    "deform_conv2d",
    "depthwise_conv2d",
    "eca",
    "explain",
    "frelu",
    "fuse",
    "group_conv1x1",
    "offset_sample2d",
    "spatial_attention",
    "squeeze_excite",
    "testing",
]

_source_tree.map_models()
_flop_hook.install()

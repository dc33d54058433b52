"""What the networks of `models/zoo/` share: head and initialisation."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from cellops import DeformConv2d, DepthwiseConv2d, GroupConv1x1


class Classifier(nn.Module):
    """A convolutional network with a linear head, with the methods and attributes of timm's networks.

    A subclass defines `forward_features` and calls `make_head` at the end of its `__init__`.
    """

    num_features: int
    num_classes: int
    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]

    def make_head(self, num_features: int, num_classes: int, drop_rate: float) -> None:
        """Pooling by the mean, dropout and a linear layer from `num_features` channels; no layer for 0 classes."""
        self.num_features = self.head_hidden_size = num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_features, h, w]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, h, w] -> logits [N, num_classes], or the [N, num_features] before the linear layer."""
        pooled = self.head_drop(x.mean((2, 3)))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer, or an identity where there are no classes."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a new one, or by an identity for 0 classes.

        Raises:
            ValueError: `global_pool` is none of None and "avg".
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be None or 'avg', got {global_pool!r}")
        self.num_classes = num_classes
        like = next(self.parameters())
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)


def initialize(network: nn.Module) -> None:
    """Draw the weights of plain, depthwise, grouped and deformable convolutions as He et al. 2015 do, by their outputs.

    What a module of cellops initialises for a reason is left alone: offsets start near zero, funnels near linear.
    """
    for module in network.modules():
        own = type(module).__module__.startswith("cellops.nn")
        if isinstance(module, DeformConv2d):
            _draw(module.weight, module.groups)
        for child in module.children():
            if isinstance(child, nn.Conv2d) and (not own or isinstance(module, (DepthwiseConv2d, GroupConv1x1))):
                _draw(child.weight, child.groups)


def _draw(weight: Tensor, groups: int) -> None:
    fan_out = weight.shape[0] // groups * math.prod(weight.shape[2:])
    nn.init.normal_(weight, std=math.sqrt(2 / fan_out))


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Every batch normalisation, those inside modules of cellops too."""
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

"""Networks of torchvision, whose parameters and weights these keep, with the methods of timm's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn

from cellops.models.registry import add


class _Methods:
    """What timm's users call, from what a subclass says about its torchvision network."""

    num_features: int
    num_classes: int

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_features, h, w]."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, h, w] -> logits [N, num_classes], or the last layer's input, [N, head_hidden_size]."""
        raise NotImplementedError

    def get_classifier(self) -> nn.Module:
        """The last layer, or an identity where there are no classes."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one, or by an identity for 0 classes.

        Raises:
            ValueError: `global_pool` is none of None and "avg".
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be None or 'avg', got {global_pool!r}")
        self.num_classes = num_classes
        self._replace(num_classes)

    def _replace(self, num_classes: int) -> None:
        raise NotImplementedError


def _like(network: nn.Module) -> dict[str, Any]:
    parameter = next(network.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


class AlexNet(_Methods, torchvision.models.AlexNet):
    """torchvision's AlexNet."""

    num_features, head_hidden_size, num_classes = 256, 4096, 1000
    first, last = "features.0", "classifier.6"

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        hidden = self.classifier[:-1](torch.flatten(self.avgpool(x), 1))
        return hidden if pre_logits else self.classifier[-1](hidden)

    def get_classifier(self) -> nn.Module:
        return self.classifier[-1]

    def _replace(self, num_classes: int) -> None:
        new = nn.Linear(self.head_hidden_size, num_classes, **_like(self)) if num_classes else nn.Identity()
        self.classifier[-1] = new


class SqueezeNet(_Methods, torchvision.models.SqueezeNet):
    """torchvision's SqueezeNet; its logits are means of ReLUs, so never negative, as they were published."""

    num_features, head_hidden_size = 512, 512
    first, last = "features.0", "classifier.1"

    def forward_features(self, x: Tensor) -> Tensor:
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return self.classifier[0](x).mean((2, 3))
        return self.classifier(x).flatten(1)

    def get_classifier(self) -> nn.Module:
        return self.classifier[1]

    def _replace(self, num_classes: int) -> None:
        self.classifier[1] = nn.Identity()
        if num_classes:
            self.classifier[1] = nn.Conv2d(self.num_features, num_classes, 1, **_like(self))
            nn.init.normal_(self.classifier[1].weight, std=0.01)
            nn.init.zeros_(self.classifier[1].bias)


class ShuffleNetV2(_Methods, torchvision.models.ShuffleNetV2):
    """torchvision's ShuffleNetV2."""

    num_features, head_hidden_size, num_classes = 1024, 1024, 1000
    first, last = "conv1.0", "fc"

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        return self.conv5(self.stage4(self.stage3(self.stage2(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def _replace(self, num_classes: int) -> None:
        self.fc = nn.Linear(self.num_features, num_classes, **_like(self)) if num_classes else nn.Identity()


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": AlexNet,
    "squeezenet1_1": lambda **options: SqueezeNet("1_1", **options),
    "shufflenet_v2_x1_0": lambda **options: ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], **options),
}


def _add(name: str) -> None:
    def build(num_classes: int, in_chans: int, pretrained: bool = False, **options: Any) -> nn.Module:
        model = NETWORKS[name](**options)
        weights = torchvision.models.get_model_weights(name).DEFAULT
        if pretrained:
            model.load_state_dict(weights.get_state_dict(check_hash=True))
        if in_chans != 3:
            _replace_first(model, in_chans, keep_weights=pretrained)
        if num_classes != 1000:
            model.reset_classifier(num_classes)
        model.default_cfg = model.pretrained_cfg = {
            **timm.models.PretrainedCfg(url=weights.url, architecture=name).to_dict(),
            "first_conv": model.first,
            "classifier": model.last,
            "num_classes": num_classes,
            "interpolation": "bilinear",
        }
        return model

    build.__qualname__ = name
    add(name, "torchvision", build)


def _replace_first(model: nn.Module, in_chans: int, keep_weights: bool) -> None:
    """Replace the first convolution by one for other channels, with weights made of the old ones as timm makes them."""
    parent, _, last = model.first.rpartition(".")
    old = getattr(model.get_submodule(parent), last)
    bias = old.bias is not None
    new = nn.Conv2d(in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, bias=bias)
    if keep_weights:
        with torch.no_grad():
            new.weight.copy_(timm.models.adapt_input_conv(in_chans, old.weight))
            if bias:
                new.bias.copy_(old.bias)
    setattr(model.get_submodule(parent), last, new)


for _name in NETWORKS:
    _add(_name)

"""Modules that compute as ours do and name their children as other libraries do, so that weights keep their keys.

`accelerate` turns modules into them. They take what their originals take: under autocast the product of an input of
another type has the wider type, where the ops return autocast's; channel attention takes an image without a batch too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cellops.nn import (
    EfficientChannelAttention,
    FReLU,
    SqueezeExcite,
    _batch_norm,
    depthwise_conv2d,
    eca,
    group_conv1x1,
    squeeze_excite,
)
from cellops.nn._children import keeps_size, watched
from cellops.ops.spatial_attention import spatial_attention

ACTIVATIONS = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "GELU": "gelu",
    "SiLU": "silu",
    "Swish": "silu",
    "SwishMe": "silu",
    "Hardswish": "hardswish",
    "HardSwish": "hardswish",
    "HardSwishMe": "hardswish",
}
"""Names of activation modules, and of the activations that `depthwise_conv2d` and `group_conv1x1` have."""


def promotes(input: Tensor) -> bool:
    """Whether autocast computes in a half type that the input does not have: their product then has the wider type."""
    if not torch._C._is_any_autocast_enabled() or isinstance(input, Proxy):
        return False
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return False
    return input.is_floating_point() and input.dtype not in (torch.float64, torch.get_autocast_dtype(device))


def batched(compute: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """What is computed of a batch, of an image [C, H, W] too."""
    if isinstance(input, Proxy) or input.dim() != 3:
        return compute(input)
    return compute(input.unsqueeze(0)).squeeze(0)


class NamedSqueezeExcite(SqueezeExcite):
    """Squeeze-and-excitation with two children of any names.

    Attributes:
        names: theirs; the children of torchvision's and timm's.
    """

    names = ("fc1", "fc2")

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W], as it is returned. Errors are those of `cellops.squeeze_excite`."""
        fc1, fc2 = (self._modules[name] for name in self.names)
        assert fc1 is not None and fc2 is not None
        compute = squeeze_excite.compose if promotes(input) else squeeze_excite.excite
        return batched(lambda images: compute(images, fc1, fc2, self.act, self.gate), input)


class EfficientNetSqueezeExcite(NamedSqueezeExcite):
    """The same with the children `conv_reduce` and `conv_expand` of timm's EfficientNet and MobileNet."""

    conv_reduce: nn.Conv2d
    conv_expand: nn.Conv2d
    names = ("conv_reduce", "conv_expand")


class SequentialSqueezeExcite(nn.Module):
    """Squeeze-and-excitation with its layers in a sequence: linear ones, as the authors have it, or 1x1 convolutions.

    Attributes:
        body: the name of the sequence.
        kinds: the classes of what it held when it was compared; with any other in it, it is called.
        act, gate: as for `cellops.squeeze_excite`.
    """

    body: str
    kinds: tuple[type[nn.Module], ...]
    act: str
    gate: str

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W], as it is returned. Errors are those of `cellops.squeeze_excite`."""
        return batched(self._excite, input)

    def _excite(self, input: Tensor) -> Tensor:
        body = self._modules[self.body]
        assert isinstance(body, nn.Module)
        there = list(body.children())
        # An adapter, a hook: it wants to be called.
        called = tuple(map(type, there)) != self.kinds or watched(body, *there)
        if called or promotes(input):
            linear = nn.Linear in self.kinds
            scale = body(input.mean((2, 3), keepdim=not linear))
            return input * (scale[:, :, None, None] if linear else scale)
        fc1, fc2 = (part for part in there if type(part) in (nn.Linear, nn.Conv2d))
        return squeeze_excite.excite(input, fc1, fc2, self.act, self.gate)

    def extra_repr(self) -> str:
        return f"act={self.act!r}, gate={self.gate!r}"


class NamedChannelAttention(EfficientChannelAttention):
    """Efficient channel attention with a child `conv`, as other libraries have it."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W], as it is returned. Errors are those of `cellops.eca`."""
        if promotes(input):
            return batched(lambda images: eca.compose(images, self.conv), input)
        return batched(super().forward, input)


class NamedFReLU(FReLU):
    """Funnel activation with children of any names.

    Attributes:
        conv_name, bn_name: their names; None for no normalisation.
    """

    conv_name: str
    bn_name: str | None

    @property
    def conv_frelu(self) -> nn.Module | None:  # type: ignore[override]
        """The convolution."""
        return self._modules[self.conv_name]

    @property
    def bn_frelu(self) -> nn.Module | None:  # type: ignore[override]
        """The normalisation, or None."""
        return None if self.bn_name is None else self._modules[self.bn_name]

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.FReLU`."""
        if not promotes(input):
            return super().forward(input)
        assert self.conv_frelu is not None
        convolved = self.conv_frelu(input)
        return input.maximum(convolved if self.bn_frelu is None else self.bn_frelu(convolved))


class PooledAttention(nn.Module):
    """CBAM's spatial attention with a child `conv` of another library: a convolution, or one with its normalisation.

    Fused where the normalisation is by running statistics; by the batch's, the map is composed.

    Attributes:
        mean_first: whether the first of the two channels is the mean (timm) or the maximum (CBAM's authors).
        kinds: the classes of what `conv` held when it was compared; with any other in it, it is called.
    """

    conv: nn.Module
    mean_first: bool
    kinds: frozenset[type[nn.Module]] = frozenset()

    def parts(self) -> tuple[nn.Conv2d, nn.BatchNorm2d | None] | None:
        """Convolution and normalisation if they may be fused, and nothing but what was compared is there."""
        there = list(self.conv.modules())
        if not {type(part) for part in there} <= {*self.kinds, nn.Identity} or watched(*there):
            return None  # another normalisation, an adapter: it wants to be called
        convs = [part for part in there if type(part) is nn.Conv2d]
        norms = [part for part in there if isinstance(part, nn.BatchNorm2d)]
        if len(convs) != 1 or len(norms) > 1 or not keeps_size(convs[0]):
            return None
        return convs[0], norms[0] if norms else None

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W]. Errors are those of `cellops.spatial_attention`."""
        # A tracer wants modules, and whichever mode they are in later.
        parts = None if isinstance(input, Proxy) or promotes(input) else self.parts()
        if parts is None or (parts[1] is not None and _batch_norm.uses_batch_statistics(parts[1])):
            pooled = [input.mean(1, keepdim=True), input.amax(1, keepdim=True)]
            return input * self.conv(torch.cat(pooled if self.mean_first else pooled[::-1], dim=1)).sigmoid()
        conv, bn = parts
        weight, bias = conv.weight.flip(1) if self.mean_first else conv.weight, conv.bias
        if bn is not None:
            scale, shift = _batch_norm.folded(bn, bias)
            weight, bias = (weight * scale).to(weight.dtype), shift.to(weight.dtype)
        return spatial_attention(input, weight, bias, "pool")

    def extra_repr(self) -> str:
        return f"mean_first={self.mean_first}"


class FusedSequential(nn.Sequential):
    """Children called in order; each depthwise and each grouped 1x1 convolution with what follows it in one."""

    def forward(self, input: Tensor) -> Tensor:
        """What `nn.Sequential` gives."""
        for step in steps(list(self._modules.values())):
            input = step(input) if isinstance(step, nn.Module) else step.convolve(input)
        return input


class Fused(NamedTuple):
    """A depthwise or grouped 1x1 convolution, the normalisation behind it, the activation behind that, and a channel
    shuffle behind a 1x1 one.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    activation: str
    shuffle: bool

    @property
    def op(self) -> str:
        """The op that computes all of it."""
        return "group_conv1x1" if self.conv.kernel_size == (1, 1) else "depthwise_conv2d"

    def convolve(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W], by the op."""
        if self.op == "depthwise_conv2d":
            return depthwise_conv2d.convolve(input, self.conv, self.bn, self.activation)
        return group_conv1x1.convolve(input, self.conv, self.bn, self.conv.groups, self.activation, self.shuffle)


def steps(children: list[nn.Module | None]) -> Iterator[nn.Module | Fused]:
    """The children of a sequence in order, those that run as one together. None and identities are left out.

    Children with hooks, of a subclass or with parametrizations are called by themselves.
    """
    left = [child for child in children if child is not None and (type(child) is not nn.Identity or watched(child))]
    while left:
        conv = left.pop(0)
        if not is_fusable(conv):
            yield conv
            continue
        bn, activation, shuffle, count = None, "none", False, 1
        if left and is_norm(left[0]):
            bn, count = left[0], 2
            activation = _inner_activation(bn)
            left.pop(0)
        if left and activation == "none" and (name := activation_of(left[0])) and not watched(left[0]):
            activation, count = name, count + 1
            left.pop(0)
        shuffles = left and type(left[0]) is nn.ChannelShuffle and left[0].groups == conv.groups
        if shuffles and conv.kernel_size == (1, 1) and not watched(left[0]):
            shuffle, count = True, count + 1
            left.pop(0)
        yield Fused(conv, bn, activation, shuffle) if count > 1 or activation != "none" else conv


def is_fusable(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain grouped 1x1 convolution, or a depthwise one of stride 1, that nobody watches."""
    if type(module) is not nn.Conv2d or watched(module):
        return False
    if module.kernel_size != (1, 1):
        return depthwise_conv2d.fits(module)
    return module.groups > 1 and group_conv1x1.fits(module)


def is_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is a plain BatchNorm2d, or timm's with an activation that we have, that nobody watches."""
    if watched(*module.modules()):
        return False
    if type(module) is nn.BatchNorm2d:
        return True
    if not isinstance(module, nn.BatchNorm2d) or type(module).__name__ != "BatchNormAct2d":
        return False
    drop, act = module._modules.get("drop"), module._modules.get("act")
    return type(drop) is nn.Identity and (type(act) is nn.Identity or activation_of(act) is not None)


def _inner_activation(bn: nn.BatchNorm2d) -> str:
    return activation_of(bn._modules.get("act")) or "none"


def activation_of(module: nn.Module | None) -> str | None:
    """Our name of an activation module, or None."""
    name = ACTIVATIONS.get(type(module).__name__)
    return None if name == "gelu" and getattr(module, "approximate", "none") != "none" else name

"""Which modules of other libraries `accelerate` knows and what becomes of each, by name, structure and weights' shapes.

A rule looks at a module and returns what it can become, a reason why it must stay, or None for what it does not know.
Modules change their class and stay the objects they are: optimizers, other references and parameters' names hold.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from cellops.convert.modules import (
    EfficientNetSqueezeExcite,
    Fused,
    FusedSequential,
    NamedChannelAttention,
    NamedFReLU,
    NamedSqueezeExcite,
    PooledAttention,
    SequentialSqueezeExcite,
    activation_of,
    is_fusable,
    is_norm,
    steps,
)
from cellops.nn import DeformConv2d, DeformConv2dPack
from cellops.nn.squeeze_excite import is_linear
from cellops.ops.deform_conv2d import pair
from cellops.ops.squeeze_excite import ACTIVATION_CODES

SIDE = 7  # rows and columns of the images that modules are compared on


class Stays(Exception):
    """A module that a rule knows, but that cannot become ours; the text says why."""


@dataclass(frozen=True)
class Match:
    """What a module can become.

    Attributes:
        becomes: the name of our class.
        op: the op that it will call.
        convert: does it, to this module or a copy of it.
        inputs: shapes of what `forward` takes; None where the module's forward is known to be `nn.Sequential`'s.
    """

    becomes: str
    op: str
    convert: Callable[[nn.Module], None]
    inputs: tuple[tuple[int, ...], ...] | None


def match(module: nn.Module) -> Match | None:
    """What the module can become, None for one that no rule knows.

    Raises:
        Stays: a rule knows it, but it cannot become ours.
    """
    if type(module).__module__.partition(".")[0] == "cellops":
        return None
    for base in type(module).__mro__:
        name = base.__name__
        if name in KNOWN_OTHERS:
            raise Stays(KNOWN_OTHERS[name])
        for pattern, rule in RULES:
            if pattern.search(name) and (found := rule(module)) is not None:
                if base is not type(module):
                    raise Stays(f"it is a subclass of {name}, which may add to it")
                return found
    return _sequence(module)


def _become(module: nn.Module, cls: type[nn.Module], attributes: Mapping[str, Any], drop: Sequence[str] = ()) -> None:
    """Change the class of a module, with some more attributes and without some of its children."""
    module.__class__ = cls
    for name in drop:
        module._modules.pop(name, None)
        module.__dict__.pop(name, None)
    for name, value in attributes.items():
        setattr(module, name, value)


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _exactly(module: nn.Module | None, cls: type[nn.Module], what: str) -> Any:
    """The module, if it is of this very class."""
    if type(module) is not cls:
        found = "missing" if module is None else f"a {type(module).__module__}.{type(module).__qualname__}"
        raise Stays(f"{what} is {found}, not a {cls.__name__}")
    return module


# The rules


def _squeeze_excite(module: nn.Module) -> Match | None:
    children = _children(module)
    names = next((pair for pair in SQUEEZE_EXCITE_NAMES if set(pair) <= children.keys()), None)
    if names is None:
        return _squeeze_excite_in_sequence(children)
    fc1, fc2 = (_exactly(children.pop(name), nn.Conv2d, name) for name in names)
    if getattr(module, "add_maxpool", False):
        raise Stays("it pools by the maximum too")
    channels, hidden = fc2.weight.shape[:2]
    if fc1.weight.shape != (hidden, channels, 1, 1) or fc2.weight.shape != (channels, hidden, 1, 1):
        raise Stays(f"{' and '.join(names)} are not 1x1 convolutions there and back")
    act, gate = _activation_and_gate(children)
    cls = NamedSqueezeExcite if names == NamedSqueezeExcite.names else EfficientNetSqueezeExcite
    convert = partial(_become, cls=cls, attributes={"act": act, "gate": gate}, drop=tuple(children))
    return Match("SqueezeExcite", "squeeze_excite", convert, ((2, channels, SIDE, SIDE),))


def _activation_and_gate(children: Mapping[str, nn.Module]) -> tuple[str, str]:
    """What a squeeze-and-excitation has beside its two layers and a pooling."""
    act = gate = None
    for name, child in children.items():
        kind = type(child).__name__
        if kind in ("Identity", "AdaptiveAvgPool2d"):
            continue
        if gate is None and kind in GATES:
            gate = GATES[kind]
        elif act is None and activation_of(child) in ACTIVATION_CODES:
            act = activation_of(child)
        else:
            raise Stays(f"its {name} is a {kind}, which squeeze_excite does not have")
    if act is None or gate is None:
        raise Stays(f"{'activation' if act is None else 'gate'} is not one of its children")
    return act, gate


def _squeeze_excite_in_sequence(children: Mapping[str, nn.Module]) -> Match | None:
    """With the layers in the one child that is a sequence, as the authors of the paper and many after them have it."""
    bodies = [name for name, child in children.items() if type(child) is nn.Sequential]
    pools = [name for name, child in children.items() if type(child).__name__ in ("AdaptiveAvgPool2d", "Identity")]
    if len(bodies) != 1 or len(pools) + 1 != len(children):
        return None
    parts = _children(children[bodies[0]])
    layers = [name for name, part in parts.items() if isinstance(part, (nn.Linear, nn.Conv2d))]
    if len(layers) != 2:
        return None
    fc1, fc2 = (parts.pop(name) for name in layers)
    if type(fc1) is not type(fc2) or not (is_linear(fc1) and is_linear(fc2)):
        raise Stays(f"{' and '.join(layers)} of its {bodies[0]} are neither linear layers nor 1x1 convolutions")
    act, gate = _activation_and_gate(parts)
    kinds = tuple(type(part) for part in children[bodies[0]].children())
    attributes = {"body": bodies[0], "kinds": kinds, "act": act, "gate": gate}
    convert = partial(_become, cls=SequentialSqueezeExcite, attributes=attributes, drop=pools)
    return Match("SqueezeExcite", "squeeze_excite", convert, ((2, fc2.weight.shape[0], SIDE, SIDE),))


def _eca(module: nn.Module) -> Match | None:
    children = _children(module)
    if "conv" not in children:
        return None
    conv = _exactly(children.pop("conv"), nn.Conv1d, "conv")
    for name, child in children.items():
        if type(child).__name__ not in ("Identity", "AdaptiveAvgPool2d", "Sigmoid"):
            raise Stays(f"its {name} is a {type(child).__name__}, which eca does not have")
    taps = conv.kernel_size[0]
    if conv.weight.shape[:2] != (1, 1) or conv.bias is not None or conv.padding != (taps // 2,) or taps % 2 == 0:
        raise Stays("conv is not one odd convolution over the channels without bias, padded by zeros")
    convert = partial(_become, cls=NamedChannelAttention, attributes={}, drop=(*children, "act", "conv2"))
    return Match("EfficientChannelAttention", "eca", convert, ((2, 12, SIDE, SIDE),))


def _spatial_attention(module: nn.Module) -> Match | None:
    children = _children(module)
    conv = children.pop("conv", None)
    if conv is None:
        return None
    for name, child in children.items():
        if type(child).__name__ != "Sigmoid":
            raise Stays(f"its {name} is a {type(child).__name__}, where spatial_attention has a sigmoid")
    inner = [child for child in conv.modules() if isinstance(child, nn.Conv2d)]
    weight = inner[0].weight.shape if len(inner) == 1 else ()
    if len(weight) != 4 or weight[:2] != (1, 2) or weight[2] != weight[3] or weight[3] % 2 == 0:
        raise Stays("conv does not hold one odd convolution from two channels to one")
    attributes = {"mean_first": True, "kinds": frozenset(type(part) for part in conv.modules())}
    convert = partial(_become, cls=PooledAttention, attributes=attributes, drop=tuple(children))
    return Match("PooledAttention", "spatial_attention", convert, ((2, 5, SIDE, SIDE),))


def _frelu(module: nn.Module) -> Match | None:
    children = _children(module)
    convs = [name for name, child in children.items() if isinstance(child, nn.Conv2d)]
    norms = [name for name in children if name not in convs]
    if len(convs) != 1:
        return None
    conv = _exactly(children[convs[0]], nn.Conv2d, convs[0])
    channels, kernel = conv.out_channels, conv.kernel_size[0]
    if (conv.groups, conv.in_channels, conv.kernel_size) != (channels, channels, (kernel, kernel)) or kernel % 2 == 0:
        raise Stays(f"{convs[0]} is not depthwise with an odd square kernel")
    if len(norms) > 1:
        raise Stays(f"it has more children than a convolution and a normalisation: {', '.join(children)}")
    norm = norms[0] if norms else None
    if norm is not None:
        _exactly(children[norm], nn.BatchNorm2d, norm)
    convert = partial(_become, cls=NamedFReLU, attributes={"conv_name": convs[0], "bn_name": norm})
    return Match("FReLU", "frelu", convert, ((2, channels, SIDE, SIDE),))


def _deform_conv2d(module: nn.Module) -> Match | None:
    """torchvision's and mmcv's, with the offsets given or, in a pack, predicted by the child `conv_offset`."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 4:
        return None
    try:
        sizes = {name: pair(name, getattr(module, name, None)) for name in ("stride", "padding", "dilation")}
    except ValueError as error:
        raise Stays(str(error)) from None
    out_channels, group_channels, *kernel = weight.shape
    groups, taps = getattr(module, "groups", 1), kernel[0] * kernel[1]
    in_channels = group_channels * groups
    plain: dict[str, Any] = {
        "kernel_size": tuple(kernel),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "groups": groups,
    }
    if "bias" not in module._parameters:
        plain["bias"] = None
    image = (2, in_channels, *(size + 1 for size in _spans(kernel, sizes["dilation"])))
    image = (*image[:2], *(max(size, SIDE) for size in image[2:]))
    children = _children(module)
    if not children:
        out = [
            (size + 2 * pad - span) // stride + 1
            for size, pad, span, stride in zip(
                image[2:], sizes["padding"], _spans(kernel, sizes["dilation"]), sizes["stride"], strict=True
            )
        ]
        offset_groups = _offset_groups(module)
        inputs = [image, (2, 2 * taps * offset_groups, *out)]
        if "Modulated" in type(module).__name__ or not hasattr(module, "deform_groups"):  # torchvision's takes a mask
            inputs.append((2, taps * offset_groups, *out))
        return Match(
            "DeformConv2d", "deform_conv2d", partial(_become, cls=DeformConv2d, attributes=sizes | plain), tuple(inputs)
        )
    if set(children) != {"conv_offset"}:
        raise Stays(f"its children are {', '.join(children)}; a pack has conv_offset")
    predicted = _exactly(children["conv_offset"], nn.Conv2d, "conv_offset").out_channels
    offset_groups = _offset_groups(module)
    if predicted not in (2 * taps * offset_groups, 3 * taps * offset_groups):
        raise Stays(f"conv_offset has {predicted} channels, neither 2 nor 3 for each tap and offset group")
    more = {
        "offset_groups": offset_groups,
        "offset_channels": 2 * taps * offset_groups,
        "modulated": predicted == 3 * taps * offset_groups,
    }
    convert = partial(_become, cls=DeformConv2dPack, attributes=sizes | plain | more)
    return Match("DeformConv2dPack", "deform_conv2d", convert, (image,))


def _spans(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    return tuple((size - 1) * step + 1 for size, step in zip(kernel, dilation, strict=True))


def _offset_groups(module: nn.Module) -> int:
    return int(getattr(module, "deform_groups", getattr(module, "deformable_groups", 1)))


def _sequence(module: nn.Module) -> Match | None:
    """Convolutions that take what follows them along, in a sequence or a module that calls its children in order."""
    children: list[nn.Module | None] = list(_children(module).values())
    convs = [child for child in children if child is not None and is_fusable(child)]
    if not convs:
        return None
    fused = [step for step in steps(children) if isinstance(step, Fused)]
    sequential = type(module).forward is nn.Sequential.forward
    if not fused:
        if not sequential and any(child is not None and is_norm(child) for child in children):
            raise Stays(f"what follows its {_kind(convs[0])} convolution is written in {type(module).__name__}.forward")
        return None
    convert = partial(_become, cls=FusedSequential, attributes={})
    if sequential:
        return Match("FusedSequential", fused[0].op, convert, None)
    if len(children) > 5 or len(convs) > 1:
        raise Stays(f"what follows its {_kind(convs[0])} convolution is written in {type(module).__name__}.forward")
    return Match("FusedSequential", fused[0].op, convert, ((2, convs[0].in_channels, SIDE, SIDE),))


def _kind(conv: nn.Conv2d) -> str:
    return "grouped 1x1" if conv.kernel_size == (1, 1) else "depthwise"


SQUEEZE_EXCITE_NAMES = (("fc1", "fc2"), ("conv_reduce", "conv_expand"))
GATES = {
    "Sigmoid": "sigmoid",
    "Hardsigmoid": "hard_sigmoid",
    "HardSigmoid": "hard_sigmoid",
    "HardSigmoidMe": "hard_sigmoid",
}

RULES: tuple[tuple[re.Pattern[str], Callable[[nn.Module], Match | None]], ...] = (
    (re.compile(r"^SE(Module|Layer|Block)?$|^SqueezeExc"), _squeeze_excite),
    (re.compile(r"^E(ca|CA)(Module|Layer|Block|Attention)?$|^eca_layer$|^EfficientChannelAtt"), _eca),
    (re.compile(r"^Spatial(Attn|Gate|Attention)$"), _spatial_attention),
    (re.compile(r"^F_?RELU|Funnel", re.IGNORECASE), _frelu),
    (re.compile(r"^(Modulated)?DeformConv(2d)?(Pack)?$"), _deform_conv2d),
)
"""Names of classes, and what to make of them."""

KNOWN_OTHERS = {
    "EffectiveSEModule": "it has one convolution, where squeeze_excite has two",
    "CecaModule": "its convolution goes around from the last channel to the first",
    "ChannelAttn": "it pools by the maximum too",
    "LightChannelAttn": "it pools by the maximum too",
    "LightSpatialAttn": "its convolution sees one channel, the mean of maximum and mean",
}
"""Names of classes that look alike and compute something else."""

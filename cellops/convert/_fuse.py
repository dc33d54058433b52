"""`fuse`: batch normalisations become part of the convolutions before them, for inference."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

from cellops.convert._report import Change, Report
from cellops.convert.modules import FusedSequential, NamedFReLU, PooledAttention
from cellops.nn import DeformConv2d, DepthwiseConv2d, FReLU, GroupConv1x1
from cellops.nn._children import HOOKS, addition

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
NORMALISATIONS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
KEEPS_WEIGHT = ("Conv2dSame",)
"""Subclasses of Conv2d that change nothing but the padding."""

Pairs = dict[nn.Module, nn.Module]
"""The convolution that stands right before a normalisation, by the normalisation."""


def fuse(model: nn.Module) -> Report:
    """Fold the BatchNorm of a network in evaluation into the convolutions before it, in place; for inference only.

    Which convolution stands before a normalisation is read from the network's `forward` by tracing it, or parts of it
    where the whole cannot be traced. The normalisations inside our `FReLU`, `DepthwiseConv2d` and `GroupConv1x1` are
    folded too. A folded normalisation becomes an identity, or its activation where it had one inside, and its keys are
    gone.

    Args:
        model: a network in evaluation mode.

    Returns:
        Which normalisations were folded, and which were left and why; prints as a table.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if model.training:
        raise ValueError("model must be in evaluation mode: call model.eval(), or train before folding")
    names = {module: name for name, module in model.named_modules()}
    pairs = _pairs(model)
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    owners = Counter(id(one) for module in model.modules() for one in module._parameters.values() if one is not None)
    changes = []
    for bn in [module for module in model.modules() if isinstance(module, _BatchNorm)]:
        conv, was = pairs.get(bn), type(bn).__name__
        reason = _why_not(conv, bn) if conv is not None else NO_CONVOLUTION
        if conv is not None and not reason and any(owners[id(one)] > 1 for one in conv.parameters(recurse=False)):
            reason = "the convolution shares its weight"
        if not reason and places[id(bn)] > 1:
            reason = "it is used in several places"
        if conv is None or reason:
            changes.append(Change(names[bn], was, None, reason))
            continue
        _fold(conv, bn)
        _remove(model, bn)
        changes.append(Change(names[bn], was, f"part of the {type(conv).__name__} before it"))
    return Report("folded", tuple(changes))


NO_CONVOLUTION = "no convolution could be seen before it whose output only it takes"


def _why_not(conv: nn.Module, bn: nn.Module) -> str:
    """Why a normalisation cannot be folded into the convolution before it, "" if it can."""
    assert isinstance(bn, _BatchNorm)
    kind = type(bn)
    if kind.__name__ != "BatchNormAct2d" and kind not in NORMALISATIONS and kind is not nn.SyncBatchNorm:
        return f"it is a {kind.__module__}.{kind.__qualname__}, not a plain BatchNorm"
    if bn.training:
        return "it is in training mode"
    if bn.running_mean is None or bn.running_var is None:
        return "it has no running statistics"
    for module, what in ((bn, "it"), (conv, "the convolution")):
        if added := addition(module):
            return f"{what} has {added}"
        if parametrize.is_parametrized(module):
            return f"{what} is parametrized"
    known = type(conv) in CONVOLUTIONS or type(conv).__name__ in KEEPS_WEIGHT or _is_deformable(conv)
    if not known:
        return f"the {type(conv).__name__} before it may change its weight when it is called"
    return ""


def _is_deformable(module: nn.Module) -> bool:
    return isinstance(module, DeformConv2d) or (
        type(module).__module__.startswith("torchvision.") and type(module).__name__ == "DeformConv2d"
    )


def _fold(conv: Any, bn: Any) -> None:
    with torch.no_grad():
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
        )


def _remove(model: nn.Module, bn: nn.Module) -> None:
    """Put what is left of the normalisation in its place: nothing, an identity, or what timm has inside it."""
    inner = [child for child in bn.children() if type(child) is not nn.Identity]
    rest: nn.Module = nn.Identity() if not inner else inner[0] if len(inner) == 1 else nn.Sequential(*inner)
    rest.train(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is bn:
                parent._modules[name] = None if isinstance(parent, (FReLU, DepthwiseConv2d, GroupConv1x1)) else rest
                if isinstance(parent, NamedFReLU):
                    parent.bn_name = None


# Which convolution is before which normalisation


def _pairs(module: nn.Module) -> Pairs:
    """From the trace of this module, or of its children where it has none."""
    pairs: Pairs = {}
    for part in module.modules():
        pairs |= _inside(part)
    for root, graph in _graphs(module):
        pairs |= _in_graph(root, graph)
    return pairs


def _inside(module: nn.Module) -> Pairs:
    """The pairs that our own modules hold."""
    if isinstance(module, FReLU):
        return {module.bn_frelu: module.conv_frelu} if module.bn_frelu is not None else {}
    if isinstance(module, (DepthwiseConv2d, GroupConv1x1)):
        return {module.bn: module.conv} if module.bn is not None else {}
    if isinstance(module, PooledAttention):
        parts = module.parts()
        return {parts[1]: parts[0]} if parts is not None and parts[1] is not None else {}
    if isinstance(module, FusedSequential):
        children = [child for child in module.children() if type(child) is not nn.Identity]
        return {bn: conv for conv, bn in pairwise(children) if isinstance(bn, _BatchNorm) and isinstance(conv, _ConvNd)}
    return {}


class _Tracer(torch.fx.Tracer):
    """Follows a forward down to the layers of torch, ours, and modules that are watched."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_layer(m) or any(getattr(m, hooks) for hooks in HOOKS)


def _is_layer(module: nn.Module) -> bool:
    package = type(module).__module__
    if isinstance(module, (_BatchNorm, _ConvNd)) or package.startswith(("cellops.nn", "cellops.convert")):
        return True
    return (package.startswith("torch.nn") and not isinstance(module, nn.Sequential)) or _is_deformable(module)


def _graphs(module: nn.Module) -> Iterator[tuple[nn.Module, torch.fx.Graph]]:
    """A graph of the module and of those that are leaves in it but hold others; of its children if it has none."""
    if isinstance(module, (_BatchNorm, _ConvNd)) or not any(isinstance(part, _BatchNorm) for part in module.modules()):
        return
    graph = None
    if not _is_layer(module) and not any(getattr(module, hooks) for hooks in HOOKS):
        graph = _trace(module)
    if graph is None:
        for child in module.children():
            yield from _graphs(child)
        return
    yield module, graph
    leaves = {node.target: module.get_submodule(node.target) for node in graph.nodes if node.op == "call_module"}
    for leaf in leaves.values():
        yield from _graphs(leaf)


def _trace(module: nn.Module) -> torch.fx.Graph | None:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
        return _Tracer().trace(module, concrete_args=defaults)
    except Exception:  # a forward that depends on its values; parts of it may still be traced
        return None


def _in_graph(root: nn.Module, graph: torch.fx.Graph) -> Pairs:
    """Pairs such that every call of the one is followed by the other alone, and nothing else calls the other."""
    before: dict[nn.Module, set[nn.Module | None]] = {}
    behind: dict[nn.Module, set[nn.Module | None]] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        module, source = root.get_submodule(node.target), node.args[0] if node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != "call_module":
            before.setdefault(module, set()).add(None)
        else:
            before.setdefault(module, set()).add(root.get_submodule(str(source.target)))
        users = [root.get_submodule(user.target) if user.op == "call_module" else None for user in node.users]
        behind.setdefault(module, set()).update(users if len(users) == 1 else (None,))
    return {
        bn: conv
        for bn, convs in before.items()
        if isinstance(bn, _BatchNorm) and len(convs) == 1 and (conv := next(iter(convs))) is not None
        if behind[conv] == {bn}
        if isinstance(conv, _ConvNd) or _is_deformable(conv)
    }

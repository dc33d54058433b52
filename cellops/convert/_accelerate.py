"""`accelerate`: known modules of a network become ours."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils import parametrize

from cellops import _backend
from cellops.convert._compare import difference
from cellops.convert._match import Match, Stays, match
from cellops.convert._report import Change, Report
from cellops.nn._children import addition
from cellops.nn.deform_conv2d import DeformConv2dPack, load_old_keys


def accelerate(model: nn.Module) -> Report:
    """Let the modules of a network that we know compute by the ops of cellops, in place and with their weights.

    Known are deformable convolutions of torchvision and mmcv, squeeze-and-excitation of timm and torchvision, timm's
    `EcaModule` and spatial attention, funnel activations, copies of these in other people's code, and grouped 1x1
    convolutions with what follows them in a sequence. A module is changed only if a copy of it, with drawn weights,
    gives the same outputs, gradients and buffers afterwards, in evaluation and in training, and if its device and dtype
    have a kernel. Parameters stay the same objects under the same names: checkpoints load both ways, and an optimizer
    made before goes on. Call it on the device where the model will run, and before `torch.compile`.

    Args:
        model: any network, in any mode.

    Returns:
        What was replaced, and what was left and why; prints as a table. A second call finds nothing to replace.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    changes: list[Change] = []
    packs: set[nn.Module] = set()
    for name, module in _modules(model):
        was = f"{type(module).__module__.partition('.')[0]} {type(module).__qualname__}"
        try:
            found = match(module)
            if found is None:
                continue
            _check(module, found)
        except Stays as reason:
            changes.append(Change(name, was, None, str(reason)))
            continue
        found.convert(module)
        changes.append(Change(name, was, found.becomes))
        if isinstance(module, DeformConv2dPack):
            packs.add(module)
    for parent in model.modules():
        if packs.intersection(parent.children()):
            load_old_keys(parent)
    return Report("replaced", tuple(changes))


def _modules(model: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, each once, parents first; none inside a script or inside what was just changed."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    before = type(model)
    yield prefix, model
    inside = type(model) is before or isinstance(model, nn.Sequential)
    if isinstance(model, torch.jit.ScriptModule) or not inside:
        return
    for name, child in model.named_children():
        yield from _modules(child, f"{prefix}.{name}" if prefix else name, seen)


LOST_WITH_NO_HARM = frozenset(("__init__", "forward", "extra_repr", "__repr__", "__annotate__", "__annotate_func__"))


def _overridden(module: nn.Module) -> list[str]:
    """Methods of PyTorch's that a class has its own of, and would lose: in `train`, people keep parts frozen."""
    base = nn.Sequential if isinstance(module, nn.Sequential) else nn.Module
    own = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.")]
    names = {name for cls in own for name, value in vars(cls).items() if inspect.isfunction(value)}
    if isinstance(module._modules.get("conv_offset"), nn.Module):
        names.discard("_load_from_state_dict")  # mmcv's packs rename old keys there, and so do ours
    return sorted(name for name in names - LOST_WITH_NO_HARM if hasattr(base, name))


def _check(module: nn.Module, found: Match) -> None:
    """Raise `Stays` with the reason why this module cannot become what its rule says."""
    if isinstance(module, torch.jit.ScriptModule):
        raise Stays("it is a script")
    if overridden := _overridden(module):
        raise Stays(f"its class has another {' and another '.join(overridden)}")
    for name, part in module.named_modules():
        what = f"its {name}" if name else "it"
        # a sequence calls those of its children that have something, and loses what was put around itself
        if (added := addition(part)) and (found.inputs is not None or (part is module and added != "a hook")):
            raise Stays(f"{what} has {added}")
        if parametrize.is_parametrized(part):
            raise Stays(f"{what} is parametrized")
    parameter = next(module.parameters())
    if parameter.device.type == "meta":
        raise Stays("its parameters are on the meta device, where nothing can be compared")
    choice = _backend.preferred(found.op, parameter.device.type, parameter.dtype)
    if choice.name == "reference":
        reasons = [f"{name}: {choice.reasons[name]}" for name in _backend.OPS[found.op]]
        raise Stays(f"{found.op} has no kernel for {parameter.dtype} on {parameter.device.type} ({'; '.join(reasons)})")
    if found.inputs is not None and (text := difference(module, found.convert, found.inputs)):
        raise Stays(text)

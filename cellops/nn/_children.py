"""Whether a module may read its children's weights in place of calling them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as _module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d)


def addition(module: nn.Module) -> str:
    """What a module has beyond its class: "a hook", "another forward" (of an adapter, of offloading), or ""."""
    if any(getattr(module, hooks) for hooks in HOOKS):
        return "a hook"
    return "another forward" if "forward" in module.__dict__ else ""


def watched(*modules: nn.Module) -> bool:
    """Whether one of the modules has a hook around it or another `forward`, or every module has a hook."""
    return any(addition(module) for module in modules) or _module._has_any_global_hook()


def are_plain(*children: nn.Module | None) -> bool:
    """Whether children are PyTorch's own, and nobody watches them being called; None is.

    One that was converted (SyncBatchNorm, a frozen one), parametrised, wrapped by adapters or prepared for
    quantisation, or that has hooks (of pruning, of statistics) or another `forward`, wants to be called.
    """
    there = [child for child in children if child is not None]
    return all(type(child) in _PLAIN for child in there) and not watched(*there)


def keeps_size(conv: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether a convolution has an odd and square window, stride 1, and zeros around that keep the size of the map."""
    size, sides = conv.kernel_size[0], len(conv.kernel_size)
    half, ones = size // 2, (1,) * sides
    return (
        size % 2 == 1
        and conv.kernel_size == (size,) * sides
        and conv.stride == ones
        and (conv.padding in ((half,) * sides, "same") or (half == 0 and conv.padding == "valid"))
        and (half == 0 or (conv.dilation == ones and conv.padding_mode == "zeros"))
    )

"""Weights spread over processes (FSDP): each holds a part, and whole ones exist only while a block computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SMALLEST_BLOCK = 10_000  # parameters; gathering fewer on their own costs more than it saves


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The modules that are gathered one at a time: the elements of the outermost containers.

    A container that is a class of its own is no boundary: its forward may read its children's weights by itself, as
    the fused modules of cellops do.
    """
    for child in network.children():
        whole = type(network) in CONTAINERS and type(child) not in CONTAINERS
        if whole and sum(parameter.numel() for parameter in child.parameters()) >= SMALLEST_BLOCK:
            yield child
        else:
            yield from blocks(child)


def shard(network: nn.Module, device: torch.device, size: int) -> nn.Module:
    """Spread the parameters of a network over `size` processes, in place; buffers stay whole.

    Args:
        network: the same in every process; on the CPU, from where it moves block by block.
        device: of the kind that computes.
        size: of the process group.
    """
    mesh = init_device_mesh(device.type, (size,))
    for block in list(blocks(network)):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; the tensor itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(values: Any, keep: bool) -> Any:
    """Plain nested values with whole tensors on the CPU in place of spread ones; every process has to call it.

    Args:
        values: dictionaries, lists and tuples of anything.
        keep: whether this process wants the result; without it spread tensors become None, to spare its memory.
    """
    if isinstance(values, DTensor):
        whole = values.full_tensor()
        return whole.cpu() if keep else None
    if isinstance(values, Mapping):
        return {key: gather(value, keep) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(gather(value, keep) for value in values)
    return values


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as `like` is; without communication, as each has the whole one."""
    if not isinstance(like, DTensor):
        return whole
    device = torch.device(like.device_mesh.device_type, like.to_local().device.index)
    return distribute_tensor(whole.to(device), like.device_mesh, like.placements, src_data_rank=None)


def spread_weights(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of whole tensors as one that a spread network loads; what it does not know stays as it is."""
    return {name: spread(tensor, like[name]) if name in like else tensor for name, tensor in weights.items()}


def spread_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer with whole tensors as one for the optimizer of a spread network.

    What has the shape of a parameter is spread as the parameter is.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def part(value: Any, like: Tensor) -> Any:
        return spread(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value

    return {
        **state,
        "state": {
            number: {name: part(value, parameters[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        },
    }

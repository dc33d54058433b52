"""The processes of a run: one, or several under `torchrun`, joined by Accelerate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Ranks:
    """This process among those of the run.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...
        distributed: "ddp", every process has the whole network, or "fsdp", each has a part of every weight.

    Raises:
        ValueError: the device is unknown or not there.
    """

    def __init__(self, device: str = "auto", distributed: str = "ddp") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.sharded = distributed == "fsdp" and self.size > 1
        self.accelerator: Any = None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError:
            raise ValueError(f"training.device: {device!r} is no device, take auto, cpu or cuda") from None
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"training.device is {device}, but this torch sees no GPU; take cpu or auto")
        if self.size > 1:
            from accelerate import Accelerator
            from accelerate.utils import DistributedDataParallelKwargs

            # DDP's own way with buffers leaves those of the first process in its network alone; see `average`.
            self.options = DistributedDataParallelKwargs(broadcast_buffers=False)
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[self.options])
            self.device = self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, network: nn.Module, unused: bool = False) -> nn.Module:
        """The network on its device, its gradients averaged over the processes.

        Args:
            network: the same in every process.
            unused: whether parameters get no gradient. DDP waits for one of each, unless it looks in every update for
                those that get none; FSDP needs no telling.
        """
        if self.sharded:
            from cellops.models.training.sharding import shard

            return shard(network, self.device, self.size)
        network = network.to(self.device)
        if self.accelerator is None:
            return network
        self.options.find_unused_parameters = unused
        return self.accelerator.prepare_model(network)

    def whole(self, values: Any) -> Any:
        """Nested values with whole tensors, in the first process; every process has to call it."""
        if not self.sharded:
            return values
        from cellops.models.training.sharding import gather

        return gather(values, self.main)

    def all_true(self, value: bool) -> bool:
        """Whether it holds in every process."""
        return not self.any_true(not value)[0]

    def any_true(self, *values: bool) -> list[bool]:
        """For each value, whether it holds in some process."""
        if self.size == 1:
            return list(values)
        flags = torch.tensor([float(value) for value in values], device=self.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def total(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over the processes into each tensor, so that all go on with the same."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(values.view_as(tensor))

    def collect(self, value: Any) -> list[Any]:
        """The values of all processes."""
        found = [value]
        if self.size > 1:
            found = [None] * self.size
            torch.distributed.all_gather_object(found, value)
        return found

    def gather(self, indices: np.ndarray, rows: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
        """The rows of all processes in the order of the wanted indices; what was padded in twice is there once.

        Args:
            indices: of the rows of this process [N].
            rows: [N, ...].
            wanted: all indices, each once.
        """
        place = {int(index): position for position, index in enumerate(wanted)}
        result = np.full((len(wanted), *rows.shape[1:]), np.nan, dtype=rows.dtype)
        for found, values in self.collect((indices, rows)):
            result[[place[index] for index in found.tolist()]] = values
        return result

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

"""The processes of a run: one, or several under `torchrun`, joined by Accelerate."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import nn


class Ranks:
    """This process among those of the run.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...

    Raises:
        ValueError: the device is unknown or not there.
    """

    def __init__(self, device: str = "auto") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
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

            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self.device = self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network on its device, its gradients averaged over the processes."""
        network = network.to(self.device)
        return network if self.accelerator is None else self.accelerator.prepare_model(network)

    def all_true(self, value: bool) -> bool:
        """Whether it holds in every process."""
        if self.size == 1:
            return value
        flag = torch.tensor(float(value), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def total(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        if self.size == 1:
            return values
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return sums.tolist()

    def gather(self, positions: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
        """Rows of every process put at their positions, [count, ...]; what was padded in twice is there once."""
        parts = [(positions, values)]
        if self.size > 1:
            parts = [None] * self.size  # type: ignore[list-item]
            torch.distributed.all_gather_object(parts, (positions, values))
        result = np.full((count, *values.shape[1:]), np.nan, dtype=values.dtype)
        for where, rows in parts:
            result[where] = rows
        return result

    def wait(self) -> None:
        """Return when every process is here."""
        if self.size > 1:
            self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group."""
        if self.size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

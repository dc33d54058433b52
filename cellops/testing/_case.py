"""One call of an op with what is right for it, and the drawing of its tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """One call of an op: its arguments, what is right, and what it costs.

    Attributes:
        op: name of the op and of its function, `cellops.<op>`; "<op>_batch_norm" is found in the op's own file.
        name: unique within the op.
        why: what this case is there to catch, or where its sizes come from.
        sizes: the numbers that make up the case (batch, in_channels, height, ...), for peers and reports.
        make: `make(dtype=torch.float32, device="cpu", memory_format=torch.contiguous_format, seed=0)` draws the keyword
            arguments of one call; every 4-D tensor has the memory format.
        reference: the oracle, called with the same keyword arguments.
        terms: products summed per element of the "output", of the gradient to each tensor argument and, where the op
            returns them, of the statistics "mean" and "var".
        flops: multiplications and additions of one forward call.
        elements: elements of all tensors that a forward call must read or write once.
        tags: "small" (every dtype and layout, second order), "edge" (every dtype and layout), "real" (a real layer's
            size, float32 only), "bench" (timed), "full" (timed by `--full` only), "memory" (its scratch is measured).
    """

    op: str
    name: str
    why: str
    sizes: Mapping[str, Any]
    make: Callable[..., Arguments]
    reference: Callable[..., Tensor]
    terms: Mapping[str, int]
    flops: int
    elements: int
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def function(self) -> Callable[..., Tensor]:
        """The function, which takes `backend=` besides the case's arguments."""
        return getattr(importlib.import_module(f"cellops.ops.{self.op.removesuffix('_batch_norm')}"), self.op)

    def bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """The least that a forward call moves: each tensor once."""
        return self.elements * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def off_grid(size: tuple[int, ...], spread: float, generator: torch.Generator) -> Tensor:
    """Normal offsets of the given spread in float64 whose fractions keep 0.1 away from the integer grid.

    There the bilinear sample has a kink: float32 and float64 may take different sides, and finite differences fail.
    """
    drawn = torch.randn(size, generator=generator, dtype=torch.float64) * spread
    return drawn.floor() + 0.1 + 0.8 * (drawn - drawn.floor())


def draw_normal(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def maker(
    shapes: Mapping[str, tuple[int, ...] | None],
    settings: Arguments,
    draw: Callable[[str, tuple[int, ...], torch.Generator], Tensor],
) -> Callable[..., Arguments]:
    """`Case.make` for tensors of these shapes, None for an absent one, drawn in their order in float64."""

    def make(
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        arguments: Arguments = dict(settings)
        for key, shape in shapes.items():
            if shape is None:
                arguments[key] = None
                continue
            tensor = draw(key, shape, generator)
            layout = memory_format if tensor.dim() == 4 else torch.contiguous_format
            arguments[key] = tensor.to(device, dtype).contiguous(memory_format=layout)
        return arguments

    return make

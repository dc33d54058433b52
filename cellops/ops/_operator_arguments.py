"""The arguments of an `Operator`: what is said of each tensor, the checks of a call, and how the library reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cellops import _native
from cellops.ops._registration import expect, expect_dense

Shape = tuple[int, ...]
Tensors = tuple[Tensor | None, ...]


class Call(NamedTuple):
    """A call by its shapes, which may be symbolic; `None` for an absent tensor."""

    shapes: tuple[Shape | None, ...]
    settings: tuple[Any, ...]


class Arguments:
    """Tensors by their names and marks, as `Operator` explains them."""

    def __init__(self, tensors: str, statistics: str, saves: str, check: Callable[[Call], Shape]) -> None:
        words = tensors.split()
        self.names = tuple(word.rstrip("?+=~") for word in words)
        self.optional = tuple("?" in word for word in words)
        self.wide = tuple("+" in word for word in words)
        self.widened = tuple("+" in word and "=" not in word for word in words)
        self.own_dtype = tuple(i for i, word in enumerate(words) if "=" in word)
        self.own_format = tuple(i for i, word in enumerate(words) if "~" in word)
        self.count = len(self.names)
        self.statistics = tuple(statistics.split())
        self.saved = tuple(saves.split())
        self.check = check

    def _check_devices(self, tensors: Tensors) -> None:
        input = tensors[0]
        assert input is not None
        device = input.device
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor is None:
                continue
            expect_dense(name, tensor)
            if tensor.device != device:
                raise RuntimeError(f"{name} must be on {device} like the input, got {tensor.device}")

    def _check(self, tensors: Tensors, settings: tuple[Any, ...]) -> Shape:
        self._check_devices(tensors)
        self._check_dtypes(tuple(None if tensor is None else tensor.dtype for tensor in tensors))
        return self._check_shapes(tuple(None if tensor is None else tensor.shape for tensor in tensors), settings)

    def _check_dtypes(self, dtypes: Sequence[torch.dtype | None]) -> None:
        if dtypes[0] not in _native.DTYPE_CODES:
            raise TypeError(f"input must be one of {', '.join(map(str, _native.DTYPE_CODES))}, got {dtypes[0]}")
        for name, wide, optional, dtype in zip(self.names, self.wide, self.optional, dtypes, strict=True):
            if dtype is None and not optional:
                raise TypeError(f"{name} must be a tensor, got None")
            if dtype is None or dtype == dtypes[0]:
                continue
            if not wide:
                raise TypeError(f"{name} must be {dtypes[0]} like the input, got {dtype}")
            if dtypes[0].itemsize != 2 or dtype != torch.float32:
                either = f"{dtypes[0]} like the input" + (" or torch.float32" if dtypes[0].itemsize == 2 else "")
                raise TypeError(f"{name} must be {either}, got {dtype}")

    def _check_shapes(self, shapes: tuple[Shape | None, ...], settings: tuple[Any, ...]) -> Shape:
        input = shapes[0]
        assert input is not None
        if len(input) != 4:
            raise ValueError(f"input must have 4 dimensions, got {len(input)}: shape {tuple(input)}")
        if input[1] < 1 or input[2] < 1 or input[3] < 1:
            raise ValueError(f"input must have at least one channel, row and column, got shape {tuple(input)}")
        return self.check(Call(shapes, settings))

    def _check_grad_output(self, grad_output: Tensor, input: Tensor | None, shape: Shape) -> None:
        assert input is not None
        expect("grad_output", grad_output.shape, shape)
        if grad_output.dtype != input.dtype:
            raise TypeError(f"grad_output must be {input.dtype} like the input, got {grad_output.dtype}")

    def _of_forward(self, found: Tensors, output: Shape, wide: torch.dtype) -> Tensors:
        """Statistics and saved tensors as the library reads them: None where nothing was saved."""
        dense: list[Tensor | None] = []
        for i, (name, one) in enumerate(zip((*self.statistics, *self.saved), found, strict=True)):
            of_channels = i < len(self.statistics)
            if one is None or (not of_channels and one.numel() == 0):
                dense.append(None)
                continue
            expect(name, one.shape, output[1:2] if of_channels else (math.prod(output) + 1,))
            if one.dtype != wide:
                raise TypeError(f"{name} must be {wide}, got {one.dtype}")
            dense.append(one.contiguous())
        return tuple(dense)

    def _dense(self, tensors: Tensors) -> tuple[Tensors, tuple[bool, ...]]:
        """The tensors as the library reads them, and which of those with a memory format are channels_last."""
        dense, flags = [], []
        for i, tensor in enumerate(tensors):
            keeps = i == 0 or i in self.own_format
            if tensor is not None and not tensor.is_contiguous():
                tensor = _native.dense(tensor) if keeps and tensor.dim() == 4 else tensor.contiguous()
            dense.append(tensor)
            if keeps:
                flags.append(tensor is not None and not tensor.is_contiguous())
        return tuple(dense), tuple(flags)

    def _widened(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        """The tensors, those marked "+" alone in the type that the library computes in."""
        if tensors[0].dtype == dtype:
            return tensors
        return tuple(
            tensor.to(dtype) if wide and tensor is not None else tensor
            for tensor, wide in zip(tensors, self.widened, strict=True)
        )


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type that the library computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""The types that oneDNN has fast loops for behind PyTorch's convolutions: modules stand back in those alone."""

from __future__ import annotations

import torch
from torch import Tensor

from cellops import _native


def dtype_of(input: Tensor) -> torch.dtype:
    """The type that a convolution of this input on the CPU gets, under autocast too."""
    if torch.is_autocast_enabled("cpu") and input.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return input.dtype


def convolves(dtype: torch.dtype) -> bool:
    """Whether oneDNN does: float32, and bfloat16 where the CPU multiplies it.

    Else PyTorch takes 3 to 50 times as long as ours (a Zen 4; bfloat16 with AVX2), 1x1 or depthwise.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16())


_ISA = _native.library().isa() if _native.error is None else ""  # constants, as a compiler traces what reads them
_MULTIPLIES_BFLOAT16, _MULTIPLIES_IN_TILES = _ISA in ("avx512_bf16", "amx_bf16"), _ISA == "amx_bf16"


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16, as the variant of the library tells."""
    return _MULTIPLIES_BFLOAT16


def multiplies_in_tiles() -> bool:
    """Whether it has those for whole tiles, AMX, as the variant of the library tells."""
    return _MULTIPLIES_IN_TILES

"""One table of op cases that tests and benchmarks share, and the tolerances a backend is held to.

for case in cases("deform_conv2d", "bench"):
    arguments = case.make(torch.bfloat16, memory_format=torch.channels_last)
    output = case.function(**arguments)
"""

from __future__ import annotations

from cellops.testing import (
    deform_conv2d,
    depthwise_conv2d,
    eca,
    frelu,
    group_conv1x1,
    offset_sample2d,
    spatial_attention,
    squeeze_excite,
)
from cellops.testing._case import Arguments, Case, maker, off_grid
from cellops.testing._check import (
    HALF_ERROR_RATIO,
    STATISTICS,
    TOLERANCES,
    assert_close_to_reference,
    forward_and_gradients,
    to_dtype,
)
from cellops.testing._compile_kernels import compile_kernels

__all__ = [
    "CASES",
    "HALF_ERROR_RATIO",
    "STATISTICS",
    "TOLERANCES",
    "Arguments",
    "Case",
    "assert_close_to_reference",
    "cases",
    "compile_kernels",
    "forward_and_gradients",
    "maker",
    "off_grid",
    "to_dtype",
]

CASES: list[Case] = [
    *deform_conv2d.CASES,
    *offset_sample2d.CASES,
    *frelu.CASES,
    *depthwise_conv2d.CASES,
    *squeeze_excite.CASES,
    *eca.CASES,
    *group_conv1x1.CASES,
    *spatial_attention.CASES,
]
"""Every case of every op. `small` cases stay off the kinks of their op, so that finite differences hold."""


def cases(op: str | None = None, *tags: str) -> list[Case]:
    """The cases of an op (None: of every op) that have at least one of the tags (none given: all cases)."""
    return [case for case in CASES if op in (None, case.op) and (not tags or case.tags.intersection(tags))]

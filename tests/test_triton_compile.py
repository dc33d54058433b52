"""What the Triton kernels compile to, on a machine with or without a GPU."""

from __future__ import annotations

import importlib.util

import pytest

from cellops import _backend
from cellops.testing import compile_kernels
from cellops.testing._compile_kernels import LIMITS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma"}
"""The matrix instructions of each architecture."""

PRODUCTS = ("deform_conv2d_forward_kernel", "deform_conv2d_backward_data_kernel", "group_conv1x1_forward_kernel")
"""Kernels whose product has at least 64 rows, pixels all of them: what the architecture's own instructions ask for."""

GATHERS = (
    "deform_conv2d_forward_kernel",
    "deform_conv2d_depthwise_forward_kernel",
    "deform_conv2d_backward_data_kernel",
)
"""Kernels that read corners from images with their channels innermost."""

THROUGH_L1 = ("deform_conv2d_forward_kernel", "deform_conv2d_backward_weight_kernel")
"""Kernels that read each image many times over: cp.async would fetch it from the second-level cache every time."""


def check(arch: str, op: str, dtypes: tuple[str, ...]) -> None:
    rows = compile_kernels(arch, [op], dtypes)
    assert rows
    for row in rows:
        assert row.spill_bytes == 0, row
        assert row.shared_bytes <= LIMITS[arch][1], row
        if row.kernel in PRODUCTS and "DEPTHWISE=True" not in row.configuration:
            assert MATRIX[arch] in row.instructions, row
        if row.kernel in GATHERS:
            assert row.load_bytes == 16, row
        if row.kernel in THROUGH_L1:
            assert "cp.async" not in row.instructions, row


def test_a_channel_attention_has_wide_loads_and_no_spills() -> None:
    check("sm_90", "eca", ("bfloat16",))


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="arch must be one of 'sm_80', 'sm_90', 'sm_100', 'sm_120', got 'sm_1'"):
        compile_kernels("sm_1")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_deformable_convolution_multiplies_by_the_architectures_own_instructions(arch: str) -> None:
    check(arch, "deform_conv2d", ("bfloat16",))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", [op for op, backends in _backend.OPS.items() if "triton" in backends])
def test_every_kernel(op: str, arch: str, dtype: str) -> None:
    check(arch, op, (dtype,))

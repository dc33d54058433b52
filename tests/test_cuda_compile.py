"""What the CUDA kernels compile to, where nvcc is there; no GPU is needed."""

from __future__ import annotations

import re

import pytest
from cuda_compile import ARCHITECTURES, FILES, SOURCES, Row, compile_file, known_architectures, nvcc, table

pytestmark = pytest.mark.skipif(nvcc() is None, reason="nvcc is not on the PATH")


def check(rows: list[Row]) -> None:
    assert rows
    for row in rows:
        assert row.spill_bytes == 0, row
        assert row.static_shared_bytes == 0, row
        assert row.registers <= 128, row  # four blocks of 128 threads on a multiprocessor of 65536
        # What owns a channel moves a number at a time, and so does a warp that walks down FReLU's columns: a warp's
        # numbers lie side by side, not a thread's.
        owns = row.kernel in ("DeformConv2dScatterBody", *(f"OffsetSample2dRegion{name}Body" for name in DIRECTIONS))
        assert row.load_bytes == (4 if row.kernel == "DeformConv2dScatterBody" else 16), row
        sampled = ("DeformConv2dColumnsBody", "DeformConv2dCornersBody", "FixedPointBody")
        if not owns and (row.kernel.startswith("OffsetSample2d") or row.kernel in sampled):
            assert row.store_bytes == 16, row
        if "fixed point" in row.arguments:
            assert row.addition_bytes == 8, row
        elif ("Backward" in row.kernel and row.kernel.startswith("Offset")) or row.kernel == "DeformConv2dScatterBody":
            assert row.addition_bytes == 4, row
        else:
            assert row.addition_bytes == 0 or row.kernel.startswith("Frelu"), row


DIRECTIONS = ("Forward", "Backward")


def test_deformable_convolution_is_compiled_as_it_is_meant() -> None:
    rows = compile_file("deform_conv2d", "90")
    check(rows)
    dtypes = {"float32", "bfloat16", "float16"}
    assert {row.arguments for row in rows} == dtypes | {f"{dtype} fixed point" for dtype in dtypes}
    assert "DeformConv2dCorners" in table(rows)


def test_every_file_is_compiled_and_every_entry_point_defined() -> None:
    entries = re.findall(r"^X\((\w+),", (SOURCES / "ops.inc").read_text(), re.MULTILINE)
    sources = "".join((SOURCES / f"{file}.cu").read_text() for file in FILES)
    defined = re.findall(r"CELLOPS_CUDA_ENTRY\((\w+),", sources)
    assert sorted(entries) == sorted(defined)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel(architecture: str, file: str) -> None:
    if architecture not in known_architectures():
        pytest.skip(f"this nvcc does not compile for sm_{architecture}")
    check(compile_file(file, architecture))

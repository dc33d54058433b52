"""What the Triton kernels compile to, on a machine with or without a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_calls import TRITON_OPS

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
"""Kernels that read corners from images with their channels innermost; what only adds to them reads none."""

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
        if row.kernel in GATHERS and "atomics" not in row.instructions:
            assert row.load_bytes == 16, row
        if row.kernel in THROUGH_L1:
            assert "cp.async" not in row.instructions, row


def test_a_channel_attention_has_wide_loads_and_no_spills() -> None:
    check("sm_90", "eca", ("bfloat16",))


ODD = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton_calls import arguments_of, empty, in_format

from cellops.testing._compile_kernels import CAPABILITIES, FORMATS, LIMITS, _source, call_launchers
from cellops.triton._launch import Limits, noted_launches

arch, op, dtype = sys.argv[1:]
drawn = {
    name: value.to(getattr(torch, dtype)) if isinstance(value, torch.Tensor) else value
    for name, value in arguments_of(op, empty(2, 24, 21, 25)).items()
}
with noted_launches(Limits(*LIMITS[arch])) as launches:
    for memory_format in FORMATS:
        for deterministic in (False, True):
            call_launchers(op, in_format(drawn, memory_format), deterministic)
for source, launch in {_source(launch)[0].hash(): (_source(launch)[0], launch) for launch in launches}.values():
    print(launch.kernel.__name__, launch.constants, flush=True)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[arch], 32), options=options)
"""
"""Compiles an op's kernels for 24 channels and an odd number of pixels: elements are loaded one by one."""


def run_without_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which the compiler may take down with it."""
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests"), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)


def compile_odd(arch: str, op: str, dtype: str) -> None:
    done = run_without_interpreter("-c", ODD, arch, op, dtype)
    assert done.returncode == 0, f"{done.returncode}: {done.stdout.splitlines()[-1:]}\n{done.stderr}"
    assert done.stdout


def test_channels_that_are_loaded_one_by_one() -> None:
    """What Triton 3.9's LLVM died of, with the process that compiled: float32 in channels_last for sm_90."""
    compile_odd("sm_90", "eca", "float32")


SIZES = """
import random

from triton_calls import arguments_of, empty

from cellops.testing._compile_kernels import _source, call_launchers
from cellops.triton._launch import noted_launches

draw = random.Random(0).randint
kernels = set()
for _ in range(50):
    with noted_launches() as launches:
        call_launchers("frelu", arguments_of("frelu", empty(draw(1, 64), 64, draw(7, 200), draw(7, 200))), False)
    for source, key in map(_source, launches):
        kernels.add((key, str(source.constants), str(source.attrs)))
print(len(kernels))
"""


def test_images_of_many_sizes_take_few_kernels() -> None:
    """Each takes a second to compile. They differ in a width, an image's size or a plane's that is a multiple of 16,
    and one of the three kernels in whether strips reach beyond their image."""
    done = run_without_interpreter("-c", SIZES)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 12


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("arch", LIMITS)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_every_kernel_at_odd_sizes(op: str, arch: str, dtype: str) -> None:
    compile_odd(arch, op, dtype)


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
@pytest.mark.parametrize("op", TRITON_OPS)
def test_every_kernel(op: str, arch: str, dtype: str) -> None:
    check(arch, op, (dtype,))


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=[] if op == "eca" else pytest.mark.exhaustive) for op in TRITON_OPS]
)
def test_a_repeated_launch_passes_on_what_tritons_own_does(op: str) -> None:
    done = run_without_interpreter(str(Path(__file__).with_name("triton_launch.py")), op)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("launches\n")

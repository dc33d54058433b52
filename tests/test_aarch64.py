"""The NEON variant: compiled by a cross compiler, and run under an emulator where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = "-std=gnu++17 -O2 -fopenmp -DCELLOPS_ISA=neon -fno-exceptions -fno-rtti -Wall -Wextra -Wno-psabi -Werror"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER}")
def test_kernels_compile_for_neon_and_are_right(tmp_path: Path) -> None:
    kernels = [path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if path.name != "dispatch.cpp"]
    objects = []
    for kernel in kernels:
        objects.append(str(tmp_path / f"{kernel.stem}.o"))
        subprocess.run([COMPILER, *FLAGS.split(), "-c", str(kernel), "-o", objects[-1]], check=True)
    program = tmp_path / "check"
    source = ROOT / "tests" / "aarch64_check.cpp"
    command = [COMPILER, "-std=gnu++17", "-O1", "-fopenmp", "-static", f"-I{ROOT / 'csrc'}", str(source), *objects]
    subprocess.run([*command, "-o", str(program)], check=True)
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but no {EMULATOR} to run it")
    done = subprocess.run([EMULATOR, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

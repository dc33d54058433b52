"""CPUs that this machine is not: the cross-compiled NEON variant, and an x86-64 without AVX, under an emulator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cellops import _native

ROOT = Path(__file__).resolve().parent.parent
COMPILER, EMULATOR, X86_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static", "qemu-x86_64-static"
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


@pytest.mark.slow
@pytest.mark.skipif(_native.error is not None, reason=f"no compiled library: {_native.error}")
@pytest.mark.skipif(shutil.which(X86_EMULATOR) is None, reason=f"no {X86_EMULATOR}")
@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "baseline"), ("Haswell", "avx2")])
def test_library_runs_on_older_cpus(cpu: str, isa: str) -> None:
    script = ROOT / "tests" / "old_cpu_check.py"
    command = [X86_EMULATOR, "-cpu", cpu, sys.executable, str(script), str(_native.library_path())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split()[0] == isa

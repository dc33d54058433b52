"""Compilers and settings of the build that are not this machine's usual ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILERS = ("g++", "clang++", *(f"g++-{version}" for version in range(9, 17)))
X86 = ("VARIANT_baseline", "VARIANT_avx2", "VARIANT_avx512", "VARIANT_avx512_bf16", "WITH_AMX")
PARTS = X86 if os.uname().machine == "x86_64" else ("VARIANT_baseline", "VARIANT_neon")


@pytest.mark.parametrize("compiler", COMPILERS)
def test_dispatcher_compiles(compiler: str) -> None:
    """Clang 14, Debian 12's, cannot ask for every feature of a CPU by name."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags = ["-std=gnu++17", "-fsyntax-only", "-Wall", "-Werror", *(f"-DCELLOPS_{part}" for part in PARTS)]
    done = subprocess.run([compiler, *flags, str(CSRC / "cpu" / "dispatch.cpp")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def configure(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Configure a build, for the CPU alone unless the arguments say otherwise; compiles nothing of it."""
    pybind11 = pytest.importorskip("pybind11")
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    found = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    found.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    command = [cmake, f"-S{CSRC}", f"-B{folder}", "-GNinja", "-DCELLOPS_CUDA=OFF", *found, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.slow
def test_unknown_variant_is_an_error(tmp_path: Path) -> None:
    """It would leave a library without kernels."""
    done = configure(tmp_path, "-DCELLOPS_VARIANTS=avx21")
    assert done.returncode != 0
    assert "CELLOPS_VARIANTS: avx21 is no instruction-set variant" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_build_on_one_thread_says_so(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON")
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels will run on one thread" in " ".join(done.stderr.split())
    assert "without OpenMP: one thread" in (tmp_path / "build.ninja").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_each_architecture_is_compiled_for(tmp_path: Path) -> None:
    """And the newest one's PTX comes with them, for GPUs that are newer still."""
    done = configure(tmp_path, "-DCELLOPS_CUDA=ON", "-DCELLOPS_CUDA_ARCHS=80;90")
    assert done.returncode == 0, done.stderr
    build = (tmp_path / "build.ninja").read_text()
    assert "sm_80, sm_90" in build
    for code in ("compute_80,code=[sm_80]", "compute_90,code=[sm_90]", "compute_90,code=[compute_90]"):
        assert code in build


@pytest.mark.slow
def test_the_nvcc_that_was_tried_is_named(tmp_path: Path) -> None:
    """Not another that lies where CMake looks for programs, but not for compilers."""
    wrong = configure(tmp_path / "wrong", "-DCELLOPS_CUDA=AUTO", CUDACXX="/nowhere/nvcc")
    assert "CUDACXX=/nowhere/nvcc does not compile" in " ".join(wrong.stderr.split())
    path = os.pathsep.join(folder for folder in os.environ["PATH"].split(os.pathsep) if folder != "/usr/local/bin")
    if shutil.which("nvcc", path=path) is None and shutil.which("c++", path=path) is not None:
        none = configure(tmp_path / "none", "-DCELLOPS_CUDA=AUTO", CUDACXX="", PATH=path)
        assert none.returncode == 0 and "does not compile" not in none.stderr
        assert "off: no nvcc was found" in (tmp_path / "none" / "build.ninja").read_text()

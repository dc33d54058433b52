"""Builds the extension `cellops._C` from csrc/ with CMake; the metadata is in pyproject.toml.

Environment:
    CELLOPS_CUDA: AUTO (default: build the CUDA kernels if nvcc works), ON (fail without it) or OFF.
    CELLOPS_CUDA_ARCHS: the GPU architectures to compile for, "80;90" (default: 80, 86, 89, 90, 100 and 120).
    CMAKE_ARGS: further arguments for CMake's configuration.
    CMAKE_BUILD_PARALLEL_LEVEL: how many files to compile at once (default: about one for each core).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The path of cmake or ninja, in an environment that may not be activated."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    found = shutil.which(name, path=path)
    if found is None:
        raise SystemExit(f"cellops needs {name} to compile csrc/: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11
        except ModuleNotFoundError:
            raise SystemExit("cellops needs pybind11 to compile csrc/: pip install pybind11") from None
        cuda = os.environ.get("CELLOPS_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            raise SystemExit(f"CELLOPS_CUDA must be AUTO, ON or OFF, got {cuda!r}")
        architectures = os.environ.get("CELLOPS_CUDA_ARCHS", "").replace(",", ";").replace(" ", "")
        if not re.fullmatch(r"(\d+[a-z]?(;\d+[a-z]?)*)?", architectures):
            raise SystemExit(f"CELLOPS_CUDA_ARCHS must be numbers as in 80;90, got {architectures!r}")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        cmake = tool("cmake")
        # Paths cached by an earlier build point into pip's deleted environment; the objects stay.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake,
            f"-S{ROOT / 'csrc'}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            "-DCMAKE_STRIP=",  # profilers and tests/test_packaging.py read the names of the functions
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCELLOPS_CUDA={cuda}",
            f"-DCELLOPS_CUDA_ARCHS={architectures}",
            f"-DCELLOPS_VERSION={self.distribution.get_version()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # No traceback where these fail: their own messages would stand far above its end.
        if subprocess.run(configure).returncode != 0:
            raise SystemExit("cellops was not built: CMake says why above; a C++17 compiler is needed (CXX names one)")
        if subprocess.run([cmake, "--build", str(build), "--target", "_C"]).returncode != 0:
            raise SystemExit(
                "cellops was not built: the compiler says why above; "
                "where it was killed for want of memory, try again with CMAKE_BUILD_PARALLEL_LEVEL=1"
            )


class CleanBuildPy(build_py):
    def run(self) -> None:
        # A module deleted since the last build would live on in build/lib and enter the wheel.
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    packages=[
        *find_packages(include=["cellops", "cellops.*"]),
        "cellops.models",
        *(f"cellops.models.{name}" for name in find_packages("models")),
    ],
    package_dir={"cellops": "cellops", "cellops.models": "models"},
    package_data={"cellops": ["py.typed"], "cellops.models": ["py.typed", "**/*.yaml", "**/*.css"]},
    ext_modules=[Extension("cellops._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)

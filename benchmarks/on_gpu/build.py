"""Compiles csrc/ in place, so that this tree's library is measured; the CUDA kernels too where nvcc works.

By CMake alone: a machine without network may have a setuptools that cannot read this pyproject.toml.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

from on_gpu import process
from on_gpu.process import ROOT
from on_gpu.progress import Budget, OutOfTime


def up_to_date() -> bool:
    """Whether the tree has a library that is no older than its sources."""
    name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")  # of this Python
    built = [path.stat().st_mtime for path in (ROOT / "cellops").glob(name)]
    sources = [path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return bool(built) and max(built) >= max(sources)


def loadable() -> bool:
    """Whether the tree has a library, old or new, that this Python can load."""
    try:
        code, _ = process.run(process.python("-c", "import torch, cellops._C"), 60.0)
    except OutOfTime:
        return False
    return code == 0


def build(budget: Budget) -> None:
    """Configure and compile.

    Raises:
        RuntimeError: cmake or pybind11 is missing, a command failed (the text has its last lines), or it took longer
            than what was left; the next build goes on.
    """
    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError(f"pybind11 is needed to compile csrc/: {error}") from error
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake is None:
        raise RuntimeError("cmake is needed to compile csrc/")
    folder = ROOT / "build" / f"gpu-{sys.implementation.cache_tag}"
    configure = [
        cmake,
        f"-S{ROOT / 'csrc'}",
        f"-B{folder}",
        *(["-GNinja"] if ninja else []),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'cellops'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCELLOPS_VERSION={_version()}",
        *_architectures(),
    ]
    for command in (configure, [cmake, "--build", str(folder), "--target", "_C", "--parallel"]):
        try:
            code, text = process.run(command, budget.left)
        except OutOfTime:
            raise RuntimeError(f"{' '.join(command)} was not finished in this call's time") from None
        if code:
            raise RuntimeError(f"{' '.join(command)} failed:\n{text[-4000:]}")


def _architectures() -> list[str]:
    """That of the GPUs here alone: nvcc compiles the six one after another."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    return [f"-DCELLOPS_CUDA_ARCHS={';'.join(f'{major}{minor}' for major, minor in sorted(found))}"]


def _version() -> str:
    names: dict[str, str] = {}
    exec(Path(ROOT / "cellops" / "_version.py").read_text(), names)
    return names["__version__"]

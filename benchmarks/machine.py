"""What a result depends on: the machine, the versions, the commit and the environment of the process."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "onnxruntime", "openvino", "onnx", "numpy", "pytest-benchmark")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Processes that wanted a core over the last minute, on average; 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def default_threads() -> int:
    """Threads of a run whose results are kept: the targets are set for two."""
    return min(2, cores())


def steady_environment(threads: int) -> dict[str, str]:
    """Variables the process must start with: malloc keeps freed pages (fresh ones make a copy five times dearer)."""
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "OMP_NUM_THREADS": str(threads),
    }


def cpu() -> str:
    """The processor's name; where a virtual machine hides its number, with family and model: "AMD EPYC, 26/2"."""
    from cellops.models.doctor import cpu_model

    name, path = cpu_model(), Path("/proc/cpuinfo")
    if re.search(r"\d", name) or not path.exists():
        return name
    numbers = re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)$", path.read_text(), re.MULTILINE)[:2]
    return f"{name}, {'/'.join(numbers)}" if numbers else name


def slug() -> str:
    """The machine's name as a file name, like "amd-epyc-9354-avx2-2-cores"."""
    from cellops import _native

    words = re.sub(r"\((R|TM)\)|CPU|Processor|@.*|\d+-Core", " ", cpu())
    return as_file_name(f"{words} {_native.library().isa()} {cores()} cores")


def as_file_name(text: str) -> str:
    """Small letters and digits, hyphens for the rest."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe(threads: int) -> dict[str, Any]:
    """The head of a results file."""
    from cellops import __version__, _native

    versions = {"python": platform.python_version(), "cellops": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    library = _native.library()
    return {
        "machine": {
            "name": slug(),
            "cpu": cpu(),
            "cores": cores(),
            "architecture": platform.machine(),
            "system": platform.system(),
            "libc": " ".join(platform.libc_ver()),
            "instruction_set": library.isa(),
            "compiler": library.build_info()["compiler"],
        },
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "threads": threads,
        "environment": {name: os.environ.get(name, "") for name in steady_environment(threads)},
    }


def commit() -> dict[str, Any]:
    """Hash of the checked out commit, and whether anything but results differs from it; "unknown" outside git."""
    try:
        sha = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return {"hash": "unknown", "dirty": True}
    return {"hash": sha, "dirty": bool(changed)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()

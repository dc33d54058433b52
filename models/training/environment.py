"""Where a run happened: versions, machine, the state of the repository."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scikit-learn", "pillow")


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_state() -> dict[str, Any] | None:
    """Commit and changed files of the clone that cellops runs from; None for an installed package."""
    from cellops import _source_tree

    if not _source_tree.is_source_tree():
        return None
    commit = _git("rev-parse", "HEAD", folder=_source_tree.ROOT)
    if commit is None:
        return None
    changed = _git("status", "--porcelain", folder=_source_tree.ROOT) or ""
    return {"commit": commit, "changed_files": [line[3:] for line in changed.splitlines()][:100]}


def environment() -> dict[str, Any]:
    """Facts about this process, as plain values."""
    import cellops
    from cellops.models.doctor import cpu_model

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "cellops": cellops.__version__,
        "python": platform.python_version(),
        "packages": versions,
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "settings": {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "CELLOPS_"))},
        "git": git_state(),
    }

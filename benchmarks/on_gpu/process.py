"""Rows that are processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from on_gpu.progress import OutOfTime

ROOT = Path(__file__).resolve().parents[2]
LAST = 6000  # characters of what a failed process wrote that are kept


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command in the repository's root; this tree's cellops comes first.

    Raises:
        OutOfTime: it was still running; it and its children are ended.
    """
    variables = {**os.environ, "PYTHONPATH": _path(os.environ), "PYTHONUNBUFFERED": "1", **environment}
    process = subprocess.Popen(
        [*command],
        cwd=ROOT,
        env=variables,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise OutOfTime(" ".join(command)) from None
    return process.returncode, text


def python(*arguments: str) -> list[str]:
    """The command of this interpreter."""
    return [sys.executable, *arguments]


def _path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))

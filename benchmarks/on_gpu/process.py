"""Rows that are processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from on_gpu.progress import OutOfTime

ROOT = Path(__file__).resolve().parents[2]
LAST = 6000  # characters of what a failed process wrote that are kept
GRACE = 10.0  # seconds between Ctrl-C, after which pytest says what failed, and the end


def heed_interrupts() -> None:
    """Let this process and those that it starts heed Ctrl-C: what a shell has put into the background ignores it, and
    hands that on to its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command in the repository's root; this tree's cellops comes first.

    Raises:
        OutOfTime: it was still running, and is ended with its children; with what it wrote.
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
    grace = min(GRACE, seconds / 2)
    try:
        text, _ = process.communicate(timeout=max(seconds - grace, 1.0))
        return process.returncode, text
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        text, _ = process.communicate(timeout=max(grace, 1.0))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
    finally:
        _end_group(process.pid)
    raise OutOfTime(text)


def _end_group(leader: int) -> None:
    """End what a process has left of its own children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def python(*arguments: str) -> list[str]:
    """The command of this interpreter."""
    return [sys.executable, *arguments]


def _path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))

"""The folder of a run: whether it is free, and keeping a second process out of it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO, Any


def free_folder(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that holds nothing."""
    number, candidate = 1, folder
    while is_taken(candidate):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


def is_taken(folder: Path) -> bool:
    """Whether a folder holds more than what a start leaves that was ended before it wrote a recipe."""
    return folder.exists() and any(
        not (path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(".tmp")))
        for path in folder.iterdir()
    )


def try_lock(file: IO[Any]) -> bool:
    """Whether an open file is this process's alone until it is closed; where the file system has no locks, it is."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def lock(folder: Path) -> IO[Any]:
    """Keep a second process out of the folder for as long as the returned file is open.

    Raises:
        ValueError: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")  # noqa: SIM115 (open as long as the run)
    if not try_lock(file):
        file.close()
        raise ValueError(f"another process is training in {folder}")
    return file

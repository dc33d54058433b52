"""Image files by name, found while the ones before them are worked on."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from cellops.models.data.images import SUFFIXES
from cellops.models.data.layouts.listing import LITTER

Found = tuple[Path, str | None]
"""A file, and why it cannot be read where that is known: a folder that may not be listed stands here too."""
Files = frozenset[tuple[str, str]]
"""Folders, with all links followed, and names in them."""


def image_files(paths: Iterable[str | Path], leave_out: Iterable[Path] = ()) -> Iterator[Found]:
    """The files given, and the images in the folders given, each once; folders are read on the way.

    A folder's images come in the order of their names, and of one folder at a time the names are held. Links to files
    are followed, links to folders are not. What file managers and archives leave in folders (`._x.jpg`, `__MACOSX/`,
    hidden files) is passed over, as in training; a path that is given counts whatever its name.

    Args:
        paths: files of any name, and folders, of which files named as images are taken.
        leave_out: files that do not count in folders, for the results of an earlier call.

    Raises:
        ValueError: a path does not exist, or a folder holds no image; at the call, before the first file.
    """
    given = list(dict.fromkeys(Path(path) for path in paths))
    absent = next((path for path in given if not path.exists()), None)
    if absent is not None:
        raise ValueError(f"there is no image or folder {absent}")
    skipped = frozenset((os.path.realpath(path.parent), path.name) for path in leave_out)
    for path in given:
        if path.is_dir() and next(_inside(path, skipped), None) is None:
            raise ValueError(f"no images in the folder {path}; known are {', '.join(sorted(SUFFIXES))}")
    return _each(given, skipped)


def _each(given: list[Path], skipped: Files) -> Iterator[Found]:
    folders = {os.path.abspath(path) for path in given if path.is_dir()}
    seen: set[str] = set()
    for path in given:
        place = os.path.abspath(path)
        if place in seen or _is_found_in(path, folders):
            continue
        seen.add(place)
        if path.is_dir():
            yield from _inside(path, skipped)
        else:
            yield path, None


def _inside(folder: Path, skipped: Files) -> Iterator[Found]:
    """The images of a folder and of those in it."""
    place = os.path.realpath(folder) if skipped else ""
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not LITTER.match(entry.name)
                and (entry.is_dir(follow_symlinks=False) or os.path.splitext(entry.name)[1].lower() in SUFFIXES)
            )
    except OSError as error:
        yield folder, f"{folder}: the folder cannot be read: {error.strerror or error}"
        return
    for name, is_folder in names:
        path = folder / name
        if is_folder:
            yield from _inside(path, skipped)
        elif (place, name) in skipped:
            continue
        elif path.is_file() or not path.exists():  # a link to nowhere is listed as such when it is opened
            yield path, None


def _is_found_in(path: Path, folders: Collection[str]) -> bool:
    """Whether a walk of the other folders meets it."""
    if path.is_symlink() and path.is_dir():
        return False
    if not path.is_dir() and path.suffix.lower() not in SUFFIXES:
        return False
    parent = Path(os.path.abspath(path))
    while parent != parent.parent and not LITTER.match(parent.name):
        parent = parent.parent
        if str(parent) in folders:
            return True
        if parent.is_symlink():
            return False
    return False

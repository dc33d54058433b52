"""The files of a folder, found once for all layouts."""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from cellops.models.data.images import SUFFIXES
from cellops.models.data.samples import CellData, Sample

# Left by file managers and archives.
LITTER = re.compile(r"^(\..*|__MACOSX|Thumbs\.db|desktop\.ini)$", re.IGNORECASE)

# What a spreadsheet computes when it opens a table; signs alone, as of a finding "+" or "-ve", start no function.
# Some versions take full-width characters for the plain ones.
FORMULA = re.compile(r"\s*(?:[=@\uff1d\uff20]|[-+\uff0d\uff0b].*(?:[|!]|\w\())", re.DOTALL)
UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # control characters, and turns of direction


class LayoutError(ValueError):
    """A path holds no data set in a known layout; the message says what was expected and what is there."""


@dataclass(frozen=True)
class Listing:
    """Files below a folder.

    Attributes:
        root: the folder itself, links resolved.
        paths: relative paths with "/", sorted.
        folders: relative paths of the folders that hold no file, sorted.
        links: how many links to folders were not followed.
        dangling: relative paths of links that lead nowhere, left out.
    """

    root: Path
    paths: tuple[str, ...]
    folders: tuple[str, ...] = ()
    links: int = 0
    dangling: tuple[str, ...] = ()

    @classmethod
    def of(cls, root: Path) -> Listing:
        """List a folder and everything below it.

        A link to an image is listed wherever it leads: `read_image` refuses it by name if that is out of the folder.
        Links out of the folder to other files are left out, since nothing reads those.

        Raises:
            LayoutError: a symbolic link leads out of the folder to a table or folder, whose images would be missed,
                or is a table and leads nowhere; or a name is not in UTF-8.
            OSError: a folder cannot be read.
        """
        root = root.resolve()
        paths: list[str] = []
        empty: list[str] = []
        links = 0
        dangling: list[str] = []
        pending = [""]
        while pending:
            prefix = pending.pop()
            before = len(paths) + len(pending)
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    if LITTER.match(entry.name):
                        continue
                    relative = prefix + entry.name
                    _check_name(root, relative)
                    if entry.is_symlink() and suffix(relative) not in SUFFIXES:
                        target = Path(os.path.realpath(root / relative))
                        _check_link(root, relative, target)
                        if not target.exists():
                            dangling.append(relative)
                            continue
                        if not target.is_relative_to(root):
                            continue
                        if target.is_dir():  # inside the root, so its files are listed where they really lie
                            links += 1
                            continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(relative + "/")
                    else:
                        paths.append(relative)
            if prefix and len(paths) + len(pending) == before:
                empty.append(prefix.rstrip("/"))
        return cls(root, tuple(sorted(paths)), tuple(sorted(empty)), links, tuple(sorted(dangling)))

    @cached_property
    def images(self) -> tuple[str, ...]:
        """The paths that end like images."""
        return tuple(path for path in self.paths if suffix(path) in SUFFIXES)

    def named(self, *names: str) -> list[str]:
        """The files of one of these names, in any folder, whatever their case."""
        wanted = {name.lower() for name in names}
        return [path for path in self.paths if PurePosixPath(path).name.lower() in wanted]

    def path(self, relative: str) -> Path:
        """The file."""
        return self.root / relative

    def others(self) -> str | None:
        """What else lies there, as a note."""
        counts = Counter(suffix(path) or "no suffix" for path in self.paths if suffix(path) not in SUFFIXES)
        if not counts:
            return None
        return (
            "Files that are no images: "
            + ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()))
            + "."
        )

    def summary(self) -> str:
        """What was found, for an error."""
        if not self.paths:
            return "the folder is empty" if not self.folders else f"only empty folders, e.g. {self.folders[0]}/"
        shown = self.images[:2] or self.paths[:2]
        return f"{len(self.paths)} files, {len(self.images)} of them images, e.g. {', '.join(shown)}"


def _check_name(root: Path, relative: str) -> None:
    """Raise for a name that a table, a report or the file of folds could not hold."""
    try:
        relative.encode("utf-8")
    except UnicodeEncodeError:
        shown = os.fsencode(relative).decode("utf-8", "backslashreplace")
        raise LayoutError(
            f"{root}: the name of {shown} is not in UTF-8, as in archives that were made with another encoding. Rename "
            "it, or unpack the archive again with its encoding (convmv renames whole folders, unzip -O unpacks)"
        ) from None


def check_class(name: str) -> None:
    """Raise for a class that no one can see, or that a spreadsheet would compute.

    Raises:
        ValueError: the name is empty, has control characters or starts a formula.
    """
    if not name.strip() or UNSEEN.search(name):
        raise ValueError(f"the class {name!a} is empty or has characters that cannot be seen: rename it")
    if any(FORMULA.match(cell) for cell in name.split(";")):  # which separates cells in half of Europe
        raise ValueError(f"the class {name!r} would be a formula where a table is opened: rename it")


def check_classes(names: Iterable[str]) -> None:
    """Raise for classes that a reader of results could take for each other; see also `check_class`.

    Raises:
        ValueError: two differ in case, spaces or the way in which Unicode spells a letter only; names them.
    """
    alike: dict[str, str] = {}
    for name in names:
        check_class(name)
        seen = "".join(letter for letter in name if unicodedata.category(letter) != "Cf")  # as zero-width spaces
        key = " ".join(unicodedata.normalize("NFKC", seen).casefold().split())
        if key in alike:
            raise ValueError(
                f"the classes {alike[key]!a} and {name!a} differ in case, spaces or spelling of a letter only: rename "
                "one, or join them with data.options.classes"
            )
        alike[key] = name


def _check_link(root: Path, relative: str, target: Path) -> None:
    """Raise for a link without which images or their groups would be missed."""
    table = suffix(relative) == ".csv"
    if table and not target.exists():
        raise LayoutError(f"{root / relative} is a symbolic link to {target}, which does not exist")
    if not target.is_relative_to(root) and (table or target.is_dir()):
        raise LayoutError(
            f"{root / relative} is a symbolic link to {target}, outside the data folder; "
            "give the folder that the files really lie in, or copy them"
        )


def suffix(path: str) -> str:
    """The suffix in lower case, with its dot."""
    return posixpath.splitext(path)[1].lower()  # of a million paths, where PurePosixPath takes a minute


def stem(path: str) -> str:
    """The file's name without folder and suffix."""
    return posixpath.splitext(posixpath.basename(path))[0]


def parent(path: str) -> str:
    """The folder's own name, "" at the root."""
    return posixpath.basename(posixpath.dirname(path))


@dataclass(frozen=True)
class Found:
    """An image that a layout recognised, its class by name."""

    path: str
    label: str
    group: str | None = None
    split: str | None = None
    mask: str | None = None


def assemble(
    name: str,
    listing: Listing,
    found: Iterable[Found],
    notes: Iterable[str | None] = (),
    classes: Iterable[str] | None = None,
) -> CellData:
    """The data set of what was found, ordered by path; classes sorted by name unless given.

    Args:
        notes: sentences; None is left out.
        classes: names, where the layout knows an order or classes that have no image.
    """
    images = sorted(found, key=lambda image: image.path)
    names = tuple(classes) if classes is not None else tuple(sorted({image.label for image in images}))
    position = {label: index for index, label in enumerate(names)}
    grouped = any(image.group is not None for image in images)
    samples = tuple(
        Sample(
            id=image.path,
            path=listing.path(image.path),
            label=position[image.label],
            group=image.path if image.group is None else image.group,
            split=image.split,
            mask=None if image.mask is None else listing.path(image.mask),
        )
        for image in images
    )
    written = [note for note in notes if note]
    if listing.links:
        written.append(f"{listing.links} links to folders inside the data folder were not followed.")
    if listing.dangling:
        some = ", ".join(listing.dangling[:3]) + (", ..." if len(listing.dangling) > 3 else "")
        written.append(f"Links that lead nowhere were left out: {some}.")
    data = CellData(name, listing.root, names, samples, grouped=grouped, notes=tuple(written))
    alone = [label for label, count in data.class_counts.items() if count == 1]
    if alone:
        data = replace(data, notes=(*data.notes, f"Only one image: {', '.join(alone)}."))
    return data


def counted(count: int, one: str, many: str) -> str | None:
    """A note about what was left out, or None where there was nothing."""
    return None if count == 0 else f"{count} {one if count == 1 else many}"


def classes_between(paths: Iterable[str]) -> Iterator[str]:
    """The names of the folders that hold these files."""
    yield from sorted({parent(path) for path in paths})

"""Makes a clone's own `cellops/`, which shadows the installed one when Python starts in the repository root, complete.

The compiled `_C` comes from the installed distribution; `cellops.models` is the clone's own `models/` folder, so that
all Python files come from one tree.
"""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.metadata import distributions
from importlib.util import spec_from_file_location
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
LIBRARY_NAMES = tuple("_C" + suffix for suffix in EXTENSION_SUFFIXES)


def is_source_tree() -> bool:
    """Whether this package is a clone's folder and not an installed one (an editable install counts as a clone)."""
    return (ROOT / "csrc" / "CMakeLists.txt").is_file() and (ROOT / "pyproject.toml").is_file()


def library() -> Path | None:
    """The compiled `_C` of this tree, or that of an installed cellops if it was built later; None without either.

    `pip install -e .` leaves its library in the tree, where a later `pip install .` neither replaces nor removes it.
    """
    own = next((path for name in LIBRARY_NAMES if (path := PACKAGE / name).is_file()), None)
    if own is None:
        return installed_library()
    installed = installed_library(first=True)
    later = installed is not None and installed.stat().st_mtime > own.stat().st_mtime
    return installed if later else own


def installed_library(first: bool = False) -> Path | None:
    """The compiled `_C` of an installed cellops that this interpreter can load, or None.

    Args:
        first: ask only the one that pip would uninstall, which may be an editable one without a library of its own.
    """
    for distribution in distributions(name="cellops"):
        for file in distribution.files or ():
            if file.name in LIBRARY_NAMES:
                library = Path(str(distribution.locate_file(file)))
                if library.is_file():
                    return library
        if first and distribution.read_text("RECORD") is not None:  # a clone's egg-info has none
            return None
    return None


class ModelsFinder:
    """Maps `cellops.models` to the clone's `models/`, as the package map does in an install."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "cellops.models":
            return None
        folder = ROOT / "models"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def map_models() -> None:
    """Make `cellops.models` importable from a clone; does nothing in an installed package."""
    if is_source_tree() and not (PACKAGE / "models").exists() and ModelsFinder not in sys.meta_path:
        sys.meta_path.append(ModelsFinder)  # type: ignore[arg-type]

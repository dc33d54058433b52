"""The site of the documentation: `sphinx-build -W --keep-going docs docs/_build` (needs the [models,docs] extras).

Sphinx with MyST and Furo: MkDocs 1 has had no release since August 2024 and its Material theme ends in November 2026.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

import gallery  # noqa: E402

import cellops  # noqa: E402

project = "cellops"
author = "the authors of cellops"
release = cellops.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"cellops {release}"
myst_heading_anchors = 3

default_role = "code"  # what docstrings put between backticks is code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False


def setup(app: Any) -> None:
    """Draw the gallery before the pages are read."""
    app.connect("builder-inited", lambda _: gallery.draw_all(DOCS / "_gallery"))

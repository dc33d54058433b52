"""The site of the documentation builds without a warning: no broken link, no missing picture, no unknown name."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cellops

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def api_names() -> set[str]:
    """What the pages of the reference document, by full name."""
    names = set()
    for page in (DOCS / "api").glob("*.rst"):
        module = ""
        for what, name in re.findall(r"^\.\. (currentmodule|autofunction|autoclass):: (\S+)$", page.read_text(), re.M):
            if what == "currentmodule":
                module = name
            else:
                names.add(name if name.startswith("cellops.") else f"{module}.{name}")
    return names


def test_every_public_name_is_documented() -> None:
    public = set(cellops.__all__) - {"__version__", "testing"}
    assert public <= {name.rpartition(".")[2] for name in api_names()}
    pytest.importorskip("timm", reason="timm is not installed")
    for name in api_names():
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_links_between_files_hold(page: Path) -> None:
    """Those of the README, which is not part of the site, and of pages as they are read in a repository."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        generated = target.startswith("_gallery/")
        assert target.startswith("http") or generated or (page.parent / target).exists(), target


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo", "matplotlib", "timm"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[models,docs]'")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "trees",
        DOCS,
        tmp_path / "site",
    ]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / f"{page.stem}.html").exists()
    text = (tmp_path / "site" / "api" / "ops.html").read_text()
    assert "cellops.deform_conv2d" in text
    pictures = set(re.findall(r"_gallery/(\w+)\.svg", (DOCS / "gallery.md").read_text()))
    assert pictures == {path.stem for path in (DOCS / "_gallery").glob("*.svg")}
    for name in pictures:
        drawn = (tmp_path / "site" / "_images" / f"{name}.svg").read_text()
        assert "<path" in drawn, f"{name}.svg is empty"

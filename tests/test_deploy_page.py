"""docs/deploy.md: its commands and programs run one after another in one folder, and its table is what was measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import trees

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "deploy.md"
BLOCKS = re.findall(r"^```(bash|py)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

for package in ("timm", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page takes for granted: images, a file that is none, and the command."""
    path = tmp_path_factory.mktemp("deploy")
    for number in range(20):
        trees.write(path / "new_slides" / f"{number:02d}.png", trees.picture(number, (70, 64)))
    (path / "notes.txt").write_text("no image")
    command = path / "bin" / "cellops"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cellops.models "$@"\n')
    command.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def failed() -> list[int]:
    """Numbers of the blocks that did not run; what follows them has nothing to stand on."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run_in_order(number: int, folder: Path, failed: list[int]) -> None:
    kind, text = BLOCKS[number]
    if "--engine ray" in text and find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'cellops[ray]'")
    if 0 in failed:
        pytest.fail("the page's run could not be trained")
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])),
        "CELLOPS_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-euc", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        failed.append(number)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_the_page_has_its_blocks() -> None:
    """No block is of a kind that nothing runs; test_readme.py runs those of ```python."""
    kinds = re.findall(r"^```(\w+)$", PAGE.read_text(), re.MULTILINE)
    assert set(kinds) == {"bash", "py", "python"} and len(BLOCKS) == sum(kind != "python" for kind in kinds)
    assert kinds.count("bash") >= 6 and kinds.count("py") >= 3


def test_the_costs_are_what_was_measured() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "deploy.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

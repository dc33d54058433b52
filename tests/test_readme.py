"""Every python block of the README and of docs/ runs, and the speed tables are what the results say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def python_blocks(page: Path = README) -> list[tuple[int, str]]:
    """First line and text of each block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


@pytest.mark.parametrize(("line", "block"), [pytest.param(*block, id=f"line{block[0]}") for block in python_blocks()])
def test_block_runs(line: int, block: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = compile("\n" * (line - 1) + block, str(README), "exec")  # tracebacks show the README's line numbers
    exec(code, {"__name__": "__main__"})


RUN_BLOCKS = """
import json, sys
page, blocks = json.load(sys.stdin)
for line, block in blocks:
    exec(compile("\\n" * (line - 1) + block, page, "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.stem) for page in sorted((ROOT / "docs").glob("*.md")) if python_blocks(page)]
)
def test_blocks_of_docs_run(page: Path) -> None:
    """Each page in a process of its own: the blocks may register networks."""
    pytest.importorskip("timm", reason="timm is not installed")
    given = json.dumps([str(page), python_blocks(page)])
    done = subprocess.run([sys.executable, "-c", RUN_BLOCKS], input=given, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["table.py", "experiments.py"])
def test_tables_come_from_the_results(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path",
    sorted(
        set(
            re.findall(
                r"`((?:csrc|cellops|benchmarks|tests|models|docs)/[\w/.]*)`",
                "".join(page.read_text() for page in (README, *(ROOT / "docs").glob("*.md"))),
            )
        )
    ),
)
def test_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()

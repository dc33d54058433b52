"""Benchmark runs: options, the steady process they run in, the report at the end and the results file.

pytest benchmarks --benchmark-only            # ten minutes and more; writes benchmarks/results/<machine>.json
pytest benchmarks --benchmark-only --full     # more shapes
pytest benchmarks/bench_accelerate.py --benchmark-only --full   # all of one file: results/accelerate/<machine>.json
pytest benchmarks --benchmark-only --threads 1 -k forward   # part of it: printed, not written
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest

BENCHMARKS = Path(__file__).resolve().parent
RECORDS = pytest.StashKey[list[dict[str, Any]]]()
EXPECTED = pytest.StashKey[set[str]]()
PASSED = pytest.StashKey[set[str]]()
HEAD = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cellops benchmarks")
    group.addoption("--threads", type=int, default=machine.default_threads(), help="threads of every variant")
    group.addoption("--full", action="store_true", help="more shapes than the default run under 10 minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a benchmark that only --full runs")
    config.stash[RECORDS], config.stash[EXPECTED], config.stash[PASSED] = [], set(), set()
    if config.getoption("benchmark_only", False) and not config.getoption("collectonly"):
        config.option.benchmark_quiet = True  # its table knows no peers; ours is printed instead
        _start_again_steadily(config)


def _start_again_steadily(config: pytest.Config) -> None:
    """Replace the process by one with the environment that measuring needs: malloc reads its own only at the start."""
    wanted = machine.steady_environment(config.getoption("threads"))
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # gives the new process the terminal back
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if BENCHMARKS in item.path.parents]
    if not config.getoption("full", False):
        left_out = [item for item in ours if item.get_closest_marker("full")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    config.stash[EXPECTED] = {item.nodeid for item in items if item in ours and not item.get_closest_marker("skip")}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    """How many threads every variant uses."""
    return request.config.getoption("threads")


@pytest.fixture(autouse=True)
def _threads_of_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Keeps the labels and figures of one benchmark for the report and the results file."""

    def keep(**fields: Any) -> None:
        benchmark.extra_info.update(fields)
        request.config.stash[RECORDS].append(fields)
        request.config.stash[PASSED].add(request.node.nodeid)

    return keep


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("benchmark_only", False):
        session.config.stash[HEAD] = {"commit": machine.commit(), "load_at_start": machine.load()}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = config.stash[RECORDS]
    if not records:
        return
    import report

    terminalreporter.section("benchmarks")
    head = machine.describe(config.getoption("threads")) | config.stash.get(HEAD, {})
    for line in (*_head_lines(head), *report.lines(records), "", _save(config, head, records)):
        terminalreporter.write_line(line)


def _head_lines(head: dict[str, Any]) -> list[str]:
    computer = head["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    busy = head.get("load_at_start", 0.0) > 0.5 * computer["cores"]
    return [
        f"{computer['cpu']}, {computer['cores']} cores, {computer['instruction_set']}, {head['threads']} threads",
        versions,
        *(
            [f"the machine was busy at the start (load {head['load_at_start']:.1f}): do not trust these"]
            if busy
            else []
        ),
    ]


def _save(config: pytest.Config, head: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """Write the results of a whole run, or of all of one file; say where, or why not."""
    reason = _why_not_saved(config)
    if reason:
        return f"results not written: {reason}"
    from targets import judge_all

    folder = BENCHMARKS / "results" / _part(config)
    path = folder / f"{head['machine']['name']}.json"
    folder.mkdir(exist_ok=True)
    results = {"format": 1, **head, "full": config.getoption("full"), "targets": judge_all(records), "records": records}
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return f"results written to {path}; `python benchmarks/table.py` puts them in README.md and docs/speed.md"


def _why_not_saved(config: pytest.Config) -> str | None:
    threads = config.getoption("threads")
    files = {file.name for file in BENCHMARKS.glob("bench_*.py")}
    left_out = set() if _part(config) else files - {_file(node) for node in config.stash[EXPECTED]}
    if not config.getoption("benchmark_only", False):
        return "the run had no --benchmark-only"
    if threads != machine.default_threads():
        return f"{threads} threads are not the default"
    if any("::" in argument for argument in config.args) or config.option.keyword or left_out:
        return "only part of the benchmarks was collected"
    missing = config.stash[EXPECTED] - config.stash[PASSED]
    return f"{len(missing)} benchmarks were not run to their end" if missing else None


def _part(config: pytest.Config) -> str:
    """The folder for a run of all of one file, "" for a run of all files."""
    files = {_file(node) for node in config.stash[EXPECTED]}
    if not config.getoption("full") or len(files) != 1:
        return ""
    return files.pop().removeprefix("bench_").removesuffix(".py")


def _file(node: str) -> str:
    return Path(node.split("::")[0]).name

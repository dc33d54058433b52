"""`cellops doctor`: says what is installed and runs every op against its reference."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

import cellops
from cellops import _backend, _native, _source_tree, testing


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def cores() -> str:
    """How many there are, and how many of them this process may use (taskset, the cpuset of a container)."""
    there_are = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else there_are
    return f"{there_are} cores" + (f", {usable} of them for this process" if usable != there_are else "")


def openmp(maps: Path = Path("/proc/self/maps")) -> str:
    """The OpenMP runtimes in this process: one, unless cellops was compiled with clang."""
    try:
        found = sorted(set(re.findall(r"(/.*/lib[gi]?omp[^/\n]*)$", maps.read_text(), re.MULTILINE)))
    except OSError:
        return "unknown on this system"
    return " and ".join(found) + (", whose threads spin against each other" if len(found) > 1 else "") or "none"


def facts() -> dict[str, str]:
    """Where this process runs and with how many threads."""
    prefixes = ("OMP_", "GOMP_", "KMP_", "CELLOPS_")
    settings = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(prefixes)]
    return {
        "package": f"{_source_tree.PACKAGE} ({'source tree' if _source_tree.is_source_tree() else 'installed'})",
        "cpu": f"{cpu_model()}, {cores()}",
        "threads": f"{torch.get_num_threads()}, set by torch.set_num_threads",
        "openmp": openmp(),
        "environment": ", ".join(settings) or "no OMP_* or CELLOPS_* set",
    }


def check_op(op: str, device: str) -> str | None:
    """Run the small cases of one op in float32 on a device, forward and backward; the first failure's text, or None."""
    for case in testing.cases(op, "small"):
        arguments = case.make(torch.float32, device=device)
        try:
            found = testing.forward_and_gradients(case.function, arguments)
            expected = testing.forward_and_gradients(case.reference, testing.to_dtype(arguments, torch.float64))
            for name, value in expected.items():
                testing.assert_close_to_reference(found[name], value, terms=case.terms[name], what=name)
        except Exception as error:
            return f"{case}: {type(error).__name__}: {error}"
    return None


def problems() -> list[str]:
    """What is wrong with this installation; prints one line for each op and device that was checked."""
    found = []
    if _native.error is not None:
        found.append(f"the compiled library is missing: {_native.error}")
    elif (built := _native.library().build_info()["version"]) != cellops.__version__:
        found.append(f"the compiled library is of version {built}, the Python files of {cellops.__version__}")
    for op in _backend.OPS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            backend = _backend.preferred(op, device, torch.float32).name
            failure = check_op(op, device)
            print(f"check  {op} on {device} by {backend}: {'FAILED' if failure else 'agrees with the reference'}")
            if failure:
                found.append(failure)
    return found


def main() -> int:
    """Print the report. Returns 0 if all is well, else 1."""
    print(cellops.explain())
    print()
    for name, text in facts().items():
        print(f"{name:<14}{text}")
    print()
    found = problems()
    for text in found:
        print(f"problem: {text}")
    print("all is well" if not found else f"{len(found)} problem{'s' if len(found) > 1 else ''} found")
    return 1 if found else 0

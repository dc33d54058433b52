"""Writes docs/gpu.md's tables: what each op's kernels must and do move on a GPU, the bound, and what was measured.

python benchmarks/bounds.py             # update docs/gpu.md
python benchmarks/bounds.py --check     # fail where docs/gpu.md is not what the formulas and results say
python benchmarks/bounds.py --print     # to the terminal

Sizes are those of `python benchmarks/gpu.py ops` on an H200, bounds its measured rates. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import machine
import pages

sys.path.insert(0, str(machine.ROOT))  # this tree's cellops, installed or not
os.environ.pop("TRITON_INTERPRET", None)

import torch
from on_gpu import shapes, work
from on_gpu.kernels import key_of as kernels_of
from on_gpu.targets import ours, trusted
from targets import Record

PAGE = machine.ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- bounds: begin (written by benchmarks/bounds.py) -->", "<!-- bounds: end -->"
DTYPE, LAYOUT = "bfloat16", "channels_last"


def markdown(measured: list[Record]) -> str:
    """The table of calls and the table of their kernels."""
    calls = [["op", "input", "direction", "must move", "does move", "products", "bound", "by", "measured"]]
    columns = ["launches", "bytes", "of an input", "gathered", "products", "bound", "measured"]
    kernels = [["op", "direction", "kernel", *columns]]
    seen: set[tuple[str, str]] = set()
    for point in sorted(shapes.points(), key=lambda point: shapes.OPS.index(point.op)):
        if (point.dtype, point.layout, point.sweep) != (DTYPE, LAYOUT, False):
            continue
        dtype = shapes.DTYPES[point.dtype]
        factor = shapes.scale(point.case, dtype, work.CACHED)
        arguments = shapes.make(point, torch.device("meta"), factor)
        done = work.of_triton(point.case, arguments, point.direction, factor)
        seconds, what = done.bound
        shape = ",".join(map(str, arguments["input"].shape))
        mode = f"{point.op}, pool" if arguments.get("mode") == "pool" else point.op
        calls.append(
            [
                f"`{mode}`" if mode == point.op else f"`{point.op}` pool",
                shape,
                point.direction,
                _bytes(done.floor_bytes),
                _bytes(done.moved_bytes),
                _operations(sum(kernel.products for kernel in done.kernels)),
                f"{1e6 * seconds:.0f} µs",
                what,
                _measured(measured, point.key, seconds),
            ]
        )
        if (mode, point.direction) in seen:
            continue
        seen.add((mode, point.direction))
        input_bytes = arguments["input"].nbytes
        for kernel in done.kernels:
            kernels.append(
                [
                    f"`{point.op}`" + (" pool" if mode != point.op else ""),
                    point.direction,
                    f"`{kernel.name}`" if kernel.name.endswith("_kernel") else kernel.name,
                    str(kernel.launches),
                    _bytes(kernel.bytes),
                    f"{kernel.bytes / input_bytes:.2f}",
                    _bytes(kernel.gathered_bytes) if kernel.gathered_bytes else "–",
                    _operations(kernel.products),
                    f"{1e6 * max(kernel.bounds.values()):.0f} µs",
                    _measured_kernel(measured, kernels_of(point), kernel.name),
                ]
            )
    return f"{pages.table(calls)}\n\nKernel by kernel, for the first shape of each op:\n\n{pages.table(kernels)}"


def results() -> list[Record]:
    """The rows of the GPU results that are kept."""
    files = sorted((machine.ROOT / "benchmarks" / "results").glob("*.json"))
    found = [json.loads(file.read_text()) for file in files]
    return [record for one in found if "gpu" in one["machine"] for record in one["records"]]


def _measured(records: list[Record], key: str, bound: float) -> str:
    for record in records:
        if record["key"] == key and record.get("kind") == "gpu" and trusted(record):
            median = record["variants"][ours(record)]["median"]
            return f"{1e6 * median:.0f} µs, {100 * bound / median:.0f} % of the bound"
    return "not yet"


def _measured_kernel(records: list[Record], key: str, name: str) -> str:
    """By the profiler; what is not ours is PyTorch's, together."""
    for record in records:
        if record["key"] == key and (found := record.get("variants", {}).get("cellops triton")):
            others = sum(kernel["seconds"] for one, kernel in found.items() if not one.isidentifier())
            if name in found or not name.isidentifier():
                return f"{1e6 * (found[name]['seconds'] if name in found else others):.0f} µs"
    return "not yet"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} B"


def _operations(count: int) -> str:
    return f"{count / 1e9:.1f} GFLOP" if count else "–"


def main() -> int:
    """Returns 1 where --check finds an old page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing")
    mode.add_argument("--print", action="store_true", help="print the tables")
    options = parser.parse_args()
    tables = markdown(results())
    if options.print:
        print(tables)
        return 0
    page = Path(PAGE)
    old = page.read_text(encoding="utf-8")
    new = pages.updated(old, tables + "\n", BEGIN, END)
    if options.check:
        name = page.relative_to(machine.ROOT)
        print(f"{name} agrees" if old == new else f"{name} is old: run python benchmarks/bounds.py")
        return int(old != new)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

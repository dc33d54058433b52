"""Compiles csrc/cuda for GPU architectures with nvcc, on a machine with or without a GPU, and says what came out.

    python tests/cuda_compile.py                    # a table of every kernel for every architecture that is shipped
    python tests/cuda_compile.py 90 100             # of some
    python tests/cuda_compile.py 90 --file frelu    # of one op

About 15 seconds of one core for each architecture.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
FILES = tuple(sorted(path.stem for path in SOURCES.glob("*.cu")))
ARCHITECTURES = ("80", "86", "89", "90", "100", "120")


@dataclass(frozen=True)
class Row:
    """What one kernel compiles to.

    Attributes:
        architecture: "90" for sm_90.
        kernel: its body's name.
        arguments: of the body's template: the storage type, then what the body says.
        registers: of each thread.
        spill_bytes: of each thread, loads and stores, and what else it has on a stack.
        static_shared_bytes: of each block; what FReLU's kernels use is given at the launch, 48 KiB at most.
        load_bytes: the widest load from global memory.
        store_bytes: the widest store.
        addition_bytes: the widest addition in global memory, 0 without any.
    """

    architecture: str
    kernel: str
    arguments: str
    registers: int
    spill_bytes: int
    static_shared_bytes: int
    load_bytes: int
    store_bytes: int
    addition_bytes: int


def nvcc() -> str | None:
    """The compiler, or None."""
    return shutil.which("nvcc")


def known_architectures() -> tuple[str, ...]:
    """Those of `ARCHITECTURES` that this nvcc compiles for."""
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return tuple(name for name in ARCHITECTURES if f"sm_{name}" in listed.split())


def compile_file(name: str, architecture: str) -> list[Row]:
    """The kernels of csrc/cuda/<name>.cu for one architecture.

    Raises:
        RuntimeError: it does not compile; the text has what nvcc said.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc(), "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin", "-keep", "-keep-dir"]
        command += [folder, "-o", f"{folder}/out.cubin", str(SOURCES / f"{name}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}.cu does not compile for sm_{architecture}: {done.stderr}")
        ptx = (Path(folder) / f"{name}.ptx").read_text()
    bodies = {found[1]: found[2] for found in re.finditer(r"\.entry (\w+)\((.*?)^}", ptx, re.DOTALL | re.MULTILINE)}
    rows = []
    for part in done.stderr.split("Compiling entry function '")[1:]:
        symbol = part.partition("'")[0]
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert spills is not None and registers is not None, part
        kernel, arguments = _named(symbol)
        rows.append(
            Row(
                architecture,
                kernel,
                arguments,
                int(registers[1]),
                sum(int(count) for count in spills.groups()),
                int(shared[1]) if shared else 0,
                _widest(r"\bld\.(?:\w+\.)*?global(?:\.\w+)*?", bodies[symbol]),
                _widest(r"\bst\.(?:\w+\.)*?global(?:\.\w+)*?", bodies[symbol]),
                _widest(r"\bred\.(?:\w+\.)*?global\.add", bodies[symbol]),
            )
        )
    return rows


def _widest(instruction: str, ptx: str) -> int:
    """Bytes of the widest such instruction."""
    found = re.finditer(instruction + r"(?:\.v([248]))?\.[busf](\d+)\b", ptx)
    return max((int(one[1] or 1) * int(one[2]) // 8 for one in found), default=0)


def _named(symbol: str) -> tuple[str, str]:
    """The body's name and its template's arguments, from a kernel's mangled name."""
    found = re.search(r"\d([A-Z][A-Za-z0-9]*Body)I(f|NS\d*_\d+b?float16E)([fl])?(?:L([ib])(\d+)E)?E", symbol)
    assert found is not None, symbol
    dtype = {"f": "float32"}.get(found[2], "bfloat16" if "bfloat16" in found[2] else "float16")
    meaning = {"i": "any size" if found[5] == "0" else f"{found[5]}x{found[5]}", None: ""}
    meaning["b"] = "channels_last" if found[5] == "1" else "nchw"
    sums = "fixed point" if found[3] == "l" else ""
    return found[1], " ".join(word for word in (dtype, meaning[found[4]], sums) if word)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    cells = [("sm", "kernel", "for", "regs", "spills", "static shared", "load", "store", "red")]
    for row in rows:
        numbers = (row.registers, row.spill_bytes, row.static_shared_bytes, row.load_bytes, row.store_bytes)
        name = row.kernel.removesuffix("Body")
        cells.append((row.architecture, name, row.arguments, *map(str, numbers), str(row.addition_bytes or "-")))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)) for cell in cells)
    return "\n".join(map(str.rstrip, lines))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Compile csrc/cuda and print what each kernel takes.")
    parser.add_argument("architectures", nargs="*", metavar="architecture", help="as 90; all that nvcc knows if none")
    parser.add_argument("--file", action="append", choices=FILES, help="may be repeated; all by default")
    arguments = parser.parse_args()
    if nvcc() is None:
        raise SystemExit("nvcc is not on the PATH")
    wanted = product(arguments.architectures or known_architectures(), arguments.file or FILES)
    print(table([row for architecture, name in wanted for row in compile_file(name, architecture)]))


if __name__ == "__main__":
    main()

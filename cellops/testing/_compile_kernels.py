"""Compiles every Triton kernel for a GPU architecture, on a machine with or without a GPU, and says what came out.

    python -m cellops.testing sm_90                            # a table
    python -m cellops.testing sm_90 eca --dtype bfloat16 --json  # some of it, for programs

The launchers run on tensors without data over the layers of `CASES`, and note what they would launch: the kernels,
types, alignments and configurations are those that such calls use. Triton's interpreter and its compiler cannot share a
process, so `compile_kernels` starts another one.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cellops
from cellops import _backend

CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "sm_120": 120}
LIMITS = {"sm_80": (108, 166912), "sm_90": (132, 232448), "sm_100": (148, 232448), "sm_120": (170, 101376)}
"""Multiprocessors, and bytes of shared memory that a program may have, of an A100, H200, B200 and RTX 5090."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"\bmma\.sync",
    "cp.async": r"\bcp\.async\.c[ag]",
    "atomics": r"\b(?:red|atom)\.[a-z.]*global",
}


@dataclass(frozen=True)
class Row:
    """What one kernel at one configuration compiles to.

    Attributes:
        op: the op whose launcher asked for it.
        kernel: the Triton function's name.
        dtype: the op's storage type.
        configuration: its compile-time constants, warps and stages.
        registers: of each thread.
        spill_bytes: of each thread, in local memory.
        shared_bytes: of each program.
        instructions: names of `INSTRUCTIONS` that occur.
        load_bytes: the widest load from global memory, `cp.async` included.
        atomic_bytes: the widest atomic addition, 0 without any.
        code: machine instructions of a thread: those outside loops, then those of each loop without the loops in it.
        call: the case that asked for it first.
    """

    op: str
    kernel: str
    dtype: str
    configuration: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    load_bytes: int
    atomic_bytes: int
    code: tuple[int, ...]
    call: str


def noted(op: str, arch: str, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[tuple[str, torch.dtype, Any]]:
    """The case, dtype and `Launch` of every launch that forward and backward of an op's layers make.

    Each layer is called as it is and with 64 times the images, which fills a GPU.
    """
    from cellops.testing import cases
    from cellops.triton._launch import Limits, noted_launches

    for case in cases(op, "real", "bench", "full"):
        drawn = case.make(device="meta")
        for dtype, memory_format, scale, deterministic in product(dtypes, FORMATS, (1, 64), (False, True)):
            arguments = {
                name: _meta(value, dtype, memory_format, scale if name in ("input", "offset", "mask") else 1)
                for name, value in drawn.items()
            }
            with noted_launches(Limits(*LIMITS[arch])) as launches:
                call_launchers(op, arguments, deterministic)
            yield from ((f"{case.name} x{scale}", dtype, launch) for launch in launches)


def _meta(value: Any, dtype: torch.dtype, memory_format: torch.memory_format, scale: int) -> Any:
    """A tensor without data like the value, with `scale` times the images."""
    if not isinstance(value, Tensor):
        return value
    tensor = torch.empty((scale * value.shape[0], *value.shape[1:]), dtype=dtype, device="meta")
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def call_launchers(op: str, arguments: dict[str, Any], deterministic: bool) -> None:
    """Forward and backward as the op would call the launchers."""
    forward, backward = (_backend.gpu_launcher("triton", op, direction) for direction in ("forward", "backward"))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = forward(**arguments)
        output, *statistics = found if isinstance(found, tuple) else (found,)
        given = {**arguments, "grad_output": torch.empty_like(output)}
        given.update(zip(("mean", "var"), statistics, strict=False))
        given["wanted"] = [True] * _MOST_TENSORS
        taken = inspect.signature(backward).parameters
        backward(**{name: value for name, value in given.items() if name in taken})
    finally:
        torch.use_deterministic_algorithms(before)


_MOST_TENSORS = 5


def _source(launch: Any) -> tuple[Any, tuple[Any, ...]]:
    """The launch as Triton's compiler takes it, and what tells it from others."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(launch.constants), {}
    for index, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value is None or (value == 1 and name not in launch.kernel.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
            if value % 16 == 0 and name not in launch.kernel.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(launch.constants, "constexpr"))
    # Sizes are left out: whether one is 1 or a multiple of 16 makes other code, but no other configuration.
    types = [kind for name, kind in signature.items() if kind.startswith("*") or constants.get(name, 1) is None]
    blocks = {name: value for name, value in launch.constants.items() if name not in _SIZES}
    key = (launch.kernel.__name__, *types, str(blocks), launch.num_warps, launch.num_stages)
    return ASTSource(launch.kernel, signature, constants, attributes), key


_SIZES = ("CONV", "SEGMENTS", "BLOCKS")
"""Compile-time constants that say what is computed, not how: a kernel is compiled for the first that it comes with."""

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}


def compile_kernels(arch: str, ops: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Row]:
    """Compile the Triton kernels of the ops' layers for a GPU, in a process of their own; no GPU is needed.

    Args:
        arch: "sm_80", "sm_90", "sm_100" or "sm_120".
        ops: whose kernels; those of every op if empty.
        dtypes: "float32", "bfloat16", "float16"; all if empty. About a second for each row, on one core.

    Returns:
        A row for each kernel at each configuration.

    Raises:
        ValueError: an unknown architecture.
        RuntimeError: a kernel does not compile; the text has what the compiler said.
    """
    if arch not in CAPABILITIES:
        raise ValueError(f"arch must be one of {', '.join(map(repr, CAPABILITIES))}, got {arch!r}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(cellops.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    chosen = [word for name in dtypes for word in ("--dtype", name)]
    command = [sys.executable, "-m", "cellops.testing", arch, *ops, *chosen, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the kernels do not compile for {arch}: {done.stderr}")
    tuples = ("instructions", "code")
    return [Row(**{**row, **{name: tuple(row[name]) for name in tuples}}) for row in json.loads(done.stdout)]


def compile_here(arch: str, ops: Sequence[str], dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    """The same in this process, which must not interpret.

    Raises:
        RuntimeError: the process has TRITON_INTERPRET=1.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("a process with TRITON_INTERPRET=1 cannot compile kernels")
    seen = set()
    for op in ops or [op for op, backends in _backend.OPS.items() if "triton" in backends]:
        for call, dtype, launch in noted(op, arch, dtypes):
            source, key = _source(launch)
            if key not in seen:
                seen.add(key)
                yield _compile(arch, op, call, dtype, launch, source)


def _compile(arch: str, op: str, call: str, dtype: torch.dtype, launch: Any, source: Any) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[arch], 32), options=options)
    registers, spill_bytes = _resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    widths = [int(bits) // 8 * int(count or 1) for count, bits in _LOAD.findall(ptx)]
    widths += [int(size, 0) for size in _ASYNC_LOAD.findall(ptx)]
    atomics = [int(bits) // 8 * int(count or 1) for count, bits in _ATOMIC.findall(ptx)]
    constants = [f"{name}={value}" for name, value in launch.constants.items()]
    return Row(
        op=op,
        kernel=launch.kernel.__name__,
        dtype=str(dtype).removeprefix("torch."),
        configuration=" ".join([*constants, f"warps={launch.num_warps}", f"stages={launch.num_stages}"]),
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        instructions=tuple(name for name, pattern in INSTRUCTIONS.items() if re.search(pattern, ptx)),
        load_bytes=max(widths, default=0),
        atomic_bytes=max(atomics, default=0),
        code=_code(compiled.asm["cubin"]),
        call=call,
    )


_LOAD = re.compile(r"ld\.global(?:\.[a-z_0-9:]+)*?(?:\.v(\d))?\.[bf](\d+)")
_ASYNC_LOAD = re.compile(r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]+\], \[[^]]+\], (\w+)")
_ATOMIC = re.compile(r"(?:red|atom)\.[a-z.]*global[a-z.]*\.add(?:\.noftz)?(?:\.v(\d))?\.f(\d+)")


def _disassembled(cubin: bytes, tool: str, option: str) -> str:
    """What one of NVIDIA's tools, which Triton brings, says of a cubin."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills, as the assembler recorded them."""
    text = _disassembled(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2]) + int(found[3])


def _code(cubin: bytes) -> tuple[int, ...]:
    """Instructions outside loops, and of each loop, in the order of their ends: what a branch goes back over."""
    labels: dict[str, int] = {}
    code: list[tuple[int, str]] = []  # the loop that an instruction is in, 0 for none, and its text
    loops = 0
    for line in _disassembled(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*);", line)) and not found[1].startswith("NOP"):
            code.append((0, found[1]))
            back = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", found[1])
            start = labels.get(back[1], len(code)) if back else len(code)
            if start < len(code) - 1:  # behind the end, a branch to itself
                loops += 1
                code[start:] = [(loop or loops, text) for loop, text in code[start:]]
    return tuple(sum(loop == number for loop, _ in code) for number in range(loops + 1))


def table(rows: list[Row]) -> str:
    """The rows as text."""
    names = ("kernel", "type", "regs", "spills", "shared", "instructions", "load", "atomic", "code")
    cells = [(*names, "configuration", "call")]
    for row in rows:
        instructions = " ".join(row.instructions) or "-"
        numbers = (str(row.registers), str(row.spill_bytes), str(row.shared_bytes))
        widths = (str(row.load_bytes), str(row.atomic_bytes or "-"))
        code = "+".join(map(str, row.code))
        cells.append((row.kernel, row.dtype, *numbers, instructions, *widths, code, row.configuration, row.call))
    sizes = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(text.ljust(size) for text, size in zip(cell, sizes, strict=True)) for cell in cells)
    return "\n".join(map(str.rstrip, lines))


def main() -> None:
    """The command."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser = argparse.ArgumentParser(
        prog="python -m cellops.testing", description="Compile every Triton kernel for one GPU architecture."
    )
    parser.add_argument("arch", choices=CAPABILITIES)
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--dtype", action="append", choices=names, help="may be repeated; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON list of rows")
    arguments = parser.parse_args()
    dtypes = [getattr(torch, name) for name in arguments.dtype or names]
    rows = list(compile_here(arguments.arch, arguments.ops, dtypes))
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else table(rows))

"""The whole test suite on the device, and compute-sanitizer on a small case of each kernel.

Test files run side by side as processes of their own, the contract's rows op by op: on a GPU they compile some three
thousand kernels, which takes one core three quarters of an hour. What runs kernels of a GPU comes first.
"""

from __future__ import annotations

import re
import shutil
from functools import partial

from cellops import _backend
from on_gpu import process
from on_gpu.progress import Record, Row, Setup, Skipped, Step

CONTRACT = "tests/test_contract.py"
PARTS = {
    "deform_conv2d, float32": "deform_conv2d- and -float32-",
    "deform_conv2d, bfloat16": "deform_conv2d- and -bfloat16-",
    "deform_conv2d, float16": "deform_conv2d- and -float16-",
    "offset_sample2d": "offset_sample2d-",
    "frelu": "frelu-",
    "frelu_batch_norm": "frelu_batch_norm-",
    "depthwise_conv2d": "depthwise_conv2d-",
    "depthwise_conv2d_batch_norm": "depthwise_conv2d_batch_norm-",
    "squeeze_excite": "squeeze_excite-",
    "eca": "eca-",
    "group_conv1x1": "group_conv1x1-",
    "group_conv1x1_batch_norm": "group_conv1x1_batch_norm-",
    "spatial_attention": "spatial_attention-",
}
"""Parts of the contract by what their tests' names have in them; what none has is the last part."""

ON_A_GPU = "(triton or cuda) and "
"""The rows of the contract that kernels of a GPU run; the others follow at the end."""

GPU_PARTS = {
    "streams": "side_stream",
    "graphs": "captured_in_a_graph",
    "deterministic": "deterministic_mode or any_order",
    "networks": "networks_answer or recipe_trains or network_trains",
    "compiled": "compiled_with_its_backward or autocast",
    "large tensors": "2_to_the_31",  # alone: it measures the free memory
}
"""Parts of tests/test_gpu.py, whose kernels take one process nine minutes to compile."""

SMALL_TESTS = ("tests/test_gpu.py", "tests/test_flops.py")
"""Two of the files, for `--small`."""

TOOLS = ("memcheck", "racecheck")


def suite(setup: Setup) -> Step:
    """Every file of tests/; what is marked slow comes last."""
    if setup.small:
        return Step("suite", [_tests(f"suite {file}", file) for file in SMALL_TESTS], parallel=setup.jobs)
    on_gpu, triton = "tests/test_gpu.py", "tests/test_triton.py"  # what no other machine can say
    files = sorted(path.relative_to(process.ROOT).as_posix() for path in (process.ROOT / "tests").glob("test_*.py"))
    files = [triton, *(file for file in files if file not in (on_gpu, triton, CONTRACT))]
    parts = {**PARTS, "the rest": _none_of(PARTS)}
    gpu_parts = {**GPU_PARTS, "the rest": _none_of(GPU_PARTS)}
    rows = [_tests(f"suite {on_gpu}, {name}", on_gpu, "-k", words) for name, words in gpu_parts.items()]
    for kernels, words in (("", ON_A_GPU), (" on the CPU", "not triton and not cuda and ")):
        rows += [
            _tests(f"suite {CONTRACT}, {name}{kernels}", CONTRACT, "-k", f"{words}({part})")
            for name, part in parts.items()
        ]
        rows += [] if kernels else [_tests(f"suite {file}", file) for file in files]
    rows += [_tests(f"suite {file}, slow", file, "-m", "slow") for file in files if _has_slow(file)]
    return Step("suite", rows, parallel=setup.jobs)


def _none_of(parts: dict[str, str]) -> str:
    """The words that choose what no part has."""
    return " and ".join(f"not ({words})" for words in parts.values())


def _tests(key: str, file: str, *words: str) -> Row:
    return Row(key, 15.0, partial(_pytest, file, words))


def _pytest(file: str, words: tuple[str, ...], left: float) -> Record:
    command = process.python("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", file, *words)
    code, text = process.run(command, left, OMP_NUM_THREADS="2")
    lines = [line for line in text.strip().splitlines() if line.strip()]
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])}
    record: Record = {"kind": "suite", "counts": counts, "summary": lines[-1].strip("= ")}
    record["skips"] = [line for line in lines if line.startswith("SKIPPED")]
    nothing_there = 5  # pytest's exit code where no test was left
    if code not in (0, nothing_there):
        record["failed"] = text[-process.LAST :]
    return record


def _has_slow(file: str) -> bool:
    return "mark.slow" in (process.ROOT / file).read_text()


def sanitizer(setup: Setup) -> Step:
    """Each tool on each op: forward and backward of its small cases, with atomics and without. Ops with kernels in CUDA
    C++ come first: theirs are written by hand."""
    tools = ("none",) if setup.device != "cuda" else TOOLS
    ops = tuple(_backend.OPS)[-2:] if setup.small else tuple(_backend.OPS)
    ops = tuple(sorted(ops, key=lambda op: "cuda" not in _backend.OPS[op]))
    rows = [Row(f"sanitizer {tool} {op}", 20.0, partial(_sanitize, tool, op, setup)) for tool in tools for op in ops]
    return Step("sanitizer", rows, parallel=max(1, setup.jobs // 2))


def _sanitize(tool: str, op: str, setup: Setup, left: float) -> Record:
    script = str(process.ROOT / "benchmarks" / "on_gpu" / "one_call.py")
    command = process.python(script, op, setup.device, *(["--small"] if setup.small else []))
    environment = {}
    if tool != "none":
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if found is None:
            raise Skipped("compute-sanitizer is not on the PATH")
        command = [found, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", *command]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or an access past a tensor hits torch's own pool
    code, text = process.run(command, left, **environment)
    found_lines = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    calls = [line for line in text.splitlines() if line.startswith("called ")]
    record: Record = {"kind": "sanitizer", "tool": tool, "op": op, "calls": calls}
    record["summary"] = "; ".join([*found_lines, f"{len(calls)} calls"])
    if code or not calls:
        record["failed"] = text[-process.LAST :]
    return record

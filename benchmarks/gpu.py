"""Everything that needs a GPU, in steps that fit into ten minutes each and go on where the last call stopped.

python benchmarks/gpu.py all --minutes 10 --output results/       # again and again, until nothing is left
python benchmarks/gpu.py suite sanitizer --output results/        # the tests, compute-sanitizer
python benchmarks/gpu.py ops --output results/                    # every op beside its peers
python benchmarks/gpu.py threads zoo experiments --output results/
python benchmarks/gpu.py ops --again "frelu" --output results/    # measure rows anew
python benchmarks/gpu.py all --device cpu --small --output /tmp/x # walk through every path where there is no GPU

csrc/ is compiled in place first where the library is missing or old. Results are in one JSON, results/<gpu>.json,
written after every row. Copied to benchmarks/results/, it is what `python benchmarks/table.py` makes the README's table
from, and `python benchmarks/bounds.py` docs/gpu.md's.
The exit code is 0 when all is done and nothing failed, 1 after a failure, 3 when rows are left for another call.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import machine
from on_gpu import build
from on_gpu.progress import Budget, DeadDevice, Record, Results, Setup, failures, run, why

sys.path.insert(0, str(machine.ROOT))  # this tree's cellops, installed or not

STEPS = {"suite": 4.0, "sanitizer": 2.0, "ops": 4.0, "threads": 3.0, "zoo": 2.0, "experiments": 3.0}
"""The steps in their order, and what share of the time each gets beside those that follow it."""

FAILED, LEFT = 1, 3
REPEATED = "CELLOPS_GPU_END"
"""Names the environment variable that tells a process that replaced another when the call has to end."""


def main() -> int:
    """The command."""
    options = _options()
    if options.device == "cpu":
        # Before torch and any kernel are imported, for this process and for those that it starts.
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "there is no GPU here: torch sees no CUDA device. `--device cpu --small` walks through every step on tiny "
            "shapes instead",
            file=sys.stderr,
        )
        return 2
    end = float(os.environ.get(REPEATED, 0)) or time.time() + 60 * options.minutes
    if not options.small and not build.up_to_date():
        print("compiling csrc/", flush=True)
        try:
            build.build(end - time.time())
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 2
    options.output.mkdir(parents=True, exist_ok=True)
    head = describe(options.device, options.commit)
    path = options.output / f"{head['machine']['name']}{'-small' if options.small else ''}.json"
    try:
        results = Results(path, head)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.again and REPEATED not in os.environ:
        print(f"{results.forget(options.again)} rows are measured again")
    setup = Setup(options.device, options.small, options.output.resolve(), options.data, options.jobs)
    try:
        left = _run_steps(options.steps, setup, results, end)
    except DeadDevice as error:
        print(f"{error} took the GPU from this process: a new one goes on", flush=True)
        os.environ[REPEATED] = str(end)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return _finish(results, left, path, options.small)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, "all"], metavar="step", help=", ".join([*STEPS, "all"]))
    parser.add_argument("--minutes", type=float, default=10.0, help="that this call may take (10)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the results are, and go on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few rows")
    parser.add_argument("--again", metavar="TEXT", help="forget rows with this in their name first")
    parser.add_argument(
        "--data",
        type=Path,
        default=machine.ROOT.parent / "shared" / "data",
        metavar="DIR",
        help="holds pbc/ and cric/, for the experiments",
    )
    parser.add_argument("--jobs", type=int, default=max(1, machine.cores() // 2), help="test processes side by side")
    parser.add_argument("--commit", metavar="HASH", help="what this tree is of, where there is no git")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu is for --small: the CPU's own benchmarks are `pytest benchmarks --benchmark-only`")
    if not options.steps or "all" in options.steps:
        options.steps = list(STEPS)
    return options


def describe(device: str, commit: str | None) -> Record:
    """The head of the results: the machine with its GPU, versions, commit."""
    import torch

    head = machine.describe(machine.cores())
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        head["machine"] |= {
            "name": machine.as_file_name(properties.name),
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_memory": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(0)),
            "multiprocessors": properties.multi_processor_count,
            "cache": properties.L2_cache_size,
        }
        head["versions"] |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    if commit:
        head["commit"] = {"hash": commit, "dirty": False}
    return head


def _run_steps(names: list[str], setup: Setup, results: Results, end: float) -> list[str]:
    """Run the steps, each in its share of the time that is left; returns the rows that are not done."""
    left: list[str] = []
    chosen = [name for name in STEPS if name in names]
    for position, name in enumerate(chosen):
        step = _step(name, setup)
        share = STEPS[name] / sum(STEPS[other] for other in chosen[position:])
        budget = Budget(end - time.time()).part(share)
        print(f"== {name}: {len(step.rows)} rows, {budget.left:.0f} s", flush=True)
        run(step, results, budget, lambda line: print(line, flush=True))
        left += step.left
    return left


def _step(name: str, setup: Setup) -> Any:
    from on_gpu import ops, programs, suite

    makers = {
        "suite": suite.suite,
        "sanitizer": suite.sanitizer,
        "ops": ops.step,
        "threads": programs.threads,
        "zoo": programs.zoo,
        "experiments": programs.experiments,
    }
    return makers[name](setup)


def _finish(results: Results, left: list[str], path: Path, small: bool) -> int:
    """Judge the targets, say what failed and what is left."""
    from on_gpu.targets import judge_all

    targets = [] if small else judge_all(results.records)
    results.update(targets=targets, left=left)
    for row in targets:
        print(f"{row['op']} {row['target']}: {row['limit']}, measured {row['value'] or 'not yet'}")
    failed = failures(results.records)
    for record in failed:
        print(f"FAILED {record['key']}: {why(record)}")
    print(f"{len(results.records)} rows in {path}, {len(failed)} of them failed")
    if left:
        print(f"{len(left)} rows are left; the same command goes on with:")
        for key in left:
            print(f"  {key}")
    return FAILED if failed else LEFT if left else 0


if __name__ == "__main__":
    sys.exit(main())

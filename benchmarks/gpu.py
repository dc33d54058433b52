"""Everything that needs a GPU, in calls that fit into ten minutes each and go on where the last one stopped.

python benchmarks/gpu.py all --minutes 9 --output results/        # again and again, until nothing is left
python benchmarks/gpu.py suite sanitizer --output results/        # the tests, compute-sanitizer
python benchmarks/gpu.py ops --output results/                    # every op beside its peers
python benchmarks/gpu.py threads zoo experiments --output results/
python benchmarks/gpu.py ops --only "1x64x56x56 bfloat16 channels_last" --output results/
python benchmarks/gpu.py ops --again "frelu" --output results/    # measure rows anew
python benchmarks/gpu.py all --device cpu --small --output /tmp/x # walk through every path where there is no GPU

csrc/ is compiled in place first where the library is missing or old. The steps run in their order, each to its end.
Results are in one JSON, results/<gpu>.json, written after every row. Copied to benchmarks/results/, it is what
`python benchmarks/table.py` makes the tables of README and docs/speed.md from, `python benchmarks/bounds.py` that of
docs/gpu.md. The exit code is 0 when all that can run here is done and nothing failed, 1 after a failure, 3 when rows
are left for another call.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import machine
from on_gpu import build, process
from on_gpu.progress import Budget, DeadDevice, Record, Results, Setup, failures, run, why

sys.path.insert(0, str(machine.ROOT))  # this tree's cellops, installed or not

STEPS = ("suite", "sanitizer", "ops", "tuning", "kernels", "threads", "zoo", "experiments")
"""In their order."""

FAILED, LEFT = 1, 3
STARTED = time.time()  # before torch is imported, which takes its seconds
REPEATED = "CELLOPS_GPU_END"
"""Names the environment variable that tells a process that replaced another when the call has to end."""


def main() -> int:
    """The command."""
    options = _options()
    process.heed_interrupts()
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
    end = float(os.environ.get(REPEATED, 0)) or STARTED + 60 * options.minutes
    if not options.small and not _compile(Budget(end - time.time())):
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    head = describe(options.device, options.commit)
    if not options.small and not build.up_to_date():
        head["library"] = "older than csrc/"
    path = options.output / f"{head['machine']['name']}{'-small' if options.small else ''}.json"
    try:
        results = Results(path, head)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.again and REPEATED not in os.environ:
        print(f"{results.forget(options.again)} rows are measured again")
    name = head["machine"]["name"]
    setup = Setup(options.device, options.small, options.output.resolve(), options.data, options.jobs, name)
    try:
        left = _run_steps(options.steps, options.only, setup, results, end)
    except DeadDevice as error:
        print(f"{error} took the GPU from this process: a new one goes on", flush=True)
        os.environ[REPEATED] = str(end)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return _finish(results, left, path, options.small)


def _compile(budget: Budget) -> bool:
    """Whether there is a library: this tree's, or where it cannot be compiled an older one, of which the rows tell."""
    if build.up_to_date() or REPEATED in os.environ:
        return True
    print("compiling csrc/", flush=True)
    try:
        build.build(budget)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        if not build.loadable():
            return False
        print("warning: the library that is there, older than csrc/, is measured instead", file=sys.stderr)
    return True


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, "all"], metavar="step", help=", ".join([*STEPS, "all"]))
    parser.add_argument("--minutes", type=float, default=9.0, help="that this call may take (9)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the results are, and go on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few rows")
    parser.add_argument("--again", metavar="TEXT", help="forget rows with this in their name first")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their name")
    parser.add_argument(
        "--data",
        type=Path,
        default=_data(),
        metavar="DIR",
        help="holds pbc/ and cric/, for the experiments (shared/data beside or inside the repository)",
    )
    parser.add_argument("--jobs", type=int, default=max(1, machine.cores() - 2), help="test processes side by side")
    parser.add_argument("--commit", metavar="HASH", help="what this tree is of, where there is no git")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    if options.device == "cpu" and not options.small:
        parser.error("--device cpu is for --small: the CPU's own benchmarks are `pytest benchmarks --benchmark-only`")
    if not options.steps or "all" in options.steps:
        options.steps = list(STEPS)
    return options


def _data() -> Path:
    """Beside the repository, or inside it where there is none beside it."""
    beside, inside = (folder / "shared" / "data" for folder in (machine.ROOT.parent, machine.ROOT))
    return inside if inside.is_dir() and not beside.is_dir() else beside


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


def _run_steps(names: list[str], only: str, setup: Setup, results: Results, end: float) -> list[str]:
    """Run the steps one after another while there is time; returns the rows that are not done."""
    left: list[str] = []
    budget = Budget(end - time.time())
    for name in (name for name in STEPS if name in names):
        step = _step(name, setup)
        step.rows = [row for row in step.rows if only in row.key]
        print(f"== {name}: {len(step.rows)} rows, {max(budget.left, 0):.0f} s", flush=True)
        run(step, results, budget, lambda line: print(line, flush=True))
        left += step.left
    return left


def _step(name: str, setup: Setup) -> Any:
    from on_gpu import kernels, ops, programs, suite, tuning

    makers = {
        "suite": suite.suite,
        "sanitizer": suite.sanitizer,
        "ops": ops.step,
        "tuning": tuning.step,
        "kernels": kernels.step,
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
    for key, reason in results.data["skipped"].items():
        print(f"skipped, {key}: {reason}")
    if left:
        print(f"{len(left)} rows are left; the same command goes on with:")
        for key in left:
            had = results.data["stopped"].get(key)
            print(f"  {key}" + (f" (not finished in {had:.0f} s: given a tenth more, see --minutes)" if had else ""))
    return FAILED if failed else LEFT if left else 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmarks and experiments that are programs already: the CPU's at several thread counts, the zoo, two data sets."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from on_gpu import process
from on_gpu.progress import OutOfTime, Record, Row, Setup, Skipped, Step

THREADS = (2, 8, 16)
CPU_FILES = (
    "bench_deform_conv2d.py",
    "bench_offset_sample2d.py",
    "bench_frelu.py",
    "bench_squeeze_excite.py",
    "bench_eca.py",
    "bench_spatial_attention.py",
    "bench_group_conv1x1.py",
)
NETWORKS = ("deform_resnet50", "lung_resnet50", "shufflenet_v1_g3", "dresnet", "hqnet_tiny", "hqnet_dcn")
EXPERIMENTS = {
    "pbc, first fold": ("", "pbc", 1),
    "cric, first fold by parent image": ("cric", "cric", 1),
    "cric, first fold image by image": ("cric", "cric", 2),
    "pbc, second fold": ("", "pbc", 2),
    "cric, second fold": ("cric", "cric", 4),
    "pbc, all folds": ("", "pbc", 5),
    "cric, all folds": ("cric", "cric", 10),
}
"""Which twin of `cellops table cells`, on which data, and how many parts of each of its networks."""


def threads(setup: Setup) -> Step:
    """The benchmarks of the CPU at 2, 8 and 16 threads, file by file."""
    if setup.small:
        return Step("threads", [_benchmark("threads 1 overhead", CPU_FILES[0], 1, "overhead and 1", False, 5.0)])
    rows = [
        _benchmark(f"threads {count} {file}", file, count, "", False, 60.0) for count in THREADS for file in CPU_FILES
    ]
    return Step("threads", rows)


def zoo(setup: Setup) -> Step:
    """Networks beside their plain twins on the device, eager and compiled."""
    if setup.small:
        return Step("zoo", [_benchmark("zoo collected", "bench_models.py", 1, "", True, 5.0, "--collect-only")])
    rows = []
    for dtype, layout in (("bfloat16", "channels_last"), ("float32", "NCHW"), ("bfloat16", "NCHW")):
        for network in NETWORKS:
            name = f"{network}-{layout}-{dtype}-{setup.device}"
            rows.append(_benchmark(f"zoo {name}", "bench_models.py", 2, name, True, 45.0))
    return Step("zoo", rows)


def _benchmark(key: str, file: str, count: int, words: str, full: bool, seconds: float, *more: str) -> Row:
    return Row(key, seconds, partial(_bench, file, count, words, full, more))


def _bench(file: str, count: int, words: str, full: bool, more: tuple[str, ...], left: float) -> Record:
    """The records of a benchmark's file, from what pytest-benchmark writes."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "benchmark.json"
        command = process.python("-m", "pytest", "-q", "-p", "no:cacheprovider", f"benchmarks/{file}")
        command += ["--benchmark-only", "--threads", str(count), f"--benchmark-json={written}", *more]
        command += ["--full"] if full else []
        command += ["-k", words] if words else []
        code, text = process.run(command, left)
        found: list[dict[str, Any]] = []
        if written.is_file() and written.stat().st_size:
            found = [one["extra_info"] for one in json.loads(written.read_text())["benchmarks"]]
    last = text.strip().splitlines()[-1].strip("= ")
    records = [one for one in found if one]
    record: Record = {"kind": "benchmarks", "threads": count, "records": records}
    record["summary"] = f"{len(records)} records; {last}"
    if code or not (records or more):
        record["failed"] = text[-process.LAST :]
    return record


def experiments(setup: Setup) -> Step:
    """Every network of `cellops table cells` on real cells, one fold of all before the next; a call that is cut off is
    gone on with by the next one."""
    if setup.small:
        drawn = ["data.options={count: 60, size: 32}", "data.layout=auto", "data.input_size=32", "data.store_size=32"]
        drawn.append("data.folds=2")
        changes = ["--rows", "hqnet_tiny", "--epochs", "1", *(part for value in drawn for part in ("--set", value))]
        return Step("experiments", [Row("experiments drawn", 5.0, partial(_table, "", None, 1, changes, setup), True)])
    rows = [
        Row(f"experiments {name}", 60.0, partial(_table, twin, setup.data / data, parts, [], setup), True)
        for name, (twin, data, parts) in EXPERIMENTS.items()
    ]
    return Step("experiments", rows)


def _table(twin: str, data: Path | None, parts: int, more: list[str], setup: Setup, left: float) -> Record:
    """Its figures, written to experiments/ beside the results too; `OutOfTime` with its runs kept there."""
    from experiments import collect, keep

    if data is not None and not data.is_dir():
        raise Skipped(f"--data: there is no {data}")
    folder = setup.folder / "runs" / (data.name if data else "drawn")
    command = process.python("-m", "cellops.models", "table", "cells", "--output", str(folder), "--parts", str(parts))
    command += ["--data", str(data or "synthetic"), *(["--twin", twin] if twin else []), *more]
    if setup.device == "cuda":
        command += ["--set", "training.precision=bfloat16", "--set", f"training.workers={max(1, setup.jobs)}"]
    most = left - min(30.0, left / 4)  # for the last epoch and its report
    cache = {"CELLOPS_CACHE": str(setup.folder / "cache")}
    code, text = process.run([*command, "--hours", f"{most / 3600:.5f}"], left, **cache)
    try:
        table = collect(folder)
    except ValueError:  # no network has a fold that is done
        table = {"rows": []}
    record: Record = {"kind": "experiment", "summary": _shown(table)}
    if table["rows"]:
        record["file"] = keep(table, setup.machine, setup.folder / "experiments").name
    if code:
        reasons = [line for line in text.splitlines() if line.startswith("Not trained: ")]
        record["failed"] = "\n".join(reasons) or text[-process.LAST :]
    elif not table["rows"] or _unfinished(folder, parts):
        raise OutOfTime(str(folder))
    return record


def _unfinished(folder: Path, parts: int) -> list[str]:
    """The networks of a table that lack one of their first parts."""
    done: dict[str, int] = {}
    for row in json.loads((folder / "table.json").read_text())["rows"]:
        done[row["label"]] = done.get(row["label"], 0) + row["folds_done"]
    return [label for label, count in done.items() if count < parts]


def _shown(table: Record) -> str:
    rows = (f"{row['label']} {100 * row['mean']['accuracy_micro']:.1f}" for row in table["rows"])
    return ", ".join(rows)

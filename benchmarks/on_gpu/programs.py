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
    "pbc": ("pbc", "shufflenet_v1_g3", ["--set", "data.input_size=112", "--set", "data.store_size=140"]),
    "cric": ("cric", "shufflenet_v1_g3", ["--set", "data.input_size=112", "--set", "data.store_size=112"]),
    "pbc hqnet_tiny": ("pbc", "hqnet_tiny", ["--set", "data.input_size=112", "--set", "data.store_size=140"]),
    "pbc dresnet": ("pbc", "dresnet", ["--set", "data.input_size=112", "--set", "data.store_size=140"]),
    "pbc resnet18": ("pbc", "resnet18", ["--set", "data.input_size=112", "--set", "data.store_size=140"]),
}
"""Recipe, network and settings of each run on real cells, at 112 pixels; resnet18 is what a user has already."""


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
    """Training on real cells; a run that is cut off is gone on with by the next call."""
    if setup.small:
        drawn = ["--set", "data.options={count: 60, size: 32}", "--set", "data.input_size=32", "--epochs", "1"]
        return Step(
            "experiments", [Row("experiments demo", 5.0, partial(_train, "demo", "", None, drawn, setup), True)]
        )
    rows = [
        Row(f"experiments {name}", 60.0, partial(_train, recipe, network, setup.data / recipe, settings, setup), True)
        for name, (recipe, network, settings) in EXPERIMENTS.items()
    ]
    return Step("experiments", rows)


def _train(recipe: str, network: str, data: Path | None, settings: list[str], setup: Setup, left: float) -> Record:
    """One recipe: its results.json, or `OutOfTime` with its run kept beside the results."""
    if data is not None and not data.is_dir():
        raise Skipped(f"--data: there is no {data}")
    folder = setup.folder / "runs" / f"{recipe}_{network or 'default'}"
    command = process.python("-m", "cellops.models", "train", "--output", str(folder))
    if (folder / "recipe.yaml").is_file():
        command.append("--resume")
    else:
        command += ["--recipe", recipe, *settings]
        command += ["--data", str(data)] if data is not None else []
        command += ["--model", network] if network else []
    most = left - min(30.0, left / 4)  # for the report and the last epoch
    cache = {"CELLOPS_CACHE": str(setup.folder / "cache")}
    code, text = process.run([*command, "--hours", f"{most / 3600:.5f}"], left, **cache)
    written = folder / "results.json"
    if code:
        return {"kind": "experiment", "failed": text[-process.LAST :]}
    if not written.is_file() or "not complete; go on with" in text:
        raise OutOfTime(str(folder))
    results = json.loads(written.read_text())
    return {"kind": "experiment", "recipe": recipe, "network": network, "results": results, "summary": _shown(results)}


def _shown(results: dict[str, Any]) -> str:
    means = (found.get("mean", {}) for found in results.values() if isinstance(found, dict))
    return "; ".join(", ".join(f"{name} {value:.4f}" for name, value in mean.items()) for mean in means)[:300]

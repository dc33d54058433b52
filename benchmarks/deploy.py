"""What the small networks cost where they are used: file, latency and memory of one image on one core.

python benchmarks/deploy.py                      # measure, two to three minutes; writes results and docs/deploy.md
python benchmarks/deploy.py --run runs/pbc --run runs/demo    # only accuracy before and after, of trained runs
python benchmarks/deploy.py --check              # fail where docs/deploy.md is not what the results say
python benchmarks/deploy.py dresnet --print      # some of the networks, to the terminal

Results are kept in benchmarks/results/deploy/<machine>.json. Each figure is of a process of its own with one thread on
one core, with 1000 classes and an image of 224 x 224. PyTorch's is the network after `cellops.fuse`; the 8-bit files of
this table have ranges from random images, which change the answers and not the cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pages
from machine import ROOT, describe, load, slug

sys.path.insert(0, str(ROOT))  # run as a script, beside the package

RESULTS = Path(__file__).resolve().parent / "results" / "deploy"
PAGE = ROOT / "docs" / "deploy.md"
BEGIN, END = "<!-- costs: begin (written by benchmarks/deploy.py) -->", "<!-- costs: end -->"
NETWORKS = (
    "dresnet_025",
    "dresnet_050",
    "dresnet",
    "shufflenet_v1_g3",
    "shufflenet_v2_x1_0",
    "hqnet_tiny",
    "mobilenetv2_100",
    "mobilenetv1_100",
    "resnet50",
)
RUNTIMES = {"pytorch": "PyTorch, float32", "onnx": "ONNX, float32", "int8": "ONNX, 8 bits"}
PAPER = {
    "dresnet_025": "1.7",
    "dresnet_050": "7.4",
    "dresnet": "11.2 (10.7 in Table 4)",
    "shufflenet_v1_g3": "7.2",
    "mobilenetv2_100": "17.4",
    "mobilenetv1_100": "16.7",
    "resnet50": "98.5",
}
"""Sizes in MB of Tables 3 and 4 of Wang et al. 2019."""
SIZE = 224
CALIBRATION_IMAGES = 4
EXPORTERS = 2
QUIET = 1.0
"""Processes that wanted a core, on average, before it began."""

MEASURE = """
import json, os, statistics, sys, time
runtime, target = sys.argv[1:]
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
import numpy
if runtime == "pytorch":
    import torch
    import cellops
    from cellops.models import create_model, list_models
    list_models()
    torch.set_num_threads(1)
else:
    import onnxruntime


def kib(name):
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(name)).split()[1])


before = kib("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
pixels = numpy.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), numpy.float32)
if runtime == "pytorch":
    torch.manual_seed(0)
    network = create_model(target).eval()
    cellops.fuse(network)
    image = torch.from_numpy(pixels)
    call = torch.inference_mode()(lambda: network(image))
else:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    call = lambda: session.run(None, {"images": pixels})
for _ in range(3):
    call()
taken = []
while len(taken) < 5 or (len(taken) < 50 and sum(taken) < 1.5):
    start = time.perf_counter()
    call()
    taken.append(time.perf_counter() - start)
print(json.dumps({"latency": statistics.median(taken), "before": 1024 * before, "peak": 1024 * kib("VmHWM")}))
"""


def write_files(name: str, folder: str) -> tuple[str, dict[str, int]]:
    """Export a network with drawn weights in float32 and 8 bits; returns the bytes of its files."""
    import torch

    from cellops.models import create_model
    from cellops.models.cost import cost
    from cellops.models.export import export_onnx
    from cellops.models.quantize import quantize_onnx

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model(name)
    plain, small = Path(folder) / f"{name}.onnx", Path(folder) / f"{name}_int8.onnx"
    export_onnx(model, plain, (3, SIZE, SIZE), check=False)
    quantize_onnx(plain, small, torch.randn(CALIBRATION_IMAGES, 3, SIZE, SIZE), batch=1)
    weights = round(2**20 * cost(model, (3, SIZE, SIZE), measure=False).megabytes)
    return name, {"pytorch": weights, "onnx": plain.stat().st_size, "int8": small.stat().st_size}


def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    """The costs of networks, one record for each runtime."""
    records = []
    with tempfile.TemporaryDirectory() as folder:
        with multiprocessing.get_context("spawn").Pool(min(EXPORTERS, len(names))) as pool:
            jobs = pool.starmap_async(write_files, [(name, folder) for name in names])
            sizes = dict(jobs.get())
        for name in names:
            targets = {"pytorch": name, "onnx": f"{folder}/{name}.onnx", "int8": f"{folder}/{name}_int8.onnx"}
            for runtime, target in targets.items():
                script = MEASURE.replace("SIDE", str(SIZE))
                done = subprocess.run(
                    [sys.executable, "-c", script, runtime, target], cwd=ROOT, capture_output=True, text=True
                )
                if done.returncode:
                    raise SystemExit(f"{name}, {RUNTIMES[runtime]}: {done.stderr.strip()}")
                found = json.loads(done.stdout.splitlines()[-1])
                records.append({"network": name, "runtime": runtime, "bytes": sizes[name][runtime], **found})
                print(f"{name:<20}{RUNTIMES[runtime]:<18}{1e3 * found['latency']:8.1f} ms", file=sys.stderr)
    return records


def judge(run: Path) -> dict[str, Any]:
    """Accuracy of a trained run in float32 and in 8 bits, on its held-out images."""
    import torch

    from cellops.models.export import export_onnx
    from cellops.models.quantize import compare, quantize_onnx
    from cellops.models.training.apply import load_trained, run_images
    from cellops.models.training.console import Output

    trained = load_trained(run, torch.device("cpu"))
    images = run_images(run, Output())
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        export_onnx(trained.models[0], plain, (3, *trained.recipe.data.input_size))
        quantize_onnx(plain, small, images.training(128))
        before, after = compare([plain, small], images.judged())
    training = json.loads((run / "metrics.json").read_text())["training"]
    return {
        "network": trained.recipe.model.name,
        "recipe": trained.recipe.name,
        "epochs": training["epochs"],
        "synthetic": trained.synthetic,
        "side": trained.recipe.data.input_size[0],
        "images": after.images,
        "float32": before.accuracy,
        "int8": after.accuracy,
        "agreement": after.agreement,
        "float32_bytes": before.size,
        "int8_bytes": after.size,
    }


def tables(results: dict[str, Any]) -> str:
    """The results of one machine as Markdown."""
    parts = [_head(results), _costs(results["costs"]), _paper(results["costs"]), _accuracy(results.get("accuracy", []))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: dict[str, Any]) -> str:
    computer, versions, commit = results["machine"], results["versions"], results["commit"]
    listed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime"))
    text = (
        f"**{computer['cpu']}, one core of {computer['cores']}, {computer['instruction_set']}** "
        f"({listed}; commit {commit['hash'][:10]}, {results['date'][:10]}, load {results['load']:.1f})"
    )
    if results["load"] > QUIET:
        text += "\n\n**Other programs were running: the latencies are not to be trusted.**"
    return text


def _costs(records: list[dict[str, Any]]) -> str:
    cells = [
        ["network", "runtime", "file MiB", "latency ms", "peak memory of the process MiB", "above its libraries MiB"]
    ]
    for record in records:
        above = record["peak"] - record["before"]
        cells.append([f"`{record['network']}`", RUNTIMES[record["runtime"]], _mebi(record["bytes"]),
                      f"{1e3 * record['latency']:.1f}", f"{record['peak'] / 2**20:.0f}", _mebi(above)])  # fmt: skip
    return pages.table(cells)


def _paper(records: list[dict[str, Any]]) -> str:
    by_network: dict[str, dict[str, Any]] = {}
    for record in records:
        by_network.setdefault(record["network"], {})[record["runtime"]] = record
    shown = {name: found for name, found in by_network.items() if name in PAPER}
    if not shown:
        return ""
    cells = [["network", "printed MB", "float32 MiB", "8 bits MiB", "run-time memory MiB: PyTorch", "ONNX", "8 bits"]]
    for name, found in shown.items():
        sizes = [_mebi(found[runtime]["bytes"]) for runtime in ("onnx", "int8")]
        cells.append([f"`{name}`", PAPER[name], *sizes, *(f"{found[key]['peak'] / 2**20:.0f}" for key in RUNTIMES)])
    text = "Beside Tables 3 and 4 of Wang et al. 2019, who print a run-time memory of 533 MB for DResNet"
    if {"dresnet", "resnet50"} <= shown.keys():
        less = [1 - shown["dresnet"][key]["peak"] / shown["resnet50"][key]["peak"] for key in RUNTIMES]
        above = [_above(shown["dresnet"][key]) / _above(shown["resnet50"][key]) for key in RUNTIMES]
        text += (
            ', "85 % less" than ResNet. Here it is '
            + ", ".join(f"{part:.0%} ({RUNTIMES[key]})" for key, part in zip(RUNTIMES, less, strict=True))
            + " less than ResNet-50's; without the libraries "
            + ", ".join(f"{1 - part:.0%}" for part in above)
        )
    return f"{text}.\n\n{pages.table(cells)}"


def _accuracy(records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    cells = [
        ["network", "trained by", "held-out images", "float32", "8 bits", "same answer", "float32 MiB", "8 bits MiB"]
    ]
    for record in records:
        recipe = f"recipe `{record['recipe']}`, {record['epochs']} epochs"
        images = f"{record['images']} of {record['side']} x {record['side']}" + (", drawn" * record["synthetic"])
        shares = [f"{100 * record[key]:.1f} %" for key in ("float32", "int8", "agreement")]
        sizes = [_mebi(record["float32_bytes"]), _mebi(record["int8_bytes"])]
        cells.append([f"`{record['network']}`", recipe, images, *shares, *sizes])
    return f"Accuracy before and after, with ranges from 128 training images:\n\n{pages.table(cells)}"


def _above(record: dict[str, Any]) -> int:
    return record["peak"] - record["before"]


def _mebi(count: float) -> str:
    return f"{count / 2**20:.1f}"


def recorded() -> str:
    """The tables of every machine."""
    return "\n".join(tables(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json")))


def main() -> int:
    """Returns 1 where --check finds an old page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NAME", help="with --print only; all if not given")
    parser.add_argument("--run", type=Path, action="append", default=[], help="a trained run; may be repeated")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="measure nothing, change nothing")
    mode.add_argument("--print", action="store_true", help="keep nothing")
    options = parser.parse_args()
    if options.networks and not options.print:
        parser.error("a table of some networks is not kept: --print")
    page = PAGE.read_text()
    if options.check:
        same = page == pages.updated(page, recorded(), BEGIN, END)
        print("docs/deploy.md agrees with the results" if same else "docs/deploy.md is old: run benchmarks/deploy.py")
        return int(not same)
    path = RESULTS / f"{slug()}.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if options.run:
        if not results and not options.print:
            parser.error(f"{path} has no costs yet: run benchmarks/deploy.py without --run first")
        results["accuracy"] = [judge(run) for run in options.run]
        if options.print:
            print(_accuracy(results["accuracy"]))
            return 0
    else:
        before = load()
        costs = measure(options.networks or NETWORKS)
        results = {**describe(1), "load": before, "costs": costs, "accuracy": results.get("accuracy", [])}
        if options.print:
            print(tables({**results, "accuracy": []}))
            return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(pages.updated(page, recorded(), BEGIN, END))
    return 0


if __name__ == "__main__":
    sys.exit(main())

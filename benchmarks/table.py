"""Writes the speed tables from benchmarks/results/*.json: targets to README.md, everything to docs/speed.md.

python benchmarks/table.py             # update both, between their markers
python benchmarks/table.py --check     # fail where one is not what the results say
python benchmarks/table.py --print     # to the terminal
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pages
from on_gpu.targets import ours, trusted
from targets import Record, Results, geometric_mean, median_ratio, select

RESULTS = Path(__file__).resolve().parent / "results"
README, PAGE = RESULTS.parent.parent / "README.md", RESULTS.parent.parent / "docs" / "speed.md"
BEGIN, END = "<!-- speed: begin (written by benchmarks/table.py) -->", "<!-- speed: end -->"
PEERS = ("torchvision", "ONNX Runtime", "OpenVINO")
DTYPES, LAYOUTS, DIRECTIONS = ("float32", "bfloat16"), ("NCHW", "channels_last"), ("forward", "forward+backward")


def machines(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The results of every machine in the folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def accelerated_machines(folder: Path = RESULTS / "accelerate") -> str:
    """All networks of `bench_accelerate.py --full`, for each machine that ran them."""
    found = machines(folder)
    if not found:
        return ""
    parts = ["", "## Networks of other libraries, all of them"]
    for one in found:
        parts += [_head(one), _accelerated(one["records"])]
    return "\n\n".join(parts) + "\n"


def summary(results: list[dict[str, Any]]) -> str:
    """What each target is and what each machine reached: the CPUs side by side, each GPU by itself."""
    cpus, gpus = ([one for one in results if ("gpu" in one["machine"]) == gpu] for gpu in (False, True))
    parts = [_head(one) for one in cpus]
    if cpus:
        parts += [_by_peer(cpus), _targets(cpus, [_short_name(one) for one in cpus])]
    for one in gpus:
        parts += [_head_of_gpu(one), _targets([one], ["measured"])]
    return "\n\n".join(parts) + "\n"


def details(results: list[dict[str, Any]]) -> str:
    """Every figure of every machine."""
    return "\n".join(_gpu(one) if "gpu" in one["machine"] else _cpu(one) for one in results)


def _cpu(results: dict[str, Any]) -> str:
    records: Results = results["records"]
    parts = [f"## {_short_name(results)}", _head(results)]
    for op in dict.fromkeys(record["op"] for record in records):
        own = [record for record in records if record["op"] == op]
        if select(own, kind="time"):
            parts += [_over_peers(op, own), _shapes(op, own)]
        parts += [_speed(op, own), _overhead(own), _memory(own)]
    parts += [_copies(records), _layers(records), _compiled(records), _models(records), _accelerated(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _gpu(results: dict[str, Any]) -> str:
    """What `benchmarks/gpu.py` measured: ops in bfloat16 and channels_last, networks, runs on real cells."""
    records = results["records"]
    shown = {"dtype": "bfloat16", "layout": "channels_last", "sweep": False}
    rows = [row for row in select(records, kind="gpu", **shown) if trusted(row)]
    backends = sorted({name.removeprefix("cellops ") for row in rows for name in row["percent_of_copy"]}, reverse=True)
    peers = [name for name in dict.fromkeys(name for row in rows for name in row["variants"]) if name != "copy"]
    peers = [name for name in peers if not name.startswith("cellops ")]
    cells = [["op", "input", "direction", "default", *(f"{name}, ms" for name in backends)]]
    cells[0] += [*(f"over {name}" for name in peers), "of the copy", "of the dense conv"]
    for row in rows:
        medians = {name: timing["median"] for name, timing in row["variants"].items()}
        cells.append([f"`{row['op']}`", "x".join(map(str, row["shape"])), row["direction"], row["default"]])
        for name in backends:
            taken = medians.get(f"cellops {name}")
            cells[-1].append("–" if taken is None else f"{1e3 * taken:.3f}")
        cells[-1] += [f"{medians[peer] / medians[ours(row)]:.2f}x" if peer in medians else "–" for peer in peers]
        cells[-1].append(f"{row['percent_of_copy'][ours(row)]:.0f} %")
        cells[-1].append(f"{row['percent_of_dense'][ours(row)]:.0f} %" if row["percent_of_dense"] else "–")
    zoo = [one for row in select(records, kind="benchmarks") if row["key"].startswith("zoo") for one in row["records"]]
    text = (
        "bfloat16, channels_last; forward is evaluation, forward+backward training with batch statistics. Medians in a "
        "CUDA graph, speed over each peer (below 1 is slower).\n\n" + pages.table(cells)
    )
    head = [f"## {results['machine']['gpu']}", _head_of_gpu(results)]
    return "\n\n".join(part for part in (*head, text, _models(zoo, full=True)) if part) + "\n"


def _short_name(results: dict[str, Any]) -> str:
    computer = results["machine"]
    return f"{computer['cpu']}, {computer['instruction_set']}"


def _head_of_gpu(results: dict[str, Any]) -> str:
    computer, versions, commit = results["machine"], results["versions"], results["commit"]
    listed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "cuda"))
    return f"**{computer['gpu']}** ({listed}; commit {commit['hash'][:10]}, {results['date'][:10]})"


def _head(results: dict[str, Any]) -> str:
    computer, versions, commit = results["machine"], results["versions"], results["commit"]
    listed = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "onnxruntime", "openvino"))
    state = " with uncommitted changes" if commit["dirty"] else ""
    threads = f"{results['threads']} threads"
    return (
        f"**{computer['cpu']}, {computer['cores']} cores, {computer['instruction_set']}, {threads}** "
        f"({listed}; commit {commit['hash'][:10]}{state}, {results['date'][:10]})"
    )


def _by_peer(results: list[dict[str, Any]]) -> str:
    """How many times faster than each peer an op is in float32; a column for each machine, with both layouts."""
    rows: dict[tuple[str, ...], list[list[str]]] = {}
    for i, one in enumerate(results):
        for j, layout in enumerate(LAYOUTS):
            for key, ratios in _ratios(one["records"], layout).items():
                figures = rows.setdefault(key, [["–"] * len(LAYOUTS) for _ in results])
                mean = geometric_mean(ratios)
                if mean is not None:
                    figures[i][j] = f"{mean:.2f}x"
    head = ["op", "direction", "over", *map(_short_name, results)]
    text = "Speed in float32 over each peer, in NCHW and in channels_last, geometric means over the shapes; below 1 is "
    text += "slower. Forward is inference; forward+backward is training, with batch statistics where there are any."
    cells = [[*key, *map(", ".join, figures)] for key, figures in rows.items()]
    return text + "\n\n" + pages.table([head, *cells])


def _ratios(records: Results, layout: str) -> dict[tuple[str, ...], list[float]]:
    """By op, direction and peer: the peer's time over ours, a figure for each shape that the peer ran."""
    found: dict[tuple[str, ...], list[float]] = {}
    for kind in ("time", "speed", "copies"):
        for record in select(records, kind=kind, dtype="float32", layout=layout):
            medians = {name: timing["median"] for name, timing in record["variants"].items()}
            for name in medians:
                if name not in ("cellops", "copy") and not name.startswith(("dense", "cellops")):
                    key = (f"`{record['op']}`", record["direction"], name)
                    found.setdefault(key, []).append(medians[name] / medians["cellops"])
    return found


def _targets(results: list[dict[str, Any]], columns: list[str]) -> str:
    """A row for each target, a column for each machine."""
    rows: dict[tuple[str, str], list[str]] = {}
    for i, one in enumerate(results):
        for row in one["targets"]:
            key = f"{row['op']} {row['target']}", row["limit"]
            rows.setdefault(key, ["–"] * len(results))[i] = _judged(row)
    head = ["target (geometric mean over the shapes)", "limit", *columns]
    return pages.table([head, *([*key, *figures] for key, figures in rows.items())])


def _judged(row: Record) -> str:
    if row["reached"] is None:
        return "not measured"
    return row["value"] if row["reached"] else f"**{row['value']}, not reached**"


def _over_peers(op: str, records: Results) -> str:
    """One line per backend, dtype, layout and direction: how many times faster than each peer."""
    cells = [["op", "backend", "dtype", "layout", "direction", *PEERS, "dense conv", "of the bound"]]
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for direction in DIRECTIONS:
                labels = {"dtype": dtype, "layout": layout, "direction": direction}
                chosen = select(records, kind="time", **labels)
                ratios = [median_ratio(chosen, peer, "cellops", **labels) for peer in (*PEERS, f"dense {layout}")]
                bound = geometric_mean([record["percent_of_bound"] for record in chosen])
                figures = ["–" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
                percent = "–" if bound is None else f"{bound:.0f} %"
                cells.append([f"`{op}`", "cpu", dtype, layout, direction, *figures, percent])
    return (
        "Speed over the peers (times faster than each; below 1 is slower). The dense convolution has the same size and "
        "layout and samples nothing; the bound is its faster layout.\n\n" + pages.table(cells)
    )


def _shapes(op: str, records: Results) -> str:
    """Median milliseconds of each shape in float32."""
    columns = [(name, layout) for name in ("cellops", "dense conv") for layout in LAYOUTS]
    head = [f"{name}, {layout}" for name, layout in columns]
    cells = [["shape (N x C x H x W)", "direction", *head, *PEERS]]
    for direction in DIRECTIONS:
        labels = {"dtype": "float32", "direction": direction}
        by_layout = {
            layout: {
                record["case"]: record["variants"] for record in select(records, kind="time", layout=layout, **labels)
            }
            for layout in LAYOUTS
        }
        for case, variants in by_layout["NCHW"].items():
            row = [case, direction]
            for name, layout in columns:
                key = name if name == "cellops" else f"dense {layout}"
                row.append(_milliseconds(by_layout[layout].get(case, {}).get(key)))
            cells.append([*row, *(_milliseconds(variants.get(peer)) for peer in PEERS)])
    return (
        f"`{op}`, float32, 3x3, padding 1, as many output as input channels, mask and bias: median milliseconds "
        "(peers with NCHW input).\n\n" + pages.table(cells)
    )


def _speed(op: str, records: Results) -> str:
    """Milliseconds of each shape, and how many times faster than each peer."""
    chosen = select(records, kind="speed")
    if not chosen:
        return ""
    peers = [name for name in chosen[0]["variants"] if name not in ("cellops", "copy")]
    cells = [["shape", "dtype", "layout", "direction", "cellops, ms", *(f"over {peer}" for peer in peers), "copies"]]
    for record in chosen:
        medians = {name: timing["median"] for name, timing in record["variants"].items()}
        ours = medians["cellops"]
        row = [record["case"].split("_")[-1], record["dtype"], record["layout"], record["direction"]]
        cells.append([*row, f"{1e3 * ours:.3f}", *(f"{medians[peer] / ours:.2f}x" for peer in peers)])
        cells[-1].append(f"{ours / medians['copy']:.1f}")
    return (
        f"`{op}`: speed over each peer (below 1 is slower), and its time in copies of the input. The peer's grid is "
        "ready-made.\n\n" + pages.table(cells)
    )


def _overhead(records: Results) -> str:
    """What a call costs that has next to nothing to compute."""
    chosen = select(records, kind="overhead")
    if not chosen:
        return ""
    cells = [["a call on 512 elements, µs", *(f"{record['case']} kernel" for record in chosen)]]
    for name in chosen[0]["variants"]:
        figures = [record["variants"].get(name) for record in chosen]
        cells.append([name, *("–" if figure is None else f"{1e6 * figure['median']:.1f}" for figure in figures)])
    return pages.table(cells)


def _memory(records: Results) -> str:
    """Peak memory above inputs and outputs."""
    chosen = select(records, kind="memory")
    if not chosen:
        return ""
    cells = [[f"extra memory at {chosen[0]['case']}, and of the im2col buffer", *(r["direction"] for r in chosen)]]
    for name in chosen[0]["variants"]:
        figures = [record["variants"].get(name) for record in chosen]
        cells.append([name, *map(_extra, figures)])
    return pages.table(cells)


def _copies(records: Results) -> str:
    """Ops that only move memory, in copies of their input."""
    chosen = select(records, kind="copies")
    if not chosen:
        return ""
    names = list(dict.fromkeys(name for record in chosen for name in record["copies"] if name != "copy"))
    cells = [["in copies of the input", "dtype", "layout", "direction", *names]]
    for record in chosen:
        figures = [f"{record['copies'][name]:.2f}" if name in record["copies"] else "–" for name in names]
        several = len({other["case"] for other in chosen if other["op"] == record["op"]}) > 1
        what = f"`{record['op']}`" + (f", {record['case'].rpartition('_')[0]}" if several else "")
        cells.append([what, record["dtype"], record["layout"], record["direction"], *figures])
    shape = ", ".join(dict.fromkeys(record["case"].split("_")[-1] for record in chosen))
    return (
        f"Time in copies (`x.clone()` of the input in the same turns) at {shape}; forward is evaluation.\n\n"
        + pages.table(cells)
    )


def _layers(records: Results) -> str:
    """Layers of networks beside PyTorch's modules: the module, and the op that it may leave out."""
    chosen = select(records, kind="layer")
    if not chosen:
        return ""
    cells = [["layer", "dtype", "layout", "direction", "cellops, ms", "over composition", "the op alone, over it"]]
    for record in chosen:
        medians = {name: timing["median"] for name, timing in record["variants"].items()}
        cells.append([record["case"], record["dtype"], record["layout"], record["direction"]])
        cells[-1].append(f"{1e3 * medians['cellops']:.3f}")
        cells[-1] += [f"{medians['composition'] / medians[name]:.2f}x" for name in ("cellops", "the op alone")]
    return (
        f"`{chosen[0]['op']}` as a layer of networks: speed over PyTorch's modules. The module calls them itself where "
        "it knows them to be faster; the last column is the op nevertheless. Forward is evaluation.\n\n"
        + pages.table(cells)
    )


def _compiled(records: Results) -> str:
    """Modules inside a compiled block beside what Inductor makes of the composition."""
    chosen = select(records, kind="compile")
    if not chosen:
        return ""
    cells = [["inside `torch.compile`", "layout", "direction", "cellops, ms", "composition, ms", "speed"]]
    for record in chosen:
        ours, theirs = (record["variants"][name]["median"] for name in ("cellops", "composition"))
        cells.append([f"`{record['op']}`", record["layout"], record["direction"]])
        cells[-1] += [f"{1e3 * ours:.3f}", f"{1e3 * theirs:.3f}", f"{theirs / ours:.2f}x"]
    return (
        "A compiled block (normalisation, the module, a sum and a ReLU) beside the same block of PyTorch's ops, "
        f"compiled too, at {chosen[0]['case']} in float32.\n\n" + pages.table(cells)
    )


def _models(records: Results, *, full: bool = False) -> str:
    """Images per second and peak memory of whole networks; those of the default run, or of the full one too."""
    chosen = [record for record in records if record["kind"] == "model"] if full else select(records, kind="model")
    if not chosen:
        return ""
    names = list(dict.fromkeys(name for record in chosen for name in record["variants"]))
    cells = [["network", "input", "dtype", "device", "", *(f"{name}, images/s" for name in names)]]
    cells[0] += [f"{name}, peak MiB" for name in names]
    for record in chosen:
        speeds, peaks = record["images_per_second"], record["peak_bytes"]
        cells.append([f"`{record['op']}`", *(record[key] for key in ("case", "dtype", "device", "direction"))])
        cells[-1] += [f"{speeds[name]:.1f}" if name in speeds else "–" for name in names]
        cells[-1] += [f"{peaks[name] / 2**20:.0f}" if name in peaks else "–" for name in names]
    return (
        "Whole networks beside their plain twins (the same weights on PyTorch's own ops); memory is above the weights."
        "\n\n" + pages.table(cells)
    )


def _accelerated(records: Results) -> str:
    """Networks of other libraries before and after `cellops.accelerate`."""
    chosen = select(records, kind="accelerate")
    if not chosen:
        return ""
    shown = {"before": "as it was, ms", "cellops": "accelerated, ms", "before, folded": "folded, ms"}
    shown["cellops, folded"] = "accelerated and folded, ms"
    cells = [["network", "layout", "", *shown.values(), "gain of accelerate"]]
    for record in chosen:
        timings = record["variants"]
        gain = timings["before"]["median"] / timings["cellops"]["median"]
        figures = [_milliseconds(timings.get(name)) for name in shown]
        cells.append([record["case"], record["layout"], record["direction"], *figures, f"{gain:.2f}x"])
    batch, _, height, width = chosen[0]["images"]
    return (
        "Networks of other libraries before and after `cellops.accelerate` and `cellops.fuse`: "
        f"{batch} images of {height}x{width} in float32.\n\n" + pages.table(cells)
    )


def _extra(used: Record | None) -> str:
    return "–" if used is None else f"{used['bytes'] / 2**20:.1f} MiB, {used['percent_of_im2col']:.1f} %"


def _milliseconds(timing: Record | None) -> str:
    return "–" if timing is None else f"{1e3 * timing['median']:.2f}"


def main() -> int:
    """Returns 1 where --check finds an old page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing")
    mode.add_argument("--print", action="store_true", help="print the tables")
    options = parser.parse_args()
    results, old_pages = machines(), 0
    for page, text in ((README, summary(results)), (PAGE, details(results) + accelerated_machines())):
        if options.print:
            print(text)
            continue
        old = page.read_text()
        new = pages.updated(old, text, BEGIN, END)
        if options.check:
            print(f"{page.name} agrees with the results" if old == new else f"{page.name} is old: run table.py")
            old_pages += old != new
        else:
            page.write_text(new)
    return int(old_pages > 0)


if __name__ == "__main__":
    sys.exit(main())

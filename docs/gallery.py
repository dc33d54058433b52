"""Draws the pictures of docs/gallery.md, from the results files and from a network that it trains in half a minute.

python docs/gallery.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
OURS, LOSS = "#c2410c", "#94a3b8"
COLOURS = {
    "cellops": OURS,
    "torchvision": "#475569",
    "ONNX Runtime": "#94a3b8",
    "OpenVINO": "#0e7490",
    "dense NCHW": "#a16207",
    "dense": "#a16207",
    "PyTorch": "#475569",
    "PyTorch, compiled": "#94a3b8",
}
LAYOUTS = ("NCHW", "channels_last")

Results = list[dict[str, Any]]


def draw_all(folder: Path) -> list[Path]:
    """Draw every picture as SVG; returns the files."""
    import gallery_offsets

    folder.mkdir(parents=True, exist_ok=True)
    swept = min(RESULTS.glob("sweep/*.json"))  # a machine that has both
    run, sweeping = (json.loads(path.read_text()) for path in (RESULTS / swept.name, swept))
    pictures: dict[str, Callable[[], Figure]] = {
        "deform_conv2d": lambda: deform_conv2d(run),
        "copies": lambda: copies(run),
        "memory": lambda: memory(run),
        "accelerate": lambda: accelerate(run),
        "channels": lambda: sweep(sweeping, "channels", "channels, at 28x28 pixels"),
        "map_size": lambda: sweep(sweeping, "size", "rows and columns of the map, with 64 channels"),
        "offsets": gallery_offsets.draw,
    }
    files = []
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "cellops"}
    with plt.rc_context(style):
        for name, draw in pictures.items():
            files.append(folder / f"{name}.svg")
            figure = draw()
            figure.savefig(files[-1], metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
    return files


def select(records: Results, **labels: Any) -> Results:
    """The records with these labels."""
    return [record for record in records if all(record.get(key) == value for key, value in labels.items())]


def deform_conv2d(run: dict[str, Any]) -> Figure:
    """Milliseconds of each shape beside the peers, in float32."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for axis, direction in zip(axes, ("forward", "forward+backward"), strict=True):
        records = select(run["records"], kind="time", dtype="float32", layout="NCHW", direction=direction)
        names = [
            name for name in dict.fromkeys(name for one in records for name in one["variants"]) if name[-4:] != "last"
        ]
        bars = {name: [_milliseconds(record, name) for record in records] for name in names}
        _grouped(axis, [record["case"] for record in records], bars)
        axis.set(yscale="log", ylabel="ms", title=direction)
    return _captioned(figure, run, "float32, NCHW, 3x3; lower is faster")


def copies(run: dict[str, Any]) -> Figure:
    """Times in copies of the input of the ops that only move memory."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    for row, direction in zip(axes, ("forward", "forward+backward"), strict=True):
        for axis, layout in zip(row, LAYOUTS, strict=True):
            records = select(run["records"], kind="copies", dtype="float32", layout=layout, direction=direction)
            bars: dict[str, list[float | None]] = {"cellops": [], "PyTorch": [], "PyTorch, compiled": []}
            for record in records:
                peer = next(name for name in record["copies"] if name not in ("cellops", "copy"))
                for label, name in zip(bars, ("cellops", peer, f"compiled {peer}"), strict=True):
                    bars[label].append(record["copies"].get(name))
            labels = [record["case"].rpartition("_")[0].replace("_", "\n") for record in records]
            _grouped(axis, labels, bars)
            axis.set(ylabel="copies of the input", title=f"{direction}, {layout}")
    return _captioned(figure, run, "float32, 16x128x56x56; a copy is the least that such an op could take")


def memory(run: dict[str, Any]) -> Figure:
    """Memory above inputs and outputs beside the buffer of columns that is not made."""
    records = select(run["records"], kind="memory")
    figure, axis = plt.subplots(figsize=(6, 2.8))
    names = list(records[0]["variants"])
    bars: dict[str, list[float | None]] = {
        name: [record["variants"][name]["bytes"] / 2**20 for record in records] for name in names
    }
    _grouped(axis, [record["direction"] for record in records], bars)
    columns = records[0]["im2col_bytes"] / 2**20
    axis.axhline(columns, color="black", linewidth=0.8, linestyle="--")
    axis.annotate("the buffer of im2col", (0.5, columns), va="bottom", ha="center")
    axis.set(ylabel="MiB", title=f"deform_conv2d {records[0]['case']}")
    return _captioned(figure, run, "peak memory above inputs and outputs")


def accelerate(run: dict[str, Any]) -> Figure:
    """How much less time networks of other libraries take after `cellops.accelerate`, losses in grey."""
    records = select(run["records"], kind="accelerate", layout="NCHW")
    if not records:
        return _absent("pytest benchmarks --benchmark-only")
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.8 + 0.16 * len(records)), sharey=True)
    for axis, direction in zip(axes, ("inference", "training step"), strict=True):
        chosen = select(records, direction=direction)
        gains = [one["variants"]["before"]["median"] / one["variants"]["cellops"]["median"] for one in chosen]
        axis.barh([record["case"] for record in chosen], gains, color=[OURS if gain >= 1 else LOSS for gain in gains])
        for place, gain in enumerate(gains):
            axis.annotate(f"{gain:.2f}x", (gain, place), va="center", xytext=(3, 0), textcoords="offset points")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=direction, xlabel="times as fast as before", xlim=(0, 1.2 * max(gains)))
    return _captioned(figure, run, "float32, NCHW, 8 images of 112x112")


def sweep(run: dict[str, Any], axis_name: str, label: str) -> Figure:
    """Times over those of PyTorch's own ops, against one size of the input."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True)
    records = select(run["records"], axis=axis_name)
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for axis, direction in zip(axes, ("forward", "forward+backward"), strict=True):
        for number, op in enumerate(dict.fromkeys(record["op"] for record in records)):
            chosen = select(records, op=op, direction=direction)
            speed = [record["seconds"]["plain"] / record["seconds"]["cellops"] for record in chosen]
            axis.plot([record[axis_name] for record in chosen], speed, "o-", ms=3, color=colours[number], label=op)
        sizes = sorted({record[axis_name] for record in records})
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel=label, title=direction)
        axis.set_xticks(sizes, map(str, sizes))
        axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5x", "1x", "2x", "5x", "10x", "20x", "50x"])
        axis.minorticks_off()
    axes[0].set_ylabel("times as fast as PyTorch's ops")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _captioned(figure, run, f"float32, NCHW, batch {run['batch']}; above the line is faster")


def _grouped(axis: Any, labels: list[str], bars: dict[str, list[float | None]]) -> None:
    """Bars of each name side by side over each label; ours come first and in their own colour."""
    width = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars.items()):
        places = [place + (number + 0.5) * width - 0.4 for place in range(len(labels))]
        heights = [float("nan") if value is None else value for value in values]
        axis.bar(places, heights, 0.92 * width, color=COLOURS[name], label=name)
    axis.set_xticks(range(len(labels)), labels, fontsize=6)
    axis.legend(fontsize=7, frameon=False)


def _milliseconds(record: dict[str, Any], name: str) -> float | None:
    timing = record["variants"].get(name)
    return None if timing is None else 1e3 * timing["median"]


def _captioned(figure: Figure, run: dict[str, Any], text: str) -> Figure:
    """What was measured, where, with which versions and when, below the picture."""
    computer, commit = run["machine"], run["commit"]["hash"][:10]
    where = f"{computer['cpu']}, {computer['cores']} cores, threads: {run['threads']}, torch {run['versions']['torch']}"
    busy = run["load_at_start"] > 0.5 * computer["cores"]
    lines: Iterable[str] = (
        text,
        f"{where}, commit {commit}, {run['date'][:10]}",
        *(["The machine was busy: ratios are rough."] if busy else []),
    )
    figure.tight_layout()
    figure.text(0.01, -0.01, "\n".join(lines), fontsize=7, color="#475569", va="top")
    return figure


def _absent(command: str) -> Figure:
    figure = plt.figure(figsize=(6, 0.8))
    figure.text(0.5, 0.5, f"Not measured yet: {command}", ha="center", va="center")
    return figure


if __name__ == "__main__":
    for file in draw_all(Path(sys.argv[1])):
        print(file)

"""A run's records as tables for the terminal. Times are medians; a ratio below 1 is a loss and is printed alike."""

from __future__ import annotations

from itertools import groupby

from targets import Record, Results, judge_all, median_ratio

LABELS = ("op", "direction", "dtype")


def lines(results: Results) -> list[str]:
    """The whole report, line by line."""
    timed = [record for record in results if record["kind"] == "time"]
    text: list[str] = []
    for labels, group in groupby(sorted(timed, key=_labels), key=_labels):
        text += ["", f"{' '.join(labels)}: milliseconds (times ours)", *_time_table(list(group))]
    text += (
        _speed(results)
        + _models(results)
        + _accelerated(results)
        + _training(results)
        + _compiled(results)
        + _copies(results)
        + _skipped(results)
        + _overhead(results)
        + _memory(results)
        + _targets(results)
    )
    return text


def table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned columns; the first column is text, the others are figures."""
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], widths, strict=True))])
        for row in rows
    ]


def _labels(record: Record) -> tuple[str, ...]:
    return tuple(record[label] for label in LABELS)


def _time_table(records: Results) -> list[str]:
    peers = [name for name in _union(records, "variants") if name != "cellops"]
    rows = [["shape", "layout", "cellops", *peers, "GFLOP/s", "of matmul", "of the bound"]]
    for record in records:
        ours = record["variants"]["cellops"]["median"]
        row = [record["case"], record["layout"], f"{1e3 * ours:.2f}"]
        for peer in peers:
            timing = record["variants"].get(peer)
            row.append(f"{1e3 * timing['median']:.2f} ({timing['median'] / ours:.2f}x)" if timing else "-")
        percent = 100 * record["gflops"] / record["matmul_gflops"]
        rows.append([*row, f"{record['gflops']:.0f}", f"{percent:.0f} %", f"{record['percent_of_bound']:.0f} %"])
    for layout in sorted({record["layout"] for record in records}):
        same = {"dtype": records[0]["dtype"], "direction": records[0]["direction"], "layout": layout}
        means = [median_ratio(records, peer, "cellops", **same) for peer in peers]
        cells = ["-" if mean is None else f"({mean:.2f}x)" for mean in means]
        rows.append(["geometric mean", layout, "", *cells, "", "", ""])
    return table(rows)


def _speed(results: Results) -> list[str]:
    text = []
    chosen = [record for record in results if record["kind"] in ("speed", "layer")]
    for op, group in groupby(chosen, key=lambda one: one["op"]):
        records = list(group)
        peers = [name for name in _union(records, "variants") if name != "cellops"]
        rows = [[f"{op}: milliseconds (times ours)", "cellops", *peers]]
        for record in records:
            label = " ".join(record[key] for key in ("case", "dtype", "layout", "direction"))
            medians = {name: timing["median"] for name, timing in record["variants"].items()}
            ours = medians["cellops"]
            figures = [f"{1e3 * medians[peer]:.3f} ({medians[peer] / ours:.2f}x)" for peer in peers]
            rows.append([label, f"{1e3 * ours:.3f}", *figures])
        text += ["", *table(rows)]
    return text


def _models(results: Results) -> list[str]:
    text = []
    records = [record for record in results if record["kind"] == "model"]
    if records:
        rows = [["network", "variant", "ms a batch", "of ours", "images/s", "peak MiB above the weights"]]
        for record in records:
            label = " ".join(record[key] for key in ("op", "case", "dtype", "layout", "device", "direction"))
            ours = record["variants"]["cellops"]["median"]
            for name, timing in record["variants"].items():
                speed, peak = record["images_per_second"][name], record["peak_bytes"][name] / 2**20
                figures = [f"{1e3 * timing['median']:.1f}", f"{timing['median'] / ours:.2f}x", f"{speed:.1f}"]
                rows.append([label if name == "cellops" else "", name, *figures, f"{peak:.0f}"])
        text += ["", *table(rows)]
    for record in (record for record in results if record["kind"] == "model_part"):
        percent = 100 * record["seconds"] / record["total_seconds"]
        text += [
            "",
            f"{record['what']} in a {record['direction']} of {record['op']}, {record['case']}: {percent:.1f} %",
        ]
    return text


def _accelerated(results: Results) -> list[str]:
    records = [record for record in results if record["kind"] == "accelerate"]
    if not records:
        return []
    others = [name for name in _union(records, "variants") if name != "cellops"]
    rows = [["after cellops.accelerate: milliseconds a batch (times ours)", "replaced", "cellops", *others]]
    for record in records:
        medians = {name: timing["median"] for name, timing in record["variants"].items()}
        ours = medians["cellops"]
        figures = [
            f"{1e3 * medians[name]:.1f} ({medians[name] / ours:.2f}x)" if name in medians else "-" for name in others
        ]
        label = " ".join(record[key] for key in ("case", "layout", "direction"))
        rows.append([label, str(record["replaced"]), f"{1e3 * ours:.1f}", *figures])
    return ["", *table(rows)]


def _training(results: Results) -> list[str]:
    records = [record for record in results if record["kind"] == "training"]
    if not records:
        return []
    rows = [["training and evaluation", "", "images/s", "bare network, images/s", "ratio", "logging and metrics"]]
    for record in records:
        medians = {name: timing["median"] for name, timing in record["variants"].items()}
        speeds = [f"{record['images'] / medians[name]:.1f}" for name in ("cellops", "bare")]
        ratio = f"{medians['cellops'] / medians['bare']:.2f}x"
        overhead = f"{100 * record['overhead']:.2f} %" if "overhead" in record else "-"
        rows.append([record["case"], record["direction"], *speeds, ratio, overhead])
    return ["", *table(rows)]


def _compiled(results: Results) -> list[str]:
    records = [record for record in results if record["kind"] == "compile"]
    if not records:
        return []
    rows = [["in a compiled block: milliseconds (times ours)", "cellops", "composition"]]
    for record in records:
        ours, theirs = (record["variants"][name]["median"] for name in ("cellops", "composition"))
        label = " ".join(record[key] for key in ("op", "case", "layout", "direction"))
        rows.append([label, f"{1e3 * ours:.3f}", f"{1e3 * theirs:.3f} ({theirs / ours:.2f}x)"])
    return ["", *table(rows)]


def _copies(results: Results) -> list[str]:
    records = [record for record in results if record["kind"] == "copies"]
    if not records:
        return []
    names = [name for name in _union(records, "variants") if name != "copy"]
    rows = [["copies of the input", *names, "copy"]]
    for record in records:
        label = " ".join(record[key] for key in ("case", "dtype", "layout", "direction"))
        times = [f"{record['copies'][name]:.2f}" if name in record["copies"] else "-" for name in names]
        rows.append([label, *times, f"{record['copy_gigabytes_per_second']:.1f} GB/s"])
    return ["", *table(rows)]


def _skipped(results: Results) -> list[str]:
    reasons: dict[tuple[str, str, str], int] = {}
    for record in results:
        for name, reason in record.get("skipped", {}).items():
            key = (name, record.get("dtype", record["kind"]), reason)
            reasons[key] = reasons.get(key, 0) + 1
    text = [f"  {name}, {where} ({count}x): {reason}" for (name, where, reason), count in reasons.items()]
    return ["", "not measured", *text] if text else []


def _overhead(results: Results) -> list[str]:
    text = []
    for record in (record for record in results if record["kind"] == "overhead"):
        rows = [[name, f"{1e6 * timing['median']:.1f}"] for name, timing in record["variants"].items()]
        title = f"{record['op']} call overhead, 512 elements, {record['case']} kernel: microseconds a call"
        text += ["", title, *table(rows)]
    return text


def _memory(results: Results) -> list[str]:
    rows = [
        [f"{record['direction']}, {name}", f"{used['bytes'] / 2**20:.1f} MiB", f"{used['percent_of_im2col']:.1f} %"]
        for record in results
        if record["kind"] == "memory"
        for name, used in record["variants"].items()
    ]
    return ["", "peak memory above inputs and outputs, and as part of the im2col buffer", *table(rows)] if rows else []


def _targets(results: Results) -> list[str]:
    words = {True: "reached", False: "NOT REACHED", None: "not measured"}
    rows = [["target (geometric means over the shapes that were run)", "limit", "measured", ""]]
    for row in judge_all(results):
        rows.append([f"{row['op']} {row['target']}", row["limit"], row["value"] or "-", words[row["reached"]]])
    return ["", *table(rows)]


def _union(records: Results, field: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record[field]))

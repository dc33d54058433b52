"""The report's figures, each as an inline SVG image."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from cellops.models.training.metrics import roc_curves

INK, MUTED, GRID, FIRST, SECOND = "#1d2733", "#667085", "#e4e7ec", "#2b5fa8", "#d9622b"
CLASSES = ["#2b5fa8", "#d9622b", "#2f8f5b", "#8e5bb5", "#c8992e", "#c2446e", "#3aa0b0", "#6b7280", "#8a5a3c", "#94a83d"]
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#c6d7ee", "#6f9bd1", "#2b5fa8", "#153a70"])
FONT = "DejaVu Sans"  # comes with matplotlib
EAST_ASIAN = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK TC",
    "Noto Sans CJK KR",
    "Noto Sans SC",
    "Noto Sans JP",
    "Noto Sans KR",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "IPAGothic",
    "IPAexGothic",
    "NanumGothic",
    "PingFang SC",
    "Hiragino Sans",
    "Hiragino Sans GB",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "SimHei",
)
"""Fonts with the characters that DejaVu Sans lacks, for class names in Chinese, Japanese or Korean."""
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # class names are text: two dollars in them would be a formula, and mostly a wrong one
    "font.size": 9,
    "axes.edgecolor": "#98a2b3",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    "svg.hashsalt": "cellops",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}

Log = Sequence[Mapping[str, float]]


def families() -> list[str]:
    """Fonts to look for a character in, one after the other: of those for East Asian names the ones installed here.

    They must be named as families, as matplotlib takes only one font of a generic family; and one that is not there
    would be warned about in every figure.
    """
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [FONT, *(name for name in EAST_ASIAN if name in installed)]


@contextmanager
def drawing(width: float, height: float, columns: int = 1) -> Iterator[tuple[list[Axes], dict[str, str]]]:
    """Axes to draw on; when it is left, the dictionary holds the picture as a data address under "image"."""
    result: dict[str, str] = {}
    with mpl.rc_context({**STYLE, "font.family": families()}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1, columns, squeeze=False)[0]
        yield list(axes), result
        text = io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    result["image"] = "data:image/svg+xml;base64," + base64.b64encode(text.getvalue()).decode()


def short(name: str, width: int = 16) -> str:
    """A class name that fits beside a figure."""
    text = name.replace("_", " ").strip()
    found = textwrap.shorten(text, width, placeholder="…")
    return found if found not in ("", "…") else f"{name[: width - 1]}…" if len(name) > width else name


def learning_curves(logs: Sequence[tuple[str, Log]]) -> str:
    """Loss and accuracy over the epochs, training and validation, one pair of lines for each fold."""
    with drawing(9.4, 3.1, 2) as ((losses, accuracies), result):
        for name, log in logs:
            epochs = [row["epoch"] for row in log]
            thin: dict[str, Any] = {
                "linewidth": 1.8 if len(logs) == 1 else 1.0,
                "alpha": 1.0 if len(logs) == 1 else 0.7,
            }
            thin |= {"marker": "o", "markersize": 3} if len(epochs) < 3 else {}
            first = name == logs[0][0]
            for axes, key in ((losses, "loss"), (accuracies, "accuracy_micro")):
                axes.plot(
                    epochs,
                    [row[key] for row in log],
                    color=FIRST,
                    label="training (augmented)" if first else None,
                    **thin,
                )
                if f"validation_{key}" in log[0]:
                    axes.plot(
                        epochs,
                        [row[f"validation_{key}"] for row in log],
                        color=SECOND,
                        label="validation" if first else None,
                        **thin,
                    )
        losses.set_title("Loss")
        accuracies.set_title("Accuracy")
        accuracies.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes in (losses, accuracies):
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        losses.legend()
    return result["image"]


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> str:
    """The confusion matrix in counts, and with each row scaled to 100 %."""
    count = len(classes)
    rows = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(2.6, 0.52 * count + 1.2), 6.5)
    size = 9 if count <= 8 else 7
    with drawing(2 * side + 1.2, side, 2) as (pair, result):
        for axes, values, title in ((pair[0], matrix, "Counts"), (pair[1], 100 * rows, "Percent of the true class")):
            axes.imshow(rows, cmap=SHADES, vmin=0, vmax=1)
            axes.grid(False)
            axes.set_title(title)
            axes.set_xticks(range(count), [short(name) for name in classes], rotation=40, ha="right")
            axes.set_yticks(range(count), [short(name) for name in classes])
            axes.set_xlabel("predicted")
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
            for row in range(count):
                for column in range(count):
                    value = values[row, column]
                    text = f"{value:.0f}" if value >= 10 or value == 0 or title == "Counts" else f"{value:.1f}"
                    color = "white" if rows[row, column] > 0.55 else INK if value else "#b8c0cc"
                    axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
        pair[0].set_ylabel("true")
    return result["image"]


def roc(probabilities: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> str:
    """One-vs-rest ROC curves with their areas; a class without positive or negative images has none."""
    curves = roc_curves(probabilities, targets, classes)
    with drawing(5.0, 4.1) as ((axes,), result):
        axes.plot([0, 1], [0, 1], color="#98a2b3", linewidth=1, linestyle=(0, (4, 3)))
        for label, name in enumerate(classes):
            if name not in curves or (len(classes) == 2 and label == 0):  # of two classes both curves are one
                continue
            curve = curves[name]
            axes.plot(
                curve["false_positive_rate"],
                curve["true_positive_rate"],
                color=CLASSES[label % len(CLASSES)],
                linewidth=1.6,
                label=f"{short(name, 22)}  {curve['auc']:.3f}",
            )
        axes.set_title("ROC, one class against the rest (area)")
        axes.set_xlabel("false positive rate")
        axes.set_ylabel("true positive rate")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
        if curves:
            axes.legend(loc="lower right")
    return result["image"]


def reliability(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Accuracy over confidence, as `calibration` gives them, before and after temperature scaling."""
    with drawing(5.0, 4.1) as ((axes,), result):
        axes.plot([0, 1], [0, 1], color="#98a2b3", linewidth=1, linestyle=(0, (4, 3)), label="perfect")
        for found, color, label in ((before, FIRST, "as trained"), (after, SECOND, "temperature-scaled")):
            bins = found["bins"]
            total = sum(one["count"] for one in bins)
            x, y = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
            axes.plot(x, y, color=color, linewidth=1.4, label=f"{label}, ECE {found['ece']:.3f}")
            axes.scatter(
                x, y, s=[14 + 160 * one["count"] / total for one in bins], color=color, alpha=0.75, linewidth=0
            )
        axes.set_title("Reliability (dots grow with the images in a bin)")
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.04)
        axes.legend(loc="upper left")
    return result["image"]


def intervals(rows: Sequence[tuple[str, float, float, float]], groups: Sequence[Any]) -> str:
    """Values with their confidence intervals as horizontal bars; the group chooses the colour."""
    order = list(dict.fromkeys(groups))
    with drawing(9.4, 0.6 + 0.27 * len(rows)) as ((axes,), result):
        for place, ((_, value, low, high), group) in enumerate(zip(rows, groups, strict=True)):
            color = CLASSES[order.index(group) % len(CLASSES)]
            axes.plot([low, high], [place, place], color=color, linewidth=3, alpha=0.35, solid_capstyle="round")
            axes.plot([value], [place], color=color, marker="o", markersize=5)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return result["image"]

"""What each op should reach, and what the records of a run say about it. Only printed: no test fails on a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

Record = dict[str, Any]
Results = list[Record]


@dataclass(frozen=True)
class Target:
    """A limit for a figure of the records; `value` returns None where it was not measured."""

    op: str
    text: str
    limit: float
    at_least: bool
    value: Callable[[Results], float | None]
    unit: str = "x"

    def judge(self, results: Results) -> Record:
        """Text, limit, value and whether it was reached, ready for a report."""
        value = self.value([record for record in results if record["op"] == self.op])
        reached = None if value is None else value >= self.limit if self.at_least else value <= self.limit
        sign = "≥" if self.at_least else "≤"
        return {
            "op": self.op,
            "target": self.text,
            "limit": f"{sign} {self.limit:g}{_space(self.unit)}{self.unit}",
            "value": None if value is None else _figure(value, self.unit),
            "reached": reached,
        }


def judge_all(results: Results) -> list[Record]:
    """Every target beside what the records say."""
    return [target.judge(results) for target in TARGETS]


def geometric_mean(values: list[float]) -> float | None:
    """None of no values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def select(results: Results, **labels: Any) -> Results:
    """The records of the default run with these labels."""
    return [
        record
        for record in results
        if not record.get("full") and all(record.get(key) == value for key, value in labels.items())
    ]


def median_ratio(results: Results, above: str, below: str, *, kind: str = "time", **labels: str) -> float | None:
    """Geometric mean over shapes of the median of `above` over that of `below`; None unless every shape has both."""
    chosen = select(results, kind=kind, **labels)
    if not all(name in record["variants"] for record in chosen for name in (above, below)):
        return None
    timings = [record["variants"] for record in chosen]
    return geometric_mean([timing[above]["median"] / timing[below]["median"] for timing in timings])


def _ratio(above: str, below: str, dtype: str, layout: str, direction: str) -> Callable[[Results], float | None]:
    return lambda results: median_ratio(results, above, below, dtype=dtype, layout=layout, direction=direction)


def _microseconds(case: str, variant: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        chosen = select(results, kind="overhead", case=case)
        return 1e6 * chosen[0]["variants"][variant]["median"] if chosen else None

    return value


def _percent_of_im2col(direction: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        chosen = select(results, kind="memory", direction=direction)
        return chosen[0]["variants"].get("cellops", {}).get("percent_of_im2col") if chosen else None

    return value


def _deform_conv2d() -> list[Target]:
    op, targets = "deform_conv2d", []
    limits = {  # direction: dense of the layout, then how many times faster than each peer
        "forward": ({"NCHW": 1.3, "channels_last": 1.5}, {"ONNX Runtime": 2.0, "OpenVINO": 1.4, "torchvision": 14.0}),
        "forward+backward": ({"NCHW": 2.0, "channels_last": 2.0}, {"torchvision": 25.0}),
    }
    for direction, (dense, peers) in limits.items():
        for layout, limit in dense.items():
            value = _ratio("cellops", f"dense {layout}", "float32", layout, direction)
            targets.append(Target(op, f"{direction}, {layout}: time over the dense convolution's", limit, False, value))
        for peer, limit in peers.items():
            for layout in dense:
                value = _ratio(peer, "cellops", "float32", layout, direction)
                targets.append(Target(op, f"{direction}, {layout}: speed over {peer}", limit, True, value))
    for direction in limits:
        for layout in ("NCHW", "channels_last"):
            value = _ratio("cellops float32", "cellops", "bfloat16", layout, direction)
            targets.append(Target(op, f"{direction}, {layout}: speed of bfloat16 over float32", 1.0, True, value))
    for direction in limits:
        value = _percent_of_im2col(direction)
        text = f"{direction}: extra memory, of the im2col buffer"
        targets.append(Target(op, text, 5.0, False, value, unit="%"))
    for mode, limit in (("inference", 9.0), ("training forward", 14.0)):
        value = _microseconds("1x1", f"cellops, {mode}")
        targets.append(Target(op, f"call overhead on 512 elements, {mode}", limit, False, value, unit="µs"))
    return targets


def _offset_sample2d() -> list[Target]:
    op, targets = "offset_sample2d", []
    for direction in ("forward", "forward+backward"):
        for layout in ("NCHW", "channels_last"):
            value = partial(
                median_ratio,
                above="grid_sample",
                below="cellops",
                kind="speed",
                dtype="float32",
                layout=layout,
                direction=direction,
            )
            targets.append(Target(op, f"{direction}, {layout}: speed over grid_sample", 4.0, True, value))
    return targets


def _copies(direction: str, layout: str) -> Callable[[Results], float | None]:
    def value(results: Results) -> float | None:
        chosen = select(results, kind="copies", dtype="float32", direction=direction, layout=layout)
        return geometric_mean([record["copies"]["cellops"] for record in chosen])

    return value


def _in_copies(op: str, evaluation: float, training: float) -> list[Target]:
    limits = {"forward": evaluation, "forward+backward": training}
    return [
        Target(
            op, f"{direction}, {layout}: copies of the input", limit, False, _copies(direction, layout), unit="copies"
        )
        for direction, limit in limits.items()
        for layout in ("NCHW", "channels_last")
    ]


def _part(results: Results, what: str) -> float | None:
    """Percent of a training step."""
    chosen = select(results, kind="model_part", what=what)
    return 100 * chosen[0]["seconds"] / chosen[0]["total_seconds"] if chosen else None


def _models() -> list[Target]:
    training = {"kind": "model", "device": "cpu", "dtype": "float32", "layout": "NCHW", "direction": "training step"}
    limits = {"lung_resnet50": 2.0, "shufflenet_v1_g3": 1.5, "deform_resnet50": 8.0}
    targets = [
        Target(
            network,
            f"training step on the CPU: speed over its plain twin{' on torchvision' if 'deform' in network else ''}",
            limit,
            True,
            partial(median_ratio, above="plain", below="cellops", **training),
        )
        for network, limit in limits.items()
    ]
    sampling = partial(_part, what="sampling")
    return [*targets, Target("hqnet", "training step on the CPU: time in sampling", 10.0, False, sampling, unit="%")]


def _overhead(results: Results) -> float | None:
    """Percent of an epoch."""
    chosen = select(results, kind="training", direction="epoch")
    return 100 * chosen[0]["overhead"] if chosen else None


def _training() -> list[Target]:
    times = {
        direction: partial(median_ratio, above="cellops", below="bare", kind="training", direction=direction)
        for direction in ("epoch", "evaluation")
    }
    return [
        Target("training", "epoch of shufflenet_v2_x1_0 at 112 px: times forward+backward", 1.3, False, times["epoch"]),
        Target("training", "logging, metrics and checkpoints of an epoch", 2.0, False, _overhead, unit="%"),
        Target("training", "evaluation: times the forward alone", 1.3, False, times["evaluation"]),
    ]


def _figure(value: float, unit: str) -> str:
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}{_space(unit)}{unit}"


def _space(unit: str) -> str:
    return "" if unit == "x" else " "


TARGETS = [
    *_deform_conv2d(),
    *_offset_sample2d(),
    *_in_copies("frelu", 1.5, 7.0),
    *_in_copies("squeeze_excite", 1.25, 3.5),
    *_in_copies("eca", 1.25, 3.5),
    *_in_copies("spatial_attention", 1.25, 3.5),
    *_in_copies("group_conv1x1", 2.0, 7.0),
    *_models(),
    *_training(),
]

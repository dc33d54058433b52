"""What each op should reach on a GPU, in bfloat16 and channels_last unless said, and what a run's rows say about it.

Only printed: no test fails on a time. Ratios are geometric means over the shapes of the targets, and None unless every
shape that was asked for has both figures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from targets import Record, Results, Target, geometric_mean

Value = Callable[[Results], "float | None"]
MEMORY_BOUND = {  # percent of the copy bandwidth in evaluation
    "offset_sample2d": 80,
    "frelu": 85,
    "depthwise_conv2d": 85,
    "squeeze_excite": 80,
    "eca": 80,
    "spatial_attention": 60,
    "group_conv1x1": 80,
}


def judge_all(records: Results) -> list[Record]:
    """Every target beside what the rows say."""
    return [target.judge([record for record in records if record.get("kind") == "gpu"]) for target in _targets()]


def ours(record: Record) -> str:
    """The variant that a call without `backend=` takes."""
    return f"cellops {record['default']}"


def trusted(record: Record) -> bool:
    """Whether the default was timed, and its answer was right."""
    return ours(record) in record["variants"] and ours(record) not in record["skipped"]


@cache
def _points() -> list[Any]:
    """The rows that a whole run has for the targets."""
    from on_gpu import shapes  # torch and the cases are not needed to show what was judged

    return [point for point in shapes.points() if not point.sweep]


def chosen(
    records: Results, op: str, direction: str, dtype: str = "bfloat16", layout: str = "channels_last"
) -> Results:
    """The rows of an op's shapes in a direction, type and layout; none unless all are there and can be trusted."""
    labels = (op, direction, dtype, layout)
    keys = {point.key for point in _points() if (point.op, point.direction, point.dtype, point.layout) == labels}
    found = {record["key"]: record for record in records if record["key"] in keys}
    return list(found.values()) if set(found) == keys and all(map(trusted, found.values())) else []


def _speed_over(records: Results, op: str, peer: str, direction: str, dtype: str = "bfloat16") -> float | None:
    rows = chosen(records, op, direction, dtype)
    if not all(peer in record["variants"] for record in rows):
        return None
    return geometric_mean(
        [record["variants"][peer]["median"] / record["variants"][ours(record)]["median"] for record in rows]
    )


def _time_over(records: Results, op: str, peer: str, direction: str) -> float | None:
    speed = _speed_over(records, op, peer, direction)
    return None if speed is None else 1 / speed


def _percent_of_copy(records: Results, op: str, direction: str) -> float | None:
    return geometric_mean([record["percent_of_copy"][ours(record)] for record in chosen(records, op, direction)])


def _extra_memory(records: Results, op: str, direction: str) -> float | None:
    """The most, in percent of the im2col buffer."""
    rows = chosen(records, op, direction)
    if any(record["peak_bytes"].get(ours(record)) is None for record in rows):
        return None
    extra = [
        100 * max(record["peak_bytes"][ours(record)] - record["output_bytes"], 0) / record["im2col_bytes"]
        for record in rows
    ]
    return max(extra, default=None)


def _targets() -> list[Target]:
    deform, forward, both = "deform_conv2d", "forward", "forward+backward"
    found = [
        Target(deform, text, limit, at_least, value, unit)
        for text, limit, at_least, value, unit in (
            (
                "forward: time over cuDNN's dense conv",
                3.0,
                False,
                partial(_time_over, op=deform, peer="dense", direction=forward),
                "x",
            ),
            (
                "forward+backward: time over the dense conv",
                4.0,
                False,
                partial(_time_over, op=deform, peer="dense", direction=both),
                "x",
            ),
            (
                "forward, float16: speed over torchvision",
                5.0,
                True,
                partial(_speed_over, op=deform, peer="torchvision", direction=forward, dtype="float16"),
                "x",
            ),
            (
                "forward+backward, float16: speed over torchvision",
                8.0,
                True,
                partial(_speed_over, op=deform, peer="torchvision", direction=both, dtype="float16"),
                "x",
            ),
            (
                "forward: extra memory, of the im2col buffer",
                5.0,
                False,
                partial(_extra_memory, op=deform, direction=forward),
                "%",
            ),
            (
                "forward+backward: extra memory, of it",
                5.0,
                False,
                partial(_extra_memory, op=deform, direction=both),
                "%",
            ),
        )
    ]
    for op, percent in MEMORY_BOUND.items():
        value = partial(_percent_of_copy, op=op, direction=forward)
        found.append(Target(op, "evaluation: of the copy bandwidth", percent, True, value, "%"))
    found.append(
        Target(
            "offset_sample2d",
            "forward: speed over grid_sample",
            3.0,
            True,
            partial(_speed_over, op="offset_sample2d", peer="eager", direction=forward),
        )
    )
    found.append(
        Target(
            "frelu",
            "training: speed over torch.compile",
            2.0,
            True,
            partial(_speed_over, op="frelu", peer="compiled", direction=both),
        )
    )
    return found

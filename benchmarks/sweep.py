"""Times each module beside its plain twin against channels and map size; docs/gallery.py draws the results.

python benchmarks/sweep.py               # three minutes on 2 cores; writes benchmarks/results/sweep/<machine>.json
python benchmarks/sweep.py --only eca    # part of it, to the terminal
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

FOLDER = Path(__file__).resolve().parent / "results" / "sweep"
BATCH = 4
CHANNELS, SIZES = (16, 32, 64, 128, 256), (7, 14, 28, 56, 112)
AT_SIZE, AT_CHANNELS = 28, 64
"""What stays the same where the other is swept."""
SECONDS, MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 1.0, 3, 25


def modules(channels: int) -> dict[str, Callable[[], Any]]:
    """Builders of the module of each op."""
    import cellops

    return {
        "deform_conv2d": lambda: cellops.DeformConv2dPack(channels, channels, 3, padding=1),
        "offset_sample2d": lambda: cellops.ConvOffset2d(channels),
        "frelu": lambda: cellops.FReLU(channels),
        "squeeze_excite": lambda: cellops.SqueezeExcite(channels),
        "eca": lambda: cellops.EfficientChannelAttention(channels),
        "spatial_attention": lambda: cellops.SpatialAttention(mode="pool"),
        "group_conv1x1": lambda: cellops.GroupConv1x1(channels, channels, groups=4, shuffle=True),
    }


def measure(op: str, channels: int, size: int, direction: str) -> dict[str, float]:
    """Median seconds of ours and of PyTorch's own ops, in turns."""
    import torch

    from cellops.models.twin import plain_twin

    torch.manual_seed(0)
    ours = modules(channels)[op]().train(direction != "forward")
    for name, parameter in ours.named_parameters():
        if "conv_offset" in name:  # as after training: points between the pixels
            torch.nn.init.normal_(parameter, std=0.02)
    input = torch.randn(BATCH, channels, size, size)
    calls = {
        "cellops": _call(ours, input, direction),
        "plain": _call(plain_twin(ours), input, direction),
    }
    gc.collect()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent = 0.0
    for call in calls.values():
        call()
    while len(taken["cellops"]) < MAXIMUM_ROUNDS and (spent < SECONDS or len(taken["cellops"]) < MINIMUM_ROUNDS):
        for name, call in calls.items():
            if taken[name] and taken[name][-1] < 0.05:
                call()  # wakes the threads
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
            spent += taken[name][-1]
    return {name: statistics.median(values) for name, values in taken.items()}


def _call(module: Any, input: Any, direction: str) -> Callable[[], Any]:
    import torch

    if direction == "forward":
        return torch.no_grad()(lambda: module(input))
    leaf = input.clone().requires_grad_()
    leaves = [leaf, *module.parameters()]
    return lambda: torch.autograd.grad(module(leaf).sum(), leaves)


def main() -> int:
    """Measures; writes where nothing was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="OP", help="one op, written to no file")
    parser.add_argument("--threads", type=int, default=machine.default_threads(), help="of every module")
    options = parser.parse_args()
    threads = options.threads
    wanted = machine.steady_environment(threads)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)

    import torch

    torch.set_num_threads(threads)
    names = list(modules(8))
    if options.only not in (None, *names):
        parser.error(f"--only must be one of {', '.join(names)}, got {options.only}")
    head = {"commit": machine.commit(), "load_at_start": machine.load(), **machine.describe(threads)}
    places = [("channels", channels, AT_SIZE) for channels in CHANNELS]
    places += [("size", AT_CHANNELS, size) for size in SIZES]
    records = []
    for op in names:
        for axis, channels, size in places if options.only in (None, op) else ():
            for direction in ("forward", "forward+backward"):
                seconds = measure(op, channels, size, direction)
                records.append(
                    {"op": op, "axis": axis, "channels": channels, "size": size, "direction": direction}
                    | {"seconds": seconds}
                )
                print(
                    f"{op:18} {channels:4} channels {size:4} pixels {direction:17}"
                    f"{1e3 * seconds['cellops']:9.3f} ms, {seconds['plain'] / seconds['cellops']:6.2f}x as fast",
                    flush=True,
                )
    if options.only:
        return 0
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{head['machine']['name']}.json"
    path.write_text(json.dumps({**head, "batch": BATCH, "records": records}, indent=1, ensure_ascii=False) + "\n")
    print(f"results written to {path}; the documentation's gallery is drawn from them")
    return 0


if __name__ == "__main__":
    sys.exit(main())

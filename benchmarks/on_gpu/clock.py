"""Times variants of one call side by side on a device.

On a GPU a variant is captured into a CUDA graph that holds enough calls for a fifth of a millisecond, so that no launch
from Python is in the time; events stand around a replay, and variants take turns. A variant that cannot be captured is
called in a loop between the events instead, and its timing says so. On the CPU the clock is the wall's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from on_gpu.progress import in_a_line, is_fatal

Call = Callable[[], Any]
Timing = dict[str, Any]

ROUNDS = 15
LEAST_ROUNDS, MOST_SECONDS = 3, 1.0  # where 15 rounds of the slowest variant take longer, fewer do
LEAST_SECONDS = 2e-4  # of a timed replay; events tell half a microsecond
MOST_CALLS = 64  # in a graph
WARM_UP = 3  # calls: libraries choose their algorithms, Triton compiles


def compare(
    variants: dict[str, Call], device: torch.device, rounds: int = ROUNDS
) -> tuple[dict[str, Timing], dict[str, str]]:
    """For each variant median and minimum in seconds a call, the number of rounds, and "graph", or why there is none.

    Beside them the errors of the variants that raised when they were prepared (a graph keeps its memory for itself, so
    that there may be too little).
    """
    prepare = _captured if device.type == "cuda" else _called_once
    runs: dict[str, tuple[Call, int, str]] = {}
    failed: dict[str, str] = {}
    for name, call in variants.items():
        try:
            runs[name] = prepare(call)
        except Exception as error:
            if is_fatal(error):
                raise
            failed[name] = in_a_line(error)
    if device.type != "cuda":
        return _on_cpu(runs, rounds), failed
    taken: dict[str, list[float]] = {name: [] for name in runs}
    slowest = max((_elapsed(run) for run, _, _ in runs.values()), default=0.0)
    for _ in range(min(rounds, max(LEAST_ROUNDS, int(MOST_SECONDS / max(slowest, 1e-6))))):
        for name, (run, calls, _) in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()  # the GPU is busy when the events are queued, and the caches hold this variant's tensors, if any
            start.record()
            run()
            end.record()
            end.synchronize()
            taken[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: _timing(values, runs[name][1], runs[name][2]) for name, values in taken.items()}, failed


def _captured(call: Call) -> tuple[Call, int, str]:
    """What replays a number of calls, that number, and "yes" or why no graph was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
        side.synchronize()
        started = time.perf_counter()
        call()
        side.synchronize()
        seconds = time.perf_counter() - started
    torch.cuda.current_stream().wait_stream(side)
    current = torch.cuda.current_stream()
    calls = 1
    try:
        while True:
            graph = _graph_of(call, calls)
            # By a replay, as launches from Python take a multiple of a small tensor's time.
            if calls == MOST_CALLS or _elapsed(graph.replay) >= LEAST_SECONDS:
                return graph.replay, calls, "yes"
            calls *= 4
    except Exception as error:  # whatever a peer does that a capture forbids
        torch.cuda.set_stream(current)  # torch 2.11 leaves the capture's stream current when ending a capture raises
        torch.cuda.synchronize()
        calls = max(1, min(MOST_CALLS, int(LEAST_SECONDS / max(seconds, 1e-6)) + 1))
        return _loop(call, calls), calls, f"no: {in_a_line(error)}"


def _graph_of(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def _elapsed(run: Call) -> float:
    """Seconds of a second run by events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _loop(call: Call, calls: int) -> Call:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def _called_once(call: Call) -> tuple[Call, int, str]:
    call()
    return call, 1, "no: on the CPU"


def _on_cpu(runs: dict[str, tuple[Call, int, str]], rounds: int) -> dict[str, Timing]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (run, _, _) in runs.items():
            started = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - started)
    return {name: _timing(values, *runs[name][1:]) for name, values in taken.items()}


def _timing(values: list[float], calls: int, graph: str) -> Timing:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "rounds": len(values),
        "calls": calls,
        "graph": graph,
    }


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes that torch's allocator gave out at a time during a call, above what it had; None on the CPU.

    What the call returns is counted: it lives until the call is over.
    """
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

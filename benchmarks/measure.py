"""Times variants of one call side by side: in every round each variant has its turn, so that noise hits all alike.

A turn is a pause, in which the spinning worker threads of the variant before go to sleep, an untimed call that wakes
this variant's own, and the timed call. Slow variants skip the untimed call and some of the rounds.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch

Variants = dict[str, Callable[[], Any]]
Timing = dict[str, float]

PAUSE = 0.005  # s; at 0 or 2 ms OpenVINO's median beside the others is 1.8 times its own alone, at 5 ms equal to it
SLOW = 0.05  # s; above, waking the threads does not show and a call costs too much to repeat often
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 9, 31
SLOW_SECONDS, SLOW_MINIMUM = 1.5, 3


def compare(
    benchmark: Any,
    ours: str,
    variants: Variants,
    *,
    seconds: float = 3.0,
    calls: int = 1,
    slow_rounds: int | None = None,
) -> dict[str, Timing]:
    """Time all variants in turns.

    Args:
        benchmark: the fixture of pytest-benchmark; it times `ours`.
        ours: the key in `variants` that the fixture reports.
        variants: what to call, by name.
        seconds: about how long the fast variants may take in total.
        calls: how many calls a variant makes in one turn (see `repeat`); times are per call.
        slow_rounds: how many turns each variant has, instead, where one of them is slow (whole networks).

    Returns:
        For every variant median and minimum in seconds per call, and the number of turns it had.
    """
    duration = {name: _duration(call) for name, call in variants.items()}
    round_seconds = sum(2 * taken + PAUSE for taken in duration.values() if taken <= SLOW)
    rounds = min(MAXIMUM_ROUNDS, max(MINIMUM_ROUNDS, int(seconds / max(round_seconds, 1e-9))))
    turns = {
        name: rounds if name == ours or taken <= SLOW else min(rounds, max(SLOW_MINIMUM, int(SLOW_SECONDS / taken)))
        for name, taken in duration.items()
    }
    if slow_rounds is not None and max(duration.values()) > SLOW:
        rounds, turns = slow_rounds, dict.fromkeys(variants, slow_rounds)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    finished = 0

    def prepare(name: str) -> None:
        time.sleep(PAUSE)
        if duration[name] <= SLOW:
            variants[name]()

    def others_turns() -> None:
        nonlocal finished
        for name in variants:
            if name != ours and (finished + 1) * turns[name] // rounds > finished * turns[name] // rounds:
                prepare(name)
                taken[name].append(_time(variants[name]))
        finished += 1
        prepare(ours)

    with _no_garbage_collection():
        benchmark.pedantic(variants[ours], setup=others_turns, rounds=rounds)
    if benchmark.enabled:
        taken[ours] = list(benchmark.stats.stats.data)
    return {name: _timing([second / calls for second in values or [duration[name]]]) for name, values in taken.items()}


def repeat(call: Callable[[], Any], calls: int, *, training: bool) -> Callable[[], None]:
    """A variant for calls too short to be timed singly; grad mode is set once around all of them."""

    def loop() -> None:
        with torch.set_grad_enabled(training):
            for _ in range(calls):
                call()

    return loop


def _time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _duration(call: Callable[[], Any]) -> float:
    first = _time(call)
    return first if first > 4 * SLOW else min(_time(call) for _ in range(2))


def _timing(values: list[float]) -> Timing:
    return {"median": statistics.median(values), "min": min(values), "rounds": len(values)}


@contextmanager
def _no_garbage_collection() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

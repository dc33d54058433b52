"""What the tests of training share: a network that trains in milliseconds, a recipe for it, runs in other processes.

Not a test file itself; the processes are forked from a server that has imported torch, so that each starts at once.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellops.models.registry import register_network
from cellops.models.training.checkpoint import LAST, read_checkpoint
from cellops.models.training.console import Output
from cellops.models.training.recipe import build_recipe, merge
from cellops.models.training.run import Run, prepare
from cellops.models.training.settings import Recipe
from cellops.models.training.sharding import local

NAME = "tests_tiny_cells"


class TinyCells(nn.Module):
    """Two convolutions with what makes resuming hard: running statistics and dropout."""

    def __init__(self, num_classes: int, in_chans: int, norm: str, drop: float) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm == "batch" else nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.drop = nn.Dropout(drop)
        self.head = nn.Linear(16, num_classes)
        self.num_features = 16

    def forward_features(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu()).relu()

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.drop(features.mean((2, 3)))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@register_network()
def tests_tiny_cells(num_classes: int, in_chans: int, norm: str = "batch", drop: float = 0.2) -> nn.Module:
    return TinyCells(num_classes, in_chans, norm, drop)


def tiny_recipe(**changes: Any) -> Recipe:
    """60 drawn cells at 16 pixels, 4 epochs, with everything on that has a state; `changes` as in YAML."""
    values = {
        "name": "tiny",
        "data": {
            "path": "synthetic",
            "options": {"count": 60, "size": 32},
            "input_size": 16,
            "protocol": "paper",  # drawn cells come in groups of 25, too large for so few
            "validation": 0.2,
            "test_fraction": 0.2,
        },
        "model": {"name": NAME},
        "augmentation": {"rotation": 180, "horizontal_flip": 0.5, "color_jitter": {"brightness": 0.2}},
        "mixing": {"mixup": 0.4, "cutmix": 1.0, "probability": 0.5},
        "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
        "optimizer": {"name": "adamw", "learning_rate": 0.01, "weight_decay": 0.05},
        "schedule": {"name": "cosine", "warmup_epochs": 1},
        "training": {"epochs": 4, "batch_size": 5, "accumulate": 2, "clip": 1.0, "ema": 0.9, "device": "cpu"},
        "evaluation": {"bootstrap": 20, "worst": 2, "cost": False},
    }
    return build_recipe(merge(values, changes))


def start(folder: Path, recipe: Recipe | None = None, resume: bool = False) -> Run:
    """A prepared run that prints nothing."""
    torch.set_num_threads(1)
    return prepare(recipe or (None if resume else tiny_recipe()), folder, resume, Output(quiet=True))


def finish(run: Run, **limits: Any) -> bool:
    """Train, then let go of the folder; False if it is not complete."""
    try:
        return run.train(**limits)
    finally:
        run.lock.close()


def state(folder: Path) -> dict[str, Any]:
    """The checkpoint of a run without the times in it."""
    found = read_checkpoint(folder / "checkpoints" / LAST)
    found["progress"].pop("seconds")
    found["progress"].pop("epoch_seconds")
    for row in found["history"]:
        row.pop("seconds")
    return found


def differences(first: Any, second: Any, where: str = "") -> list[str]:
    """The places where two checkpoints are not equal to the last bit."""
    if isinstance(first, Tensor):
        same = isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [where]
    if isinstance(first, dict):
        keys = [] if first.keys() == second.keys() else [f"{where}: keys"]
        return keys + [text for key in first for text in differences(first[key], second.get(key), f"{where}.{key}")]
    if isinstance(first, (list, tuple)):
        lengths = [] if len(first) == len(second) else [f"{where}: length"]
        return lengths + [
            text
            for place, pair in enumerate(zip(first, second, strict=False))
            for text in differences(*pair, f"{where}[{place}]")
        ]
    return [] if first == second or (first != first and second != second) else [f"{where}: {first} is not {second}"]


def _train(folder: Path, recipe: Recipe | None, begun: Any) -> None:
    """In another process: start, or go on with, a run."""
    resume = (folder / "recipe.yaml").is_file()
    run = start(folder, None if resume else recipe, resume)
    begun.set()
    finish(run)


def _join(rank: int, size: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    work(*arguments)


def train_in_ranks(folder: Path, recipe: Recipe | None, limits: dict[str, Any] | None = None) -> None:
    """Work of one of several processes: start a run or go on with it; writes how much this one holds of each weight."""
    resume = (folder / "recipe.yaml").is_file()
    run = start(folder, None if resume and recipe is None else recipe, resume)
    assert run._first is not None
    held = {name: local(value).numel() for name, value in run._first.model.named_parameters()}
    (folder / f"held_{run.ranks.rank}.json").write_text(json.dumps(held))
    run.train(**(limits or {}))
    run.ranks.close()


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    # Not this module: up to Python 3.11 the server does not know the path of the tests.
    context.set_forkserver_preload(
        [
            f"cellops.models.{name}"
            for name in ("zoo", "training.loop", "training.run", "report.page", "report.mistakes")
        ]
    )
    return context


def child(folder: Path, recipe: Recipe) -> tuple[Any, Any]:
    """A process that trains, and the event that it sets when it begins."""
    context = _server()
    begun = context.Event()
    process = context.Process(target=_train, args=(folder, recipe, begun), daemon=True)
    with _single_threaded():
        process.start()
    return process, begun


def start_ranks(size: int, work: Callable[..., None], *arguments: Any) -> list[Any]:
    """Processes that do the same work, joined by gloo; `work` is a function of a module that they can import."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = _server()
    ranks = [
        context.Process(target=_join, args=(rank, size, port, work, arguments), daemon=True) for rank in range(size)
    ]
    with _single_threaded():
        for process in ranks:
            process.start()
    return ranks


def join_ranks(ranks: Sequence[Any], seconds: float = 240) -> list[int]:
    """Wait for processes; returns their exit codes."""
    for process in ranks:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks]


@contextlib.contextmanager
def _single_threaded() -> Any:
    """The server, started with the first process, reads the variable when it imports torch."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before

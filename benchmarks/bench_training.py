"""What training and evaluation cost beside the network alone: decoding, augmentation, logging, metrics, checkpoints.

pytest benchmarks/bench_training.py --benchmark-only
pytest benchmarks/bench_training.py --benchmark-only --full     # the recipes' own networks too

Real cells where there are some: $CELLOPS_PBC, else ../shared/data/pbc; else drawn ones. Bare is the same network on
batches that are ready: forward, loss and backward for an epoch, forward without gradients for an evaluation.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import pytest
import torch
from torch import nn

from cellops.models.cli import main
from cellops.models.training import Recipe, Run, loop, prepare
from cellops.models.training.console import Output
from cellops.models.training.loop import Trainer
from cellops.models.training.recipe import load_recipe
from cellops.models.training.results import predict

OURS, BARE = "cellops", "bare"
ROUNDS = 2
CELLS = Path(os.environ.get("CELLOPS_PBC", Path(__file__).resolve().parents[2] / "shared/data/pbc"))
ROWS = [
    pytest.param("shufflenet_v2_x1_0", 112, id="shufflenet_v2_x1_0-112"),
    pytest.param("shufflenet_v1_g3", 96, id="shufflenet_v1_g3-96", marks=pytest.mark.full),
]


def recipe(network: str, size: int) -> Recipe:
    """1,600 images, a fifth held out and a tenth of the others for validation, varied as a recipe would."""
    data = [f"data.path={CELLS}"] if CELLS.is_dir() else ["data.path=synthetic", "data.layout=auto"]
    drawn = [] if CELLS.is_dir() else [f"data.options={{count: 1600, size: {size}}}", "data.protocol=paper"]
    settings = [f"data.input_size={size}", f"data.store_size={size}", "data.validation=0.1", "training.epochs=1000"]
    return load_recipe("pbc", [f"model.name={network}", "augmentation.crop_fraction=1", *data, *drawn, *settings])


@pytest.fixture
def run_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Run]:
    """Makes a run that is ready to be trained."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path.parent / "cache"))
    return lambda network, size: prepare(recipe(network, size), tmp_path / "run", output=Output(quiet=True))


class Clock:
    """Adds up the seconds in some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def _epoch(trainer: Trainer) -> Callable[[], None]:
    """One epoch as training does it, with its end: validation, metrics, log and checkpoint."""

    def call() -> None:
        trainer._train_epoch(None)
        trainer._end_epoch()

    return call


def _bare_epoch(trainer: Trainer) -> Callable[[], None]:
    """Forward, loss and backward of as many batches, and forward of the validation part's."""
    batches = [next(iter(trainer.batches))] * len(trainer.batches)
    assert trainer.validation is not None
    validation = [batch.images for batch in trainer.validation]
    network, criterion = trainer.network, trainer.criterion
    layout = torch.channels_last if trainer.settings.channels_last else torch.contiguous_format

    def call() -> None:
        network.train()
        for batch in batches:
            logits, _ = network(batch.images.contiguous(memory_format=layout))
            criterion(logits, batch.targets).backward()
            network.zero_grad(set_to_none=True)
        _forward(network, validation, layout)

    return call


def _forward(network: nn.Module, batches: list[torch.Tensor], layout: torch.memory_format) -> None:
    network.eval()
    with torch.inference_mode():
        for images in batches:
            network(images.contiguous(memory_format=layout))


@pytest.mark.parametrize(("network", "size"), ROWS)
def test_epoch(
    network: str, size: int, run_of: Any, benchmark: Any, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch over the bare network, and the part of it that logging, metrics and checkpoints take."""
    run = run_of(network, size)
    trainer = run.trainer(run.parts[0])
    trainer.open_log()
    ends, forwards, epochs = Clock(), Clock(), Clock()
    monkeypatch.setattr(trainer, "_end_epoch", ends.around(trainer._end_epoch))
    monkeypatch.setattr(trainer, "_count", ends.around(trainer._count))
    monkeypatch.setattr(loop, "predict_batches", forwards.around(loop.predict_batches))
    calls = {OURS: epochs.around(_epoch(trainer)), BARE: _bare_epoch(trainer)}
    timings = measure.compare(benchmark, OURS, calls, slow_rounds=ROUNDS)
    run.lock.close()
    record(
        **_labels(network, size, run),
        direction="epoch",
        variants=timings,
        images=len(trainer.batches.indices),
        overhead=(ends.seconds - forwards.seconds) / epochs.seconds,
    )


@pytest.mark.parametrize(("network", "size"), ROWS)
def test_evaluation(network: str, size: int, run_of: Any, benchmark: Any, record: Any) -> None:
    """The held-out part as it is evaluated at the end, without test-time augmentation, over the bare forward."""
    run = run_of(network, size)
    trainer, held_out = run.trainer(run.parts[0]), run.fold(run.parts[0]).test
    images = [batch.images for batch in run.batches.evaluation(held_out)]
    layout = torch.channels_last if run.recipe.training.channels_last else torch.contiguous_format
    calls = {
        OURS: lambda: predict(run, trainer.model, held_out, ""),
        BARE: lambda: _forward(trainer.model, images, layout),
    }
    timings = measure.compare(benchmark, OURS, calls, slow_rounds=ROUNDS)
    run.lock.close()
    record(**_labels(network, size, run), direction="evaluation", variants=timings, images=len(held_out))


@pytest.mark.skipif(not CELLS.is_dir(), reason="no image files: set CELLOPS_PBC")
@pytest.mark.parametrize(("network", "size"), ROWS)
def test_predict(network: str, size: int, run_of: Any, benchmark: Any, record: Any, tmp_path: Path) -> None:
    """`cellops predict` on image files, decoding and loading the weights included, over the bare forward."""
    run = run_of(network, size)
    trainer = run.trainer(run.parts[0])
    weights = tmp_path / "weights.safetensors"
    trainer.save_weights(weights, run.facts(run.parts[0]))
    run.lock.close()
    folder = sorted(path for path in CELLS.iterdir() if path.is_dir())[0]
    count = sum(1 for path in folder.iterdir())
    images = [batch.images for batch in run.batches.evaluation(range(count))]
    layout = torch.channels_last if run.recipe.training.channels_last else torch.contiguous_format
    command = ["predict", str(weights), str(folder), "--overwrite", "--output", str(tmp_path / "predicted")]

    def ours() -> None:
        assert main(command) == 0

    timings = measure.compare(
        benchmark, OURS, {OURS: ours, BARE: lambda: _forward(trainer.model, images, layout)}, slow_rounds=ROUNDS
    )
    record(**_labels(network, size, run), direction="predict", variants=timings, images=count)


def _labels(network: str, size: int, run: Run) -> dict[str, Any]:
    return {
        "kind": "training",
        "op": "training",
        "case": f"{network} {size} px on {run.data.name}",
        "dtype": "float32",
        "layout": "channels_last" if run.recipe.training.channels_last else "NCHW",
        "full": network != "shufflenet_v2_x1_0",
        "skipped": {},
    }

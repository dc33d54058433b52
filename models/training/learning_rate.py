"""The learning-rate range test (Smith 2017): the rate grows with every update, the loss tells which ones train."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cellops.models.training.checkpoint import write_atomically, write_text

if TYPE_CHECKING:
    from cellops.models.training.run import Run

SMOOTHING = 0.9


def find_learning_rate(run: Run, low: float = 1e-6, high: float = 1.0, updates: int = 100) -> float:
    """Try rates from `low` to `high`, write learning_rate.csv and .png into the run's folder and print a suggestion.

    Args:
        run: prepared, not trained.
        low, high: the range, walked through in equal ratios.
        updates: how many rates.

    Returns:
        The rate where the smoothed loss falls fastest.
    """
    trainer = run.trainer(run.parts[0])
    trainer.network.train()
    mean, tried, losses = 0.0, [], []
    rates = np.geomspace(low, high, updates)
    batches = itertools.chain.from_iterable(_epochs(trainer))
    with run.output.bar("learning rates", updates) as bar:
        for number, (rate, batch) in enumerate(zip(rates, batches, strict=False), start=1):
            for group in trainer.optimizer.param_groups:
                group["lr"] = float(rate) * group.get("lr_scale", 1.0)
            loss, _, size = trainer.backward(batch)
            trainer.update()
            # Of all processes, so that they stop at the same rate.
            total, count = trainer.ranks.total([loss.item(), float(size)])
            value = total / count if count else math.inf
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            smooth = mean / (1 - SMOOTHING**number)
            tried.append(float(rate))
            losses.append(smooth)
            bar.advance(f"{rate:.1e}: {smooth:.3f}")
            if not math.isfinite(smooth) or smooth > 4 * min(losses):
                break
    finite = [(rate, loss) for rate, loss in zip(tried, losses, strict=True) if math.isfinite(loss)]
    best = int(np.argmin([loss for _, loss in finite]))
    slopes = np.gradient(np.array([loss for _, loss in finite[: best + 1]])) if best >= 1 else np.zeros(1)
    suggestion = finite[int(np.argmin(slopes))][0]
    if run.ranks.main:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("learning_rate", "loss"), *zip(tried, losses, strict=True)])
        write_text(run.folder / "learning_rate.csv", text.getvalue())
        write_atomically(run.folder / "learning_rate.png", lambda file: _draw(tried, losses, suggestion, file))
    run.output.line(
        f"the loss falls fastest at {suggestion:.1e} and is lowest at {finite[best][0]:.1e} "
        f"(curve: {run.folder / 'learning_rate.png'})"
    )
    run.output.line(f"try --set optimizer.learning_rate={suggestion:.1e}")
    return suggestion


def _draw(rates: Sequence[float], losses: Sequence[float], suggestion: float, file: BinaryIO) -> None:
    """The smoothed loss over the rates, as a PNG image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses)
    axes.axvline(suggestion, linestyle="--", color="grey", label=f"falls fastest at {suggestion:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss")
    axes.legend()
    figure.savefig(file, format="png", dpi=100)


def _epochs(trainer: Any) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    for epoch in itertools.count():
        trainer.batches.set_epoch(epoch)
        yield trainer.batches

"""The training loop of one fold, with exact resume.

Everything that the next update depends on is in the checkpoint, so training on from one gives bit for bit what an
uninterrupted run gives on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cellops.models.training.checkpoint import (
    BEST,
    FORMAT,
    CheckpointError,
    latest_checkpoint,
    made_of,
    save_checkpoint,
    save_weights,
)
from cellops.models.training.console import Bar, Output
from cellops.models.training.log import RunLog
from cellops.models.training.metrics import LOWER_IS_BETTER
from cellops.models.training.mixing import mix
from cellops.models.training.network import (
    Logits,
    WithFeatures,
    autocast,
    place,
    predict_batches,
    try_out,
    unused_parameters,
)
from cellops.models.training.optim import MovingAverage, build_optimizer, build_schedule
from cellops.models.training.randomness import random_state, seed_everything, set_random_state
from cellops.models.training.ranks import Ranks
from cellops.models.training.settings import Recipe
from cellops.models.training.stopping import SECOND_SIGNAL, Interrupted, Stopping

# Of the present epoch, over the images of one process.
SUMS = ("loss_sum", "correct", "seen")


class NonFiniteLoss(RuntimeError):
    """Too many batches in a row gave a NaN or infinite loss."""


@dataclass
class Progress:
    """Where training stands; part of the checkpoint."""

    epoch: int = 0  # epochs that are complete
    step: int = 0  # batches of the present epoch that are done
    updates: int = 0
    loss_sum: float = 0.0  # of the present epoch, over `seen` images
    correct: float = 0.0
    seen: float = 0.0
    epoch_updates: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    non_finite: int = 0  # batches left out, in all
    non_finite_in_row: int = 0
    best_epoch: int = 0  # 0: none yet
    best_value: float = -math.inf
    best_loss: float = math.inf
    stopped: str = ""  # why training ended before its last epoch


class Trainer:
    """Trains one model on one fold.

    Args:
        recipe: all settings.
        model: on the CPU.
        criterion: `forward(logits, targets, features)`, a scalar.
        batches: the training part, a `BatchLoader`.
        validation: the part that chooses the epoch, or None.
        labels: of all samples of the data set, [number of samples].
        classes: K.
        ids: of all samples; named where a batch is left out.
        facts: goes into the header of the exported weights.
        folder: where the log and `checkpoints/` go.
        output: where lines and the progress bar go.
        ranks: the processes.
        activation: see `network.probabilities`.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        criterion: nn.Module,
        batches: Any,
        validation: Any | None,
        labels: np.ndarray,
        classes: int,
        ids: Sequence[str],
        facts: Mapping[str, Any],
        folder: Path,
        output: Output,
        ranks: Ranks,
        activation: str = "softmax",
    ) -> None:
        settings = recipe.training
        self.recipe, self.settings, self.model, self.classes = recipe, settings, model, classes
        self.batches, self.validation, self.labels, self.ids = batches, validation, labels, ids
        self.facts, self.folder, self.output, self.ranks = dict(facts), folder, output, ranks
        self.activation = activation
        learned = [(ids[index], int(labels[index])) for index in batches.indices]
        self.made_of = made_of(recipe.seed, facts.get("classes", classes), learned)
        self.criterion = criterion.to(ranks.device)
        self._place_networks(bool(getattr(criterion, "needs_features", False)))
        self.mixing = recipe.mixing if recipe.mixing.mixup > 0 or recipe.mixing.cutmix > 0 else None
        self.optimizer = build_optimizer(recipe.optimizer, model)
        self.updates_per_epoch = math.ceil(len(batches) / settings.accumulate)
        self.schedule = build_schedule(recipe.schedule, self.optimizer, settings.epochs, self.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision == "float16")
        self.buffers = [buffer for buffer in model.buffers() if buffer is not None]
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self.statistics = [one for norm in norms for one in (norm.running_mean, norm.running_var) if one is not None]
        self.call: Callable = torch.compile(self.network) if settings.compile else self.network
        self.progress = Progress()
        self.history: list[dict[str, Any]] = []
        self.log = RunLog(None)
        if ranks.rank:
            self._draw_apart(0)
        self.start = random_state()
        self.stopping = Stopping(grace=SECOND_SIGNAL if ranks.size > 1 else 0.0)
        self.saved_at = time.monotonic()
        self.saved_updates = 0

    def _place_networks(self, features: bool) -> None:
        """The network that trains, its moving average, and what is called to judge them, on the device."""
        model, settings, ranks = self.model, self.settings, self.ranks
        if settings.sync_batch_norm and ranks.size > 1:
            from cellops.models.training.sync_norm import synchronise

            if left := synchronise(model, ranks.device):
                self.output.line(f"warning: not synchronised over the processes: {', '.join(left)}", style="yellow")
        if settings.channels_last and not ranks.sharded:  # parts of weights know no layout
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not ranks.sharded:
            model.to(ranks.device)
        self.ema = None if settings.ema is None else MovingAverage(model, decay=settings.ema, use_warmup=True)
        network = WithFeatures(model, features)
        self.unused: list[str] = []
        if ranks.size > 1 and not ranks.sharded:
            size = self.recipe.data.input_size
            images = place(torch.zeros(1, 3, *size), ranks.device, settings.channels_last)
            try_out(model.eval(), self.recipe.model.name, images, self.recipe.model.outputs or self.classes)
            self.unused = unused_parameters(network, self.criterion, size, self.classes, ranks.device)
        self.network = ranks.wrap(network, bool(self.unused))
        self.judged = self.evaluated
        if ranks.sharded:  # only what was wrapped puts the parts together
            average = None if self.ema is None else ranks.wrap(WithFeatures(self.ema.module, False))
            self.judged = Logits(self.network if average is None else average)

    def _draw_apart(self, updates: int) -> None:
        """Random numbers of this process's own, such as dropout's."""
        seed_everything(int(np.random.SeedSequence((self.recipe.seed, self.ranks.rank, updates)).generate_state(1)[0]))

    def open_log(self) -> None:
        """Begin to write into the folder."""
        self.log = RunLog(self.folder if self.ranks.main else None, self.settings.tensorboard)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def evaluated(self) -> nn.Module:
        """The model whose weights count: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.progress.epoch >= self.settings.epochs or bool(self.progress.stopped)

    def state(self) -> dict[str, Any]:
        """Everything that the next update depends on, weights as one process has them; every process has to call it."""
        progress = asdict(self.progress)
        own = {"random": random_state(), "sums": {name: progress.pop(name) for name in SUMS}}
        return {
            "format": FORMAT,
            "made_of": self.made_of,
            "progress": progress,
            "processes": self.ranks.collect(own),
            "history": self.history,
            "model": self.ranks.whole(self.model.state_dict()),
            "ema": None if self.ema is None else self.ranks.whole(self.ema.module.state_dict()),
            "optimizer": self.ranks.whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
        }

    def save(self) -> None:
        """Write a checkpoint; every process has to call it."""
        state = self.state()
        if self.ranks.main:
            save_checkpoint(self.checkpoints, state, self.settings.keep_previous)
        self.ranks.wait()  # a launcher ends all processes when one leaves, the one that writes too
        self.saved_at, self.saved_updates = time.monotonic(), self.progress.updates

    def save_weights(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the weights that count, as one process has them; every process has to call it."""
        weights = self.ranks.whole(self.evaluated.state_dict())
        if self.ranks.main:
            save_weights(path, weights, facts)

    def resume(self) -> bool:
        """Go on from the newest checkpoint that is whole; False if there is none yet.

        Raises:
            CheckpointError: there are checkpoints and none can be read, or they are of another run or network.
        """
        state, problems = latest_checkpoint(self.checkpoints, self.made_of)
        for problem in problems:
            self.output.line(f"warning: {problem}; going on from the one before", style="yellow")
        self.log.restore([] if state is None else state["history"])
        if state is None:
            return False
        try:
            self._load(state)
        except (RuntimeError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.checkpoints} is of another network or optimizer: {error}"
            ) from None
        self.scaler.load_state_dict(state["scaler"])
        self.history = list(state["history"])
        self._resume_process(state["progress"], state["processes"])
        self.saved_updates = self.progress.updates
        done = self.progress
        self.log.event("resumed", epoch=done.epoch + 1, step=done.step)
        if not self.finished:
            self.output.line(f"resumed at epoch {done.epoch + 1}, batch {done.step} of {len(self.batches)}")
        return True

    def _load(self, state: Mapping[str, Any]) -> None:
        """Put weights, average and optimizer back."""
        model, ema, optimizer = state["model"], state["ema"], state["optimizer"]
        if self.ranks.sharded:
            from cellops.models.training.sharding import spread_optimizer, spread_weights

            model = spread_weights(model, self.model.state_dict())
            ema = None if self.ema is None else spread_weights(ema, self.ema.module.state_dict())
            optimizer = spread_optimizer(optimizer, self.optimizer)
        self.model.load_state_dict(model)
        if self.ema is not None:
            self.ema.module.load_state_dict(ema)
        self.optimizer.load_state_dict(optimizer)

    def _resume_process(self, progress: Mapping[str, Any], processes: Sequence[Mapping[str, Any]]) -> None:
        """Progress and random numbers of this process; where there were more or fewer, not those it would have had."""
        rank = self.ranks.rank
        if len(processes) == self.ranks.size:
            sums = processes[rank]["sums"]
        else:
            whole = {name: sum(one["sums"][name] for one in processes) for name in SUMS}
            sums = whole if self.ranks.main else dict.fromkeys(SUMS, 0.0)
            told = f"note: {self.ranks.size} processes go on with what {len(processes)} began"
            self.output.line(f"{told}: not the same to the last bit")
        self.progress = Progress(**progress, **sums)
        if rank < len(processes):
            set_random_state(processes[rank]["random"])
        else:
            self._draw_apart(self.progress.updates)

    def run(self, stop_after: int | None = None, deadline: float | None = None) -> bool:
        """Train until the last epoch.

        Args:
            stop_after: leave after so many epochs of this call.
            deadline: leave when `time.monotonic()` is past it, in the middle of an epoch too.

        Returns:
            Whether training is complete; if not, a checkpoint holds what there is.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint holds what there is.
            NonFiniteLoss: `non_finite_limit` batches in a row.
            CheckpointError: a file could not be written.
        """
        first = self.progress.epoch
        if self.progress.updates == 0 and self.progress.step == 0 and first == 0:
            set_random_state(self.start)  # whatever was drawn since the model was made
        with self.stopping.listen():
            while not self.finished:
                if stop_after is not None and self.progress.epoch - first >= stop_after:
                    return False
                if not self._train_epoch(deadline):
                    return False
                self._end_epoch()
        self.log.close()
        return True

    def _train_epoch(self, deadline: float | None) -> bool:
        """Train the rest of the present epoch; False if the deadline came first."""
        progress, settings = self.progress, self.settings
        self.network.train()
        self.batches.set_epoch(progress.epoch)
        title = f"epoch {progress.epoch + 1}/{settings.epochs}"
        pending: list[tuple[Tensor, Tensor, int]] = []
        clock = time.monotonic()
        with self.output.bar(title, len(self.batches), progress.step) as bar:
            for batch in self.batches.batches_from(progress.step):
                pending.append(self.backward(batch))
                progress.step += 1
                whole = progress.step == len(self.batches)
                if progress.step % settings.accumulate and not whole:
                    continue
                self.update()
                self._count(pending, bar)
                pending = []
                now = time.monotonic()
                progress.epoch_seconds += now - clock
                clock = now
                if self._pause(whole, deadline is not None and now > deadline):
                    return False
        return True

    def _pause(self, whole: bool, late: bool) -> bool:
        """Checkpoint within the epoch if it is time, someone wants to stop or it is late; True if it is late.

        What one process finds holds for all of them, as each has a part in a checkpoint.
        """
        every = self.settings.checkpoint_updates
        due = every is not None and self.progress.updates - self.saved_updates >= every
        due = due or time.monotonic() - self.saved_at >= self.settings.checkpoint_seconds
        stop, due, late = self.ranks.any_true(self.stopping.asked, due and not whole, late and not whole)
        if stop or due or late:
            self.save()
        if stop:
            raise Interrupted(f"stopped in epoch {self.progress.epoch + 1}, after batch {self.progress.step}")
        return late

    def _group(self) -> int:
        """How many batches share the present update; the last ones of an epoch may be fewer."""
        accumulate, step = self.settings.accumulate, self.progress.step
        return min(accumulate, len(self.batches) - step // accumulate * accumulate)

    def backward(self, batch: Any) -> tuple[Tensor, Tensor, int]:
        """Add the gradients of a batch; returns its loss, how many it got right and its size, all 0 if left out."""
        targets = batch.targets.to(self.ranks.device)
        images, wanted = place(batch.images, self.ranks.device, self.settings.channels_last), targets
        if self.mixing is not None:
            draw = (self.recipe.seed, self.progress.epoch, self.progress.step, self.ranks.rank)
            images, wanted = mix(images, targets, self.classes, self.mixing, draw)
        if self.buffers:
            torch._foreach_copy_(self.buffers_before, self.buffers)
        with autocast(self.ranks.device, self.settings.precision):
            logits, features = self.call(images)
            loss = self.criterion(logits.float(), wanted, None if features is None else features.float())
        if not self.ranks.all_true(bool(torch.isfinite(loss))):
            self._leave_out(f"the loss is {loss.item()}", batch)
            return torch.zeros(()), torch.zeros(()), 0
        self.scaler.scale(loss / self._group()).backward()
        with torch.no_grad():
            found = logits.argmax(1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
            return loss.detach() * len(targets), (found == targets).sum(), len(targets)

    def _leave_out(self, reason: str, batch: Any | None) -> None:
        """Forget a batch: the running statistics are as before it, nothing was added to the gradients."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.buffers_before)
        if self.ranks.sharded:  # the backward pass would have; what is whole hides the gradients of batches before
            self.network.reshard()
        progress = self.progress
        progress.non_finite += 1
        progress.non_finite_in_row += 1
        ids = [] if batch is None else [self.ids[index] for index in batch.index.tolist()]
        self.log.event("non_finite", epoch=progress.epoch + 1, step=progress.step, reason=reason, ids=ids)
        self.output.line(
            f"warning: epoch {progress.epoch + 1}, batch {progress.step + 1} left out: {reason}"
            + (f" ({', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''})" if ids else ""),
            style="yellow",
        )
        if progress.non_finite_in_row >= self.settings.non_finite_limit:
            raise NonFiniteLoss(
                f"{progress.non_finite_in_row} batches in a row were left out, the last because {reason}. Look at "
                "the images named in log.jsonl, or start anew with a lower optimizer.learning_rate or with "
                "training.clip; the checkpoint is from before these batches"
            )

    def update(self) -> None:
        """One step of optimizer, schedule and moving average, if the gradients are finite."""
        self.scaler.unscale_(self.optimizer)
        known = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        parameters = [parameter for parameter in known if parameter.grad is not None]
        if not parameters:  # every batch of the group was left out
            return
        limit = math.inf if self.settings.clip is None else self.settings.clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        finite = math.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not finite and not self.scaler.is_enabled():
            self._leave_out("the gradient is not finite", None)
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ranks.average(self.statistics)
        if not finite:
            return
        self.progress.non_finite_in_row = 0
        self.progress.updates += 1
        self.progress.epoch_updates += 1
        self.schedule.step_update(self.progress.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=self.progress.updates)

    def _count(self, pending: list[tuple[Tensor, Tensor, int]], bar: Bar) -> None:
        """Add what the batches of an update gave to the epoch's sums; here, because it waits for the device."""
        for loss, correct, size in pending:
            if size:
                self.progress.loss_sum += loss.item()
                self.progress.correct += correct.item()
                self.progress.seen += size
        seen = max(self.progress.seen, 1)
        bar.advance(f"loss {self.progress.loss_sum / seen:.4f}", len(pending))

    def _validate(self) -> tuple[float, float, dict[str, float]]:
        """The monitored value (higher is better), the loss and the metrics on the validation part."""
        from cellops.models.training.evaluate import quick_metrics

        assert self.validation is not None
        indices, found = predict_batches(
            self.judged,
            self.validation,
            self.ranks.device,
            self.activation,
            precision=self.settings.precision,
            channels_last=self.settings.channels_last,
            sharded=self.ranks.sharded,
        )
        wanted = np.asarray(self.validation.indices)
        found = self.ranks.gather(indices, found, wanted)
        metrics = quick_metrics(found, self.labels[wanted], self.settings.monitor)
        value = metrics[self.settings.monitor]
        return -value if self.settings.monitor in LOWER_IS_BETTER else value, metrics["loss"], metrics

    def _end_epoch(self) -> None:
        """Validate, keep the weights if they are the best, log and checkpoint."""
        progress = self.progress
        clock = time.monotonic()
        loss_sum, correct, seen = self.ranks.total([progress.loss_sum, progress.correct, progress.seen])
        row: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "loss": loss_sum / seen if seen else math.nan,
            "accuracy_micro": correct / seen if seen else math.nan,
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),  # with layer_decay: the head's
            "non_finite": progress.non_finite,
        }
        better = False
        if self.validation is not None:
            value, loss, metrics = self._validate()
            row |= {f"validation_{name}": number for name, number in metrics.items()}
            finite = math.isfinite(value) and math.isfinite(loss) and progress.epoch_updates > 0
            better = finite and (value, -loss) > (progress.best_value, -progress.best_loss)
            if better:
                progress.best_epoch, progress.best_value, progress.best_loss = progress.epoch + 1, value, loss
                facts = {**self.facts, "epoch": progress.epoch + 1, "validation": metrics}
                self.save_weights(self.checkpoints / BEST, facts)
            patience = self.settings.patience
            if patience is not None and progress.epoch + 1 - progress.best_epoch >= patience:
                progress.stopped = f"no better {self.settings.monitor} for {patience} epochs"
        progress.epoch_seconds += time.monotonic() - clock
        row["seconds"] = round(progress.epoch_seconds, 3)
        progress.seconds += progress.epoch_seconds
        self.history.append(row)
        progress.epoch += 1
        progress.step, progress.epoch_updates, progress.epoch_seconds = 0, 0, 0.0
        progress.loss_sum = progress.correct = progress.seen = 0.0
        self.save()
        self.log.epoch(row)
        self.output.line(self._epoch_line(row, better))
        if progress.stopped:
            self.output.line(f"stopped after epoch {progress.epoch}: {progress.stopped}")
        if self.ranks.any_true(self.stopping.asked)[0] and not self.finished:
            raise Interrupted(f"stopped after epoch {progress.epoch}")

    def _epoch_line(self, row: Mapping[str, Any], better: bool) -> str:
        text = (
            f"epoch {row['epoch']:>3}/{self.settings.epochs}  loss {row['loss']:.4f}  "
            f"accuracy {row['accuracy_micro']:.2%}"
        )
        if self.validation is not None:
            text += f"  |  validation: loss {row['validation_loss']:.4f}  "
            text += f"accuracy {row['validation_accuracy_micro']:.2%}"
        return f"{text}  {row['seconds']:.1f} s{'  *' if better else ''}"

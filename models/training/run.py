"""A run: a folder with everything that a recipe leaves behind, made fold by fold and resumed where it stopped.

RUN/recipe.yaml            every setting, defaults written out
RUN/environment.json       versions, machine, command, commit; one entry for each time it was started
RUN/run.json               classes and data set
RUN/folds_PROTOCOL.json    which image is in which part, with hashes of the files
RUN/report.html, results.json
RUN/[PROTOCOL/][fold_N/]   log.csv, log.jsonl, checkpoints/, weights.safetensors, predictions.csv, metrics.json,
                           mistakes/
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cellops.models.data import CellData, Fold, Folds
from cellops.models.training import parts as parts_module
from cellops.models.training.checkpoint import BEST, load_weights, read_weights, save_weights, write_text
from cellops.models.training.console import Output
from cellops.models.training.environment import environment
from cellops.models.training.evaluate import plain, quick_metrics
from cellops.models.training.folder import free_folder, is_taken, lock
from cellops.models.training.loop import Trainer
from cellops.models.training.network import classifier_tensors, try_out
from cellops.models.training.notes import look_alikes, start_note, unused_note
from cellops.models.training.optim import warmup_epochs
from cellops.models.training.parts import Batches, Part, class_weights, cut, parts, read_data
from cellops.models.training.randomness import seed_everything
from cellops.models.training.ranks import Ranks
from cellops.models.training.recipe import (
    RecipeError,
    build_recipe,
    dump_recipe,
    load_recipe,
    overridden,
    recipe_names,
    recipe_values,
)
from cellops.models.training.results import judge, result_lines, summarize
from cellops.models.training.settings import Recipe

WEIGHTS = "weights.safetensors"
METRICS = "metrics.json"

# What may differ when a run is resumed: nothing that changes the numbers, and the number of epochs.
MAY_CHANGE = (
    "data.path",  # images are known by their hashes, wherever they lie
    "training.epochs",
    "training.workers",
    "training.device",
    "training.distributed",
    "training.threads",
    "training.checkpoint_seconds",
    "training.checkpoint_updates",
    "training.keep_previous",
    "training.tensorboard",
    "evaluation",
    "title",
    "setting",
    "notes",
)


def activation(recipe: Recipe) -> str:
    """How logits become probabilities; see `network.probabilities`."""
    return "sigmoid" if recipe.loss.get("name") == "bce" else "softmax"


def build_model(recipe: Recipe, classes: Sequence[str]) -> nn.Module:
    """The network of a recipe.

    Raises:
        ValueError: the name or an argument is wrong, or its pretrained weights cannot be had.
        CheckpointError: the file of weights to start from is damaged or of another network.
    """
    from cellops.models import create_model

    settings = recipe.model
    outputs = len(classes) if settings.outputs is None else settings.outputs
    if outputs != len(classes) and not (outputs == 1 and len(classes) == 2):
        raise RecipeError(
            f"model.outputs is {outputs}, but the data has {len(classes)} classes ({', '.join(classes)}); "
            "join classes with data.options.classes, or leave model.outputs out"
        )
    try:
        model = create_model(settings.name, num_classes=outputs, pretrained=settings.pretrained, **settings.arguments)
    except RuntimeError as error:
        if not settings.pretrained:
            raise
        twin, anew = f"{recipe.name}_scratch", "--set model.pretrained=false"
        raise RecipeError(
            f"{error}. Train from scratch with {f'--recipe {twin}' if twin in recipe_names() else anew}, or start "
            f"from a file of weights with {anew} --set model.weights=FILE.safetensors"
        ) from None
    except TypeError as error:
        raise RecipeError(f"model.arguments do not fit {settings.name}: {error}") from None
    if settings.weights is not None:
        load_weights(model, Path(settings.weights), classifier_tensors(model))
    return model


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The keys whose values differ, but for those of MAY_CHANGE."""
    if where in MAY_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in sorted({*old, *new})
            for text in _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if old == new else [f"{where} was {old!r}, is now {new!r}"]


class Run:
    """A run that is ready to be trained; see `prepare`.

    Args:
        recipe: all settings.
        folder: of the run.
        data: without the images that cannot be read.
        folds: by protocol.
        batches: makes the loaders.
        output: where lines go.
        ranks: the processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: CellData,
        folds: dict[str, Folds],
        batches: Batches,
        output: Output,
        ranks: Ranks,
    ) -> None:
        self.recipe, self.folder, self.data, self.folds = recipe, folder, data, folds
        self.batches, self.output, self.ranks = batches, output, ranks
        self.parts: list[Part] = parts(folds, folder)
        self.notes: list[str] = []
        self.lock: Any = None
        self._first: Trainer | None = None

    def fold(self, part: Part) -> Fold:
        """Which images a part trains, chooses and tests with."""
        return self.folds[part.protocol].folds[part.number]

    def done(self, part: Part) -> bool:
        """Whether a part has its results."""
        return (part.folder / METRICS).is_file()

    def facts(self, part: Part) -> dict[str, Any]:
        """What is written into the header of the weights: enough to predict with them alone."""
        return {
            "recipe": recipe_values(self.recipe),
            "classes": list(self.data.classes),
            "data": self.data.name,
            "synthetic": self.data.synthetic,
            "protocol": part.protocol,
            "fold": part.number + 1,
        }

    def trainer(self, part: Part) -> Trainer:
        """A fresh trainer of a part."""
        from cellops.models.training.losses import build_loss

        seed = self.recipe.seed + 1000 * part.number
        seed_everything(seed)
        fold, labels, classes = self.fold(part), self.data.labels, len(self.data.classes)
        model = build_model(self.recipe, self.data.classes)
        batches = self.batches.training(fold, seed)
        if len(batches) == 0:
            raise RecipeError(
                f"no batch of {self.recipe.training.batch_size} fits into {len(fold.train)} training images: "
                "lower training.batch_size"
            )
        weights = None
        if self.recipe.training.class_weights:
            weights = torch.tensor(class_weights(fold.train, labels, classes), dtype=torch.float32)
        outputs = self.recipe.model.outputs or classes
        criterion = build_loss(self.recipe.loss, outputs, weights)
        if getattr(criterion, "needs_features", False) and not hasattr(model, "forward_features"):
            name = self.recipe.loss["name"]
            raise RecipeError(f"loss {name} needs features: {self.recipe.model.name} has no forward_features")
        mixing = self.recipe.mixing
        if getattr(criterion, "needs_features", False) and (mixing.mixup > 0 or mixing.cutmix > 0):
            raise RecipeError("mixing: mixed images belong to no class, so no triplets can be made of them")
        if outputs == 1 and (mixing.mixup > 0 or mixing.cutmix > 0):
            raise RecipeError("mixing: needs one logit a class, but model.outputs is 1")
        return Trainer(
            self.recipe,
            model,
            criterion,
            batches,
            self.batches.evaluation(fold.validation) if fold.validation else None,
            labels,
            classes,
            [sample.id for sample in self.data.samples],
            self.facts(part),
            part.folder,
            self.output,
            self.ranks,
            activation(self.recipe),
        )

    def check(self) -> None:
        """Build what the first part needs, so that whatever does not fit shows before a file is written."""
        classes = len(self.data.classes)  # of which some metrics are, as those of two classes
        quick_metrics(np.eye(classes), np.arange(classes), self.recipe.training.monitor)
        self._first = self.trainer(self.parts[0])
        images = torch.zeros(1, 3, *self.recipe.data.input_size, device=self.ranks.device)
        name, outputs = self.recipe.model.name, self.recipe.model.outputs or classes
        try_out(self._first.judged.eval(), name, images, outputs)
        if self.recipe.model.weights is not None:
            path = Path(self.recipe.model.weights)
            self.notes.append(start_note(self._first.model, path, classifier_tensors(self._first.model)))
        if self._first.unused:
            self.notes.append(unused_note(self._first.unused))

    def train(self, stop_after: int | None = None, deadline: float | None = None, parts: int | None = None) -> bool:
        """Train and evaluate what is left, then write the report.

        Args:
            stop_after: leave each part after so many epochs of this call.
            deadline: leave when `time.monotonic()` is past it.
            parts: look only at the first so many.

        Returns:
            Whether the run is complete.

        Raises:
            Interrupted, NonFiniteLoss, CheckpointError: see `Trainer.run`.
        """
        schedule, epochs = self.recipe.schedule, self.recipe.training.epochs
        if (warmup := warmup_epochs(schedule, epochs)) < schedule.warmup_epochs:
            self.output.line(
                f"note: {epochs} epochs are few, so {warmup:g} of them warm up, not {schedule.warmup_epochs:g}"
            )
        complete = parts is None or parts >= len(self.parts)
        for part in self.parts[:parts]:
            if self.done(part):
                continue
            if self.ranks.any_true(deadline is not None and time.monotonic() > deadline)[0]:
                complete = False
                break
            if len(self.parts) > 1:
                self.output.line(f"{part.title}: {len(self.fold(part).train)} images", style="bold")
            complete = self._train_part(part, stop_after, deadline) and complete
        if self.ranks.main:
            summary = summarize(self)
            if complete:
                for line in result_lines(summary):
                    self.output.line(line, style="bold green")
                self.report()
        return complete

    def _train_part(self, part: Part, stop_after: int | None, deadline: float | None) -> bool:
        trainer = self._first if self._first is not None and part == self.parts[0] else self.trainer(part)
        self._first = None
        trainer.open_log()
        trainer.resume()
        if not trainer.run(stop_after, deadline):
            return False
        keep = self.recipe.training.select
        best = keep == "best" or (keep == "auto" and trainer.validation is not None)
        best = best and trainer.progress.best_epoch > 0
        kept_epoch = trainer.progress.best_epoch if best else trainer.progress.epoch
        facts = {**self.facts(part), "epoch": kept_epoch}
        if not best:
            trainer.save_weights(part.folder / WEIGHTS, facts)
        elif self.ranks.main:
            save_weights(part.folder / WEIGHTS, read_weights(trainer.checkpoints / BEST)[0], facts)
        self.ranks.wait()
        model = trainer.evaluated if self.ranks.size == 1 else self._whole_model()
        load_weights(model, part.folder / WEIGHTS)
        fold = self.fold(part)
        training = {
            "epochs": trainer.progress.epoch,
            "kept_epoch": kept_epoch,
            "kept": "best on the validation part" if best else "last",
            "stopped": trainer.progress.stopped,
            "updates": trainer.progress.updates,
            "left_out_batches": trainer.progress.non_finite,
            "seconds": round(trainer.progress.seconds, 2),
            "images": {
                "train": len(trainer.batches.indices),
                "validation": len(fold.validation),
                "test": len(fold.test),
            },
        }
        judge(self, part, model, training)
        return True

    def _whole_model(self) -> nn.Module:
        """The network as one process has it, to be judged without the others."""
        untrained = replace(self.recipe.model, pretrained=False, weights=None)
        return build_model(replace(self.recipe, model=untrained), self.data.classes)

    def report(self) -> Path:
        """Write report.html from the run's files and return its path."""
        from cellops.models.report import write_report

        path = write_report(self.folder)
        self.output.line(f"report: {path}")
        return path

    def resume_command(self) -> str:
        """What to type to go on."""
        return f"cellops train --resume --output {shlex.quote(str(self.folder))}"


def _write_facts(run: Run) -> None:
    """Recipe, environment and data of the run; the environment keeps earlier starts."""
    folder, data = run.folder, run.data
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "environment.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        starts = []
    write_text(path, json.dumps([*starts, plain(environment())], indent=1))
    write_text(folder / "recipe.yaml", dump_recipe(run.recipe))
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        told = before["notes"]  # of the first start, which looked for copies
    except (OSError, ValueError, KeyError):
        told = []
    notes = [*data.notes, *(note for folds in run.folds.values() for note in folds.notes), *run.notes, *told]
    facts = {
        "name": run.recipe.name,
        "data": data.name,
        "path": run.recipe.data.path,
        "synthetic": data.synthetic,
        "grouped": data.grouped,
        "prescribed": run.recipe.data.prescribed and data.prescribed,
        "classes": list(data.classes),
        "images": data.class_counts,
        "notes": list(dict.fromkeys(notes)),
        "protocols": parts_module.protocols(run.recipe.data),
        "parts": [
            {"protocol": part.protocol, "fold": part.number + 1, "folder": str(part.folder.relative_to(folder))}
            for part in run.parts
        ],
    }
    write_text(folder / "run.json", json.dumps(plain(facts), indent=1, ensure_ascii=False))


def _whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with paths that hold in every working directory."""

    def whole(path: str | None) -> str | None:
        return path if path in (None, "synthetic") else str(Path(path).expanduser().resolve())

    data = replace(recipe.data, path=whole(recipe.data.path))
    return replace(recipe, data=data, model=replace(recipe.model, weights=whole(recipe.model.weights)))


def _resumed_recipe(recipe: Recipe | None, folder: Path, overrides: Sequence[str]) -> Recipe:
    """The recipe of an unfinished run, with what may be changed about it."""
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"there is no run to resume in {folder}: it has no recipe.yaml")
    stored = _whole_paths(load_recipe(folder / "recipe.yaml"))
    wanted = _whole_paths(load_recipe(folder / "recipe.yaml", overrides) if recipe is None else recipe)
    if recipe is not None and recipe.data.path is None:
        wanted = replace(wanted, data=replace(wanted.data, path=stored.data.path))
    different = _differences(recipe_values(stored), recipe_values(wanted))
    if different:
        raise ValueError(
            f"the run in {folder} was started with other settings: {'; '.join(different)}. "
            "Leave these out to resume it, or choose another --output"
        )
    done = [path.parent for path in folder.rglob(METRICS) if (path.parent / WEIGHTS).is_file()]
    for key, old, new in (
        ("training.epochs", stored.training.epochs, wanted.training.epochs),
        ("evaluation", stored.evaluation, wanted.evaluation),
    ):
        if done and old != new:
            raise ValueError(
                f"{done[0]} is done, by {key} {old!r}, not {new!r}: its results would not be those of the recipe. "
                "Leave that out, or choose another --output"
            )
    return wanted


def prepare(
    recipe: Recipe | None,
    folder: Path | str | None = None,
    resume: bool = False,
    output: Output | None = None,
    overrides: Sequence[str] = (),
    data: CellData | None = None,
) -> Run:
    """Read the data, make or reload the folds, and check that every part can be built, before anything is trained.

    Args:
        recipe: the settings; None takes those of the run that is resumed.
        folder: of the run; `runs/NAME` if not given, or the first of NAME-2, NAME-3, ... that is free.
        resume: go on with the run in `folder`.
        output: where lines go.
        overrides: further settings for a run that is resumed without a recipe.
        data: what `read_data` returned for the same settings, to be spared the reading.

    Raises:
        ValueError: something cannot be used; the text says what would do. Nothing was written then.
    """
    if recipe is None and not resume:
        raise RecipeError("no recipe given: --recipe NAME, see `cellops recipes`")
    output = output or Output()
    default = Path("runs") / recipe.name if recipe else None
    if folder is None and default is None:
        raise RecipeError("--resume needs to know the run: --output runs/NAME")
    folder = Path(folder or default or "")
    if resume:
        recipe = _resumed_recipe(recipe, folder, overrides)
    assert recipe is not None
    ranks = Ranks(recipe.training.device, recipe.training.distributed)
    if not ranks.main:
        output = Output(quiet=True)
    if ranks.size > 1 and not resume and folder == default:
        raise RecipeError("several processes must agree on a folder: --output runs/NAME")
    if not resume and folder == default and (free := free_folder(folder)) != folder:
        output.line(f"{folder} is taken, this run goes to {free} (--resume goes on with {folder})")
        folder = free
    if not resume and ranks.any_true(is_taken(folder))[0]:  # every process looks before the first one writes
        raise ValueError(f"{folder} is not empty: --resume goes on with the run in it, or choose another --output")
    recipe = build_recipe(recipe_values(recipe))
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    recipe = _whole_paths(recipe)
    data = data or read_data(recipe.data, output)
    folds = {}
    for protocol in parts_module.protocols(recipe.data):
        file = folder / f"folds_{protocol}.json"
        folds[protocol] = Folds.load(file, data) if resume and file.is_file() else cut(data, recipe, protocol)
    batches = Batches.open(recipe, data, output, ranks.rank, ranks.size)
    run = Run(recipe, folder, data, folds, batches, output, ranks)
    run.check()
    if ranks.main and not resume and not data.synthetic:
        run.notes += look_alikes(run.batches.store, run.folds)
    if ranks.main:
        run.lock = lock(folder)
        for protocol, cut_folds in folds.items():
            if not (folder / f"folds_{protocol}.json").is_file():
                cut_folds.save(folder / f"folds_{protocol}.json")
        _write_facts(run)
    ranks.wait()
    return run


def train(
    recipe: Recipe | str,
    data: str | Path | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Train a recipe to the end, from Python.

    Args:
        recipe: a name, a file or a `Recipe`.
        data: a folder, or "synthetic".
        folder: of the run.
        resume: go on with the run in `folder`.
        overrides: such as "training.epochs=5".
        quiet: print nothing.

    Returns:
        The run; its `folder` holds the results.
    """
    loaded = overridden(recipe, overrides) if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if data is not None:
        loaded = replace(loaded, data=replace(loaded.data, path=str(data)))
    run = prepare(loaded, folder, resume, Output(quiet))
    run.train()
    return run

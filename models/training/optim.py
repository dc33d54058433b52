"""Optimizers and learning-rate schedules, made by timm's factories."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn

from cellops.models.training.recipe import RecipeError, nearest
from cellops.models.training.settings import OptimizerSettings, ScheduleSettings

# timm's "sgd" is the Nesterov variant and its "momentum" the plain one; here sgd means what papers mean by it.
NAMES = {
    "sgd": "momentum",
    "nesterov": "sgd",
    "adam": "adam",
    "adamp": "adamp",
    "nadam": "nadam",
    "adamw": "adamw",
    "nadamw": "nadamw",
    "rmsprop": "rmsprop",
    "lamb": "lamb",
}
WITH_MOMENTUM = ("sgd", "nesterov", "rmsprop")


def build_optimizer(settings: OptimizerSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the parameters of a model that want a gradient.

    Raises:
        RecipeError: the name or an argument is unknown.
    """
    if settings.name not in NAMES:
        raise RecipeError(f"optimizer.name: {settings.name!r} is not known, {nearest(settings.name, NAMES)}")
    arguments = dict(settings.arguments)
    for key in ("betas", "nus"):
        if key in arguments:
            arguments[key] = tuple(arguments[key])
    if settings.name in WITH_MOMENTUM:
        arguments["momentum"] = settings.momentum
    try:
        return create_optimizer_v2(
            model,
            opt=NAMES[settings.name],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            filter_bias_and_bn=not settings.decay_norm_and_bias,
            **arguments,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"optimizer: {settings.name} does not take these settings: {error}") from None


def build_schedule(
    settings: ScheduleSettings, optimizer: torch.optim.Optimizer, epochs: int, updates_per_epoch: int
) -> Scheduler:
    """The schedule of a recipe; it is stepped by `step_update(updates so far)`, a function of that number alone.

    Raises:
        RecipeError: the warm-up is longer than the training, or a multistep schedule has no milestones.
    """
    if settings.warmup_epochs >= epochs and settings.warmup_epochs > 0:
        raise RecipeError(
            f"schedule.warmup_epochs is {settings.warmup_epochs:g}, but training.epochs is {epochs}: "
            "warm up for less, or train longer"
        )
    if settings.name == "multistep" and not settings.milestones:
        raise RecipeError("schedule.milestones is empty: give the epochs where the learning rate falls")
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched={"constant": "multistep"}.get(settings.name, settings.name),
        num_epochs=epochs,
        decay_milestones=settings.milestones if settings.name == "multistep" else [],
        decay_rate=settings.gamma,
        min_lr=settings.minimum,
        warmup_lr=settings.warmup_learning_rate,
        warmup_epochs=settings.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    schedule.step_update(0)
    return schedule

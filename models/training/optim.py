"""Optimizers, made by timm's factory, and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]
from timm.utils.model_ema import ModelEmaV3
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


def warmup_epochs(settings: ScheduleSettings, epochs: int) -> float:
    """The epochs of warm-up; at most half of a training that was made short."""
    return min(settings.warmup_epochs, epochs / 2)


class Schedule:
    """Sets the learning rate of every parameter group as a function of the updates so far, and of nothing else.

    Linear warm-up from `warmup_learning_rate`; then constant, or a cosine from the first to the last update down to
    `minimum` (Loshchilov and Hutter 2017), or a factor `gamma` from each milestone on.

    Args:
        settings: which.
        optimizer: its present rates are the highest ones; a group's `lr_scale` multiplies what it gets.
        epochs: of the training.
        updates_per_epoch: of the optimizer.
    """

    def __init__(
        self, settings: ScheduleSettings, optimizer: torch.optim.Optimizer, epochs: int, updates_per_epoch: int
    ) -> None:
        self.settings, self.optimizer = settings, optimizer
        # timm's layer_decay leaves a factor in each group, and leaves it to the schedule to multiply by it.
        self.scales = [float(group.get("lr_scale", 1.0)) for group in optimizer.param_groups]
        self.highest = [float(group["lr"]) for group in optimizer.param_groups]
        self.total = epochs * updates_per_epoch
        self.warmup = warmup_epochs(settings, epochs) * updates_per_epoch
        self.milestones = [epoch * updates_per_epoch for epoch in settings.milestones]
        self.step_update(0)

    def rate(self, highest: float, update: int) -> float:
        """The learning rate after so many updates."""
        settings = self.settings
        if update < self.warmup:
            return settings.warmup_learning_rate + (highest - settings.warmup_learning_rate) * update / self.warmup
        if settings.name == "cosine":
            return settings.minimum + (highest - settings.minimum) * (1 + math.cos(math.pi * update / self.total)) / 2
        return highest * settings.gamma ** sum(milestone <= update for milestone in self.milestones)

    def step_update(self, update: int) -> None:
        """Set the rates after so many updates."""
        for group, highest, scale in zip(self.optimizer.param_groups, self.highest, self.scales, strict=True):
            group["lr"] = scale * self.rate(highest, update)


def build_schedule(
    settings: ScheduleSettings, optimizer: torch.optim.Optimizer, epochs: int, updates_per_epoch: int
) -> Schedule:
    """The schedule of a recipe.

    Raises:
        RecipeError: a multistep schedule has no milestones, or another one has some.
    """
    if (settings.name == "multistep") != bool(settings.milestones):
        raise RecipeError(
            "schedule.milestones: the epochs where the learning rate falls belong to the name multistep, "
            f"got {settings.milestones} for {settings.name}"
        )
    return Schedule(settings, optimizer, epochs, updates_per_epoch)


class MovingAverage(ModelEmaV3):
    """timm's moving average of weights and buffers, of the local parts where they are spread over processes."""

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move every tensor of the average towards the model's."""
        pairs = [
            (average.to_local(), value.to_local()) if hasattr(average, "to_local") else (average, value)
            for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True)
        ]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([pair[0] for pair in floating], [pair[1] for pair in floating], weight=1.0 - decay)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)

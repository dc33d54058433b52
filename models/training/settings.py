"""The keys of a recipe, as dataclasses: their names, types, defaults and what each means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataSettings:
    """Which images, how they are split and how they are stored."""

    path: str | None = None  # the folder; the command line's --data goes first
    layout: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of open_data (count, size, classes, ...)
    input_size: list[int] = field(default_factory=lambda: [224, 224])  # height, width that the network sees
    store_size: list[int] | None = None  # height, width that images are stored at; the input size if not given
    resize: Literal["squash", "crop", "pad"] = "squash"
    protocol: Literal["grouped", "paper", "both"] = "grouped"  # how folds are made; both gives two results
    prescribed: bool = True  # take the data set's own test part where it has one; there is one fold then
    folds: int = 1
    test_fraction: float | None = None  # of a single split (folds: 1); a fifth if not given
    validation: float = 0.0  # the part of the training images that chooses the epoch
    train_fraction: float = 1.0  # of the training images that is used, for learning curves
    split_seed: int | None = None  # of folds, validation part and train_fraction; the run's seed if not given
    unreadable: Literal["error", "skip"] = "error"


@dataclass
class ModelSettings:
    """Which network."""

    name: str = "shufflenet_v2_x1_0"
    pretrained: bool = False  # ImageNet weights; an error where there are none
    weights: str | None = None  # a .safetensors file to start from; its classifier may be of other classes
    outputs: int | None = None  # logits; 1 for two classes trained with one logit; the number of classes if not given
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class MixingSettings:
    """Mixup and CutMix, drawn once for each batch."""

    mixup: float = 0.0  # alpha of the Beta distribution; 0 is off
    cutmix: float = 0.0
    probability: float = 1.0  # that a batch is mixed
    switch: float = 0.5  # that a mixed batch gets CutMix where both are on


@dataclass
class OptimizerSettings:
    """The optimizer, by timm's factory."""

    name: str
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float = 0.9  # of sgd, nesterov and rmsprop
    decay_norm_and_bias: bool = False  # whether biases and normalisation layers decay too
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScheduleSettings:
    """The learning rate over the updates; see optim.Schedule."""

    name: Literal["cosine", "multistep", "constant"] = "constant"
    milestones: list[int] = field(default_factory=list)  # epochs
    gamma: float = 0.1
    minimum: float = 0.0
    warmup_epochs: float = 0.0
    warmup_learning_rate: float = 0.0


@dataclass
class TrainingSettings:
    """The loop."""

    epochs: int = 10
    batch_size: int = 32
    sampler: Literal["shuffle", "balanced", "pxk"] = "shuffle"
    samples_per_class: int = 4  # of the pxk sampler
    class_weights: bool = False  # weigh the loss by inverse class frequency; not together with a balanced sampler
    drop_last: bool = False  # leave out an incomplete last batch
    accumulate: int = 1  # batches for one update
    clip: float | None = None  # largest norm of the gradient
    ema: float | None = None  # decay of the moving average of the weights, which is then the one evaluated
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    select: Literal["auto", "best", "last"] = "auto"  # the epoch to keep; auto: best if there is a validation part
    monitor: str = "accuracy_micro"  # what best means, on the validation part; ties go to the lower loss
    patience: int | None = None  # epochs without improvement until training stops
    non_finite_limit: int = 10  # batches in a row with a NaN or infinite loss until training stops
    checkpoint_seconds: float = 120.0  # between checkpoints within an epoch
    checkpoint_updates: int | None = None  # the same, counted in updates
    keep_previous: bool = True  # keep the checkpoint before the last one
    workers: int = 0
    device: str = "auto"
    distributed: Literal["ddp", "fsdp"] = "ddp"  # of several processes: each has the network, or a part of every weight
    sync_batch_norm: bool = False  # normalise by the batch of all processes, not by each one's own part
    threads: int | None = None  # of torch on the CPU; small networks gain little from more than one
    tensorboard: bool = False


@dataclass
class EvaluationSettings:
    """What is measured at the end."""

    batch_size: int | None = None  # twice the training one if not given
    tta: Literal["none", "flips", "dihedral"] = "none"  # 1, 4 or 8 views of each image
    bootstrap: int = 1000  # resamples of the confidence intervals
    worst: int = 16  # mistakes shown
    grad_cam: bool = True
    cost: bool = True


@dataclass
class Recipe:
    """A whole run. `load_recipe` reads one from YAML."""

    optimizer: OptimizerSettings
    name: str = "recipe"
    title: str = ""
    setting: str = ""  # "the paper's setting", or in what way it is not; printed in lists, tables and the report
    notes: str = ""  # printed in the report: where the paper is silent, what is ours
    paper: str = ""
    seed: int = 0
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    augmentation: dict[str, Any] = field(default_factory=dict)  # see models/data, build_augmentation
    mixing: MixingSettings = field(default_factory=MixingSettings)
    loss: dict[str, Any] = field(default_factory=lambda: {"name": "cross_entropy"})  # see losses.build_loss
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    @property
    def split_seed(self) -> int:
        """The seed that the images are split by."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

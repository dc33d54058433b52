"""What the networks of `models/zoo/` share: timm's methods, the head and the initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cellops import DeformConv2d, DepthwiseConv2d, GroupConv1x1

POOLS = ("avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
"""timm's names of what makes one vector of a map; "" keeps the map."""

_HEAD = ("global_pool", "head_drop", "fc")


class Classifier(nn.Module):
    """A convolutional network with a linear head, with the methods and attributes of timm's networks.

    A subclass registers its layers in the order in which they run, `stages` (a sequence of sequences of blocks) among
    them, lists in `feature_info` the maps that can be had, and calls `make_head` at the end of its `__init__`.
    """

    num_features: int
    head_hidden_size: int
    num_classes: int
    in_chans: int
    drop_rate: float
    feature_info: list[dict[str, Any]]
    stages: nn.Sequential
    grad_checkpointing = False
    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]

    def make_head(self, in_chans: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        """Add pooling, dropout and a linear layer, none for 0 classes, and draw all weights.

        Raises:
            ValueError: `global_pool` is unknown, or "" with a linear layer behind it.
        """
        self.in_chans, self.drop_rate = in_chans, drop_rate
        self.num_features = self.feature_info[-1]["num_chs"]
        self._make_pool(global_pool, num_classes)
        self.head_drop = nn.Dropout(drop_rate)
        self._make_classifier(num_classes)
        self._draw()

    def _make_pool(self, global_pool: str, num_classes: int) -> None:
        if global_pool not in ("", *POOLS):
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, ('', *POOLS)))}, got {global_pool!r}")
        if not global_pool and num_classes:
            raise ValueError(f"global_pool must not be '' where a linear layer follows: num_classes is {num_classes}")
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def _make_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        like = next(self.parameters())
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            self.fc = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            self._draw_classifier()

    def _draw_classifier(self) -> None:
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    def _draw(self) -> None:
        initialize(self)
        for norm in self.last_norms():
            nn.init.zeros_(norm.weight)

    def last_norms(self) -> Iterator[nn.BatchNorm2d]:
        """Normalisations that start at 0, so that a block starts as its shortcut; a subclass may have some."""
        return iter(())

    def init_weights(self) -> None:
        """Draw all weights anew and reset all statistics, as after construction; what `to_empty` left undefined too."""
        reset_parameters(self)
        self._draw_classifier()
        self._draw()

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        """What runs ahead of the head, in its order."""
        return ((name, child) for name, child in self.named_children() if name not in _HEAD)

    def _flat_layers(self) -> Iterator[tuple[str, nn.Module]]:
        """The same with the layers of sequences one by one."""
        for name, layer in self._layers():
            if isinstance(layer, nn.Sequential):
                yield from ((f"{name}.{i}", inner) for i, inner in enumerate(layer))
            else:
                yield name, layer

    def _around_stages(self) -> tuple[list[str], list[str]]:
        """Names of the layers before and behind the stages."""
        names = [name for name, _ in self._layers()]
        return names[: names.index("stages")], names[names.index("stages") + 1 :]

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            return stage(x)
        for block in stage.children():
            x = checkpointed(block, x)
        return x

    def _taken(self, indices: int | Sequence[int] | None) -> list[int]:
        """Indices of `feature_info`, none of them negative."""
        levels = len(self.feature_info)
        some = range(levels) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not some or not all(-levels <= index < levels for index in some):
            raise ValueError(f"indices must be of the {levels} maps in feature_info, got {indices}")
        return [index % levels for index in some]

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, num_features, h, w]."""
        for name, layer in self._layers():
            if name == "stages" and self.grad_checkpointing:
                for stage in layer.children():
                    x = self._run(stage, x)
            else:
                x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, num_features, h, w] -> logits [N, num_classes], or the [N, head_hidden_size] before the linear layer."""
        pooled = self.head_drop(self.global_pool(x))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that `feature_info` lists.

        Args:
            x: [N, in_chans, H, W].
            indices: of the maps, from the end if negative; a number for so many at the end; None for all.
            norm: whether the last stage's map goes through the layers behind it, where there are any.
            stop_early: whether to leave out what follows the last of the maps.
            output_fmt: "NCHW".
            intermediates_only: whether to return the maps alone.

        Returns:
            The list of the maps [N, num_chs, h, w], or what `forward_features` returns and the list.

        Raises:
            ValueError: `output_fmt` is another layout, or an index is out of range.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken = self._taken(indices)
        last = max(taken)
        wanted = {self.feature_info[i]["module"]: i for i in taken}
        found: dict[int, Tensor] = {}
        for name, layer in self._flat_layers():
            x = self._run(layer, x) if name.startswith("stages.") else layer(x)
            if name in wanted:
                found[wanted[name]] = x
            if stop_early and last in found and not norm:
                break
        if norm and last == len(self.feature_info) - 1:
            found[last] = x
        maps = [found[i] for i in sorted(found)]
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for some maps; without a head where stages are dropped.

        Args:
            indices: of the maps, as there.
            prune_norm: whether to drop the layers behind the stages.
            prune_head: whether to drop pooling and classifier.

        Returns:
            The indices, none of them negative.

        Raises:
            ValueError: an index is out of range.
        """
        taken = self._taken(indices)
        last = max(taken)
        before, behind = self._around_stages()
        kept = self.feature_info[last]["module"]
        shortened = last < len(self.feature_info) - 1
        if (layer := kept.partition(".")[0]) in before:
            self.stages = nn.Sequential()
            for name in before[before.index(layer) + 1 :]:
                setattr(self, name, nn.Identity())
        else:
            self.stages = self.stages[: int(kept.removeprefix("stages.")) + 1]
        if prune_norm or shortened:
            for name in behind:
                setattr(self, name, nn.Identity())
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks keep their input alone in training, and compute the rest again in backward."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by which timm counts layers: the stem, blocks (stages if `coarse`), the head."""
        before, behind = self._around_stages()
        block = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        blocks: list[tuple[str, tuple[int] | None]] = [(block, None)]
        if behind:
            blocks.append((rf"^(?:{'|'.join(behind)})\.", (99999,)))  # timm's number for the layer before
        return {"stem": rf"^(?:{'|'.join(before)})\.", "blocks": blocks}

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The linear layer, or an identity where there are no classes; or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a new one, or by an identity for 0 classes.

        Args:
            num_classes: width of the logits.
            global_pool: one of `POOLS`; "" for the map itself, without classes; None for the present one.

        Raises:
            ValueError: `global_pool` is unknown, or "" with a linear layer behind it.
        """
        self._make_pool(self.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        self._make_classifier(num_classes)


def reset_parameters(network: nn.Module) -> None:
    """Have every module draw its weights and reset its statistics; parents last, for they may draw their children's."""
    for module in reversed(list(network.modules())):
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def check_output_stride(output_stride: int, own: int) -> None:
    """Pixels of the image to one of the last map can't be chosen: the fused layers have no dilation.

    Raises:
        ValueError: `output_stride` is not the network's own.
    """
    if output_stride != own:
        raise ValueError(f"output_stride must be {own}, since no layer can be dilated; got {output_stride}")


def drop_path_rates(depths: Sequence[int], drop_path_rate: float) -> list[list[float]]:
    """Of every block of every stage: from 0 evenly to `drop_path_rate`, as timm has it.

    Raises:
        ValueError: `drop_path_rate` is not from 0 to below 1.
    """
    if not 0 <= drop_path_rate < 1:
        raise ValueError(f"drop_path_rate must be from 0 to below 1, got {drop_path_rate}")
    last, starts = max(sum(depths) - 1, 1), [sum(depths[:i]) for i in range(len(depths))]
    return [
        [drop_path_rate * (start + j) / last for j in range(depth)] for start, depth in zip(starts, depths, strict=True)
    ]


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """What a block returns, computed again in backward; running statistics move once, as they do without."""
    if torch.compiler.is_compiling():  # the compiled program has no second call
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_stay(block)))


@contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    held = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms(block)]
    try:
        for norm, _, _ in held:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, momentum, counter in held:
            norm.momentum, norm.num_batches_tracked = momentum, counter


def initialize(network: nn.Module) -> None:
    """Draw the weights of plain, depthwise, grouped and deformable convolutions as He et al. 2015 do, by their outputs.

    What a module of cellops initialises for a reason is left alone: offsets start near zero, funnels near linear.
    """
    for module in network.modules():
        own = type(module).__module__.startswith("cellops.nn")
        if isinstance(module, DeformConv2d):
            _draw(module.weight, module.groups)
        for child in module.children():
            if isinstance(child, nn.Conv2d) and (not own or isinstance(module, (DepthwiseConv2d, GroupConv1x1))):
                _draw(child.weight, child.groups)


def _draw(weight: Tensor, groups: int) -> None:
    fan_out = weight.shape[0] // groups * math.prod(weight.shape[2:])
    nn.init.normal_(weight, std=math.sqrt(2 / fan_out))


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Every batch normalisation, those inside modules of cellops too."""
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]

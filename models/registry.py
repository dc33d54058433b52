"""One registry of networks from three sources: written here on the ops of cellops, timm's and torchvision's.

A network is added by one file in `models/zoo/` with one function under `register_network`; it is then known to
`create_model`, to `timm.create_model` and to `cellops models`.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

SOURCES = ("cellops", "timm", "torchvision")

Builder = Callable[..., nn.Module]
Config = dict[str, Any]
"""What timm calls a default_cfg."""


@dataclass(frozen=True)
class Entry:
    """A network: its name, where its code comes from, and `build(num_classes, in_chans, pretrained, **options)`."""

    name: str
    source: str
    build: Builder


_entries: dict[str, Entry] = {}


def add(name: str, source: str, build: Builder) -> None:
    """Make a network known; `register_network` does so for those written here.

    Raises:
        ValueError: the source is unknown, or the name is taken by another function.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(map(repr, SOURCES))}, got {source!r}")
    known = _entries.get(name)
    if known is not None and _identity(known.build) != _identity(build):
        raise ValueError(f"name must be new, but {name!r} is a network of {known.source}")
    _entries[name] = Entry(name, source, build)


def _identity(build: Builder) -> tuple[Any, ...]:
    """Tells functions apart, but not those of a module that is loaded again."""
    return getattr(build, "__module__", None), getattr(build, "__qualname__", None)


def register_network(*, takes_pretrained: bool = False, **config: Any) -> Callable[[Builder], Builder]:
    """A decorator: the function `name(num_classes, in_chans, **options)` builds the network `name`.

    Args:
        takes_pretrained: the function takes `pretrained` as well, because weights for it can be had somewhere.
        config: what differs from timm's defaults in the network's `default_cfg`: `input_size`, `mean`, `std`,
            `first_conv`, `classifier`, ...
    """

    def register(build: Builder) -> Builder:
        name = build.__name__
        default_cfg = {**timm.models.PretrainedCfg(architecture=name).to_dict(), **config}

        def entry_point(
            num_classes: int = 1000, in_chans: int = 3, pretrained: bool = False, **options: Any
        ) -> nn.Module:
            if takes_pretrained:
                options["pretrained"] = pretrained
            elif pretrained:
                raise ValueError(f"pretrained must be False for {name!r}: no weights of it have been published")
            model = build(num_classes, in_chans, **options)
            model.default_cfg = model.pretrained_cfg = {**default_cfg, "num_classes": num_classes}
            return model

        entry_point.__module__, entry_point.__qualname__ = build.__module__, build.__qualname__
        add(name, "cellops", entry_point)
        _register_with_timm(name, entry_point, default_cfg)
        return build

    return register


def _register_with_timm(name: str, entry_point: Builder, default_cfg: Config) -> None:
    """`timm.create_model(name)` shall build it, and `timm.list_models` list it.

    timm reads the configuration from `default_cfgs` of the function's module, and keeps that module's `__all__`.
    """

    def timm_entry_point(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        **options: Any,
    ) -> nn.Module:
        return entry_point(pretrained=pretrained, **options)

    timm_entry_point.__name__ = timm_entry_point.__qualname__ = name
    timm_entry_point.__module__ = entry_point.__module__
    module = sys.modules[entry_point.__module__]
    vars(module).setdefault("default_cfgs", {})[name] = default_cfg
    if not timm.is_model(name):
        timm.models.register_model(timm_entry_point)


def entry(name: str) -> Entry:
    """The network of this name; of timm's also `name.tag`, which chooses weights.

    Raises:
        ValueError: no network has this name.
    """
    importlib.import_module("cellops.models.zoo")
    known = _entries.get(name)
    if known is None and (base := _entries.get(name.partition(".")[0])) is not None and base.source == "timm":
        known = base
    if known is None:
        close = difflib.get_close_matches(name, _entries)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"name must be one of cellops.models.list_models(), got {name!r}{hint}")
    return known


def list_models(source: str | None = None) -> list[str]:
    """Names of all networks, or of those from "cellops", "timm" or "torchvision".

    Raises:
        ValueError: the source is unknown.
    """
    if source is not None and source not in SOURCES:
        raise ValueError(f"source must be None or one of {', '.join(map(repr, SOURCES))}, got {source!r}")
    importlib.import_module("cellops.models.zoo")
    return [name for name, known in _entries.items() if source in (None, known.source)]


def model_source(name: str) -> str:
    """Where a network's code comes from: "cellops", "timm" or "torchvision".

    Raises:
        ValueError: no network has this name.
    """
    return entry(name).source


def create_model(
    name: str, num_classes: int = 1000, pretrained: bool = False, in_chans: int = 3, **options: Any
) -> nn.Module:
    """Build a network that maps [N, in_chans, H, W] to logits [N, num_classes].

    Args:
        name: one of `list_models()`; of timm's also with a tag that chooses weights, "convnext_base.fb_in22k".
        num_classes: width of the logits; 0 leaves the classifier out, as timm does.
        pretrained: whether to start from published weights, which are fetched from the network.
        in_chans: channels of the images.
        options: what the network takes beside (`depths`, `drop_rate`, ...).

    Raises:
        ValueError: an argument is wrong, or `pretrained` is asked of a network that has no published weights.
        RuntimeError: the published weights could not be had.
    """
    known = entry(name)
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")
    if known.source == "timm":
        options["name"] = name
    if not pretrained:
        return known.build(num_classes=num_classes, in_chans=in_chans, **options)
    try:
        return known.build(num_classes=num_classes, in_chans=in_chans, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"the weights of {name!r} ({known.source}) could not be had: {error}; pretrained=False draws new ones"
        ) from error

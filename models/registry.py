"""One registry of networks from three sources: written here on the ops of cellops, timm's and torchvision's.

A network is added by one file in `models/zoo/` with one function under `register_network`; it is then known to
`create_model`, to `timm.create_model` and to `cellops models`.
"""

from __future__ import annotations

import difflib
import functools
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


def register_network(
    *, takes_pretrained: bool = False, feature_cfg: Config | None = None, **config: Any
) -> Callable[[Builder], Builder]:
    """A decorator: the function `name(num_classes, in_chans, **options)` builds the network `name`.

    timm's `features_only`, `out_indices`, `feature_cls`, `pretrained_cfg` and `pretrained_cfg_overlay` are taken as
    well, from any network that has a `feature_info` as timm's have.

    Args:
        takes_pretrained: the function takes `pretrained` as well, because weights for it can be had somewhere.
        feature_cfg: what timm's feature extractors shall be given: `flatten_sequential`, `feature_cls`, ...
        config: what differs from timm's defaults in the network's `default_cfg`: `input_size`, `mean`, `std`,
            `first_conv`, `classifier`, ...
    """

    def register(build: Builder) -> Builder:
        name = build.__name__
        default_cfg = {**timm.models.PretrainedCfg(architecture=name).to_dict(), **config}

        def entry_point(
            pretrained: bool = False,
            pretrained_cfg: Any = None,
            pretrained_cfg_overlay: Config | None = None,
            cache_dir: Any = None,
            **options: Any,
        ) -> nn.Module:
            check_counts(**{key: options[key] for key in ("num_classes", "in_chans") if key in options})
            found = timm.models.resolve_pretrained_cfg(name, pretrained_cfg or default_cfg, pretrained_cfg_overlay)
            from_file = bool(found.has_weights or found.state_dict)
            if pretrained and not (from_file or takes_pretrained):
                raise ValueError(f"pretrained must be False for {name!r}: no weights of it have been published")
            with_own = functools.partial(build, pretrained=pretrained and not from_file) if takes_pretrained else build
            return _build_by_timm(
                with_own,
                name,
                pretrained=pretrained and from_file,
                pretrained_cfg=found,
                feature_cfg=feature_cfg or {},
                cache_dir=cache_dir,
                **options,
            )

        for attribute in ("__module__", "__name__", "__qualname__"):
            setattr(entry_point, attribute, getattr(build, attribute))
        add(name, "cellops", entry_point)
        _register_with_timm(entry_point, default_cfg)
        return build

    return register


TIMMS = {"num_classes", "in_chans", "img_size", "features_only", "out_indices", "feature_cls", "pretrained_model_args"}
"""Options that timm's builder looks at; others are the network's alone."""


def _build_by_timm(
    build: Builder,
    name: str,
    /,
    *,
    pretrained: bool,
    pretrained_cfg: Any,
    feature_cfg: Config,
    cache_dir: Any,
    **options: Any,
) -> nn.Module:
    """The network, or its feature extractor with `features_only`, with its configuration, and weights if it names any.

    Raises:
        ValueError: `features_only` is asked of a network without `feature_info`, or `out_indices` are not in it.
    """
    features_only, wanted = options.get("features_only", False), options.get("out_indices")
    feature_cfg = {"out_indices": (), **feature_cfg}  # known when the network is there
    of_network = {key: options.pop(key) for key in set(options) - TIMMS}
    asked: list[int] = []

    def construct(num_classes: int, in_chans: int, **arguments: Any) -> nn.Module:
        asked.append(num_classes)
        model = build(num_classes, in_chans, **{**arguments, **of_network})
        if features_only:
            levels = len(getattr(model, "feature_info", ()))
            if not levels:
                raise ValueError(f"features_only must be False for {name!r}: it has no feature_info")
            indices = range(-wanted, 0) if isinstance(wanted, int) else range(levels) if wanted is None else wanted
            if not all(-levels <= index < levels for index in indices):
                raise ValueError(f"out_indices must be below {levels} for {name!r}, got {wanted}")
            feature_cfg["out_indices"] = tuple(indices)
        return model

    configs = {"pretrained_cfg": pretrained_cfg, "feature_cfg": feature_cfg, "cache_dir": cache_dir}
    model = timm.models.build_model_with_cfg(construct, name, pretrained, **configs, **options)
    if not (features_only or pretrained):  # else it is the configuration of what was loaded
        model.default_cfg["num_classes"] = asked[0]
    return model


def _register_with_timm(entry_point: Builder, default_cfg: Config) -> None:
    """`timm.create_model(name)` shall build it, and `timm.list_models` list it.

    timm reads the configuration from `default_cfgs` of the function's module, and keeps that module's `__all__`.
    """
    module = sys.modules[entry_point.__module__]
    vars(module).setdefault("default_cfgs", {})[entry_point.__name__] = default_cfg
    if not timm.is_model(entry_point.__name__):
        timm.models.register_model(entry_point)


def check_counts(num_classes: int = 1, in_chans: int = 1) -> None:
    """Raise where one cannot be.

    Raises:
        ValueError: `num_classes` is negative, or `in_chans` is not positive.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")
    if in_chans < 1:
        raise ValueError(f"in_chans must be at least 1, got {in_chans}")


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
    check_counts(num_classes, in_chans)
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

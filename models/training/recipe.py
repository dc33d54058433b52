"""Recipes: YAML files with strict keys.

A file holds the sections of `settings.Recipe` and may hold three more keys:

    extends: NAME or FILE     the sections of that recipe, changed by those of this one
    variants: {NAME: {...}}   one recipe for each name, changed further; the file itself is then only their common part
    twins: {SUFFIX: {...}}    for each recipe of the file also one NAME_SUFFIX, changed so

Mappings are merged key by key and `null` takes a key of `loss`, `augmentation` or `arguments` away. A `loss`,
`optimizer` or `schedule` with another `name` starts anew.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cellops.models.training.settings import Recipe

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
STRUCTURE = ("extends", "variants", "twins")
STARTS_ANEW = ("loss", "optimizer", "schedule")
MOST_VALUES = 50_000  # of a file; an alias of an alias of an alias can ask for billions
UNSHARDABLE_OPTIMIZERS = ("adamp",)  # torch cannot project parts of weights
FREE = ("loss", "augmentation", "model.arguments", "optimizer.arguments", "data.options")


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the text says which key and what would do."""


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number, only true and false as booleans, and no key twice."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool",)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):  # others cannot be keys, as is said below
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", node.start_mark
                )
            keys.add(key.value)
    loader.flatten_mapping(node)  # what << brings in comes first, so that the mapping's own keys win
    pairs = [(loader.construct_object(key, deep=True), value) for key, value in node.value]
    return {key: loader.construct_object(value, deep=True) for key, value in pairs}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text.

    Raises:
        RecipeError: it is not YAML, which names the source, line and column; or it has too many values, those that an
            alias repeats among them, or is nested too deeply.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        waiting, count = [node], 0
        while waiting:
            count += 1
            if count > MOST_VALUES:
                raise RecipeError(f"{source} has more than {MOST_VALUES:,} values")
            value = waiting.pop().value
            for part in value if isinstance(value, list) else ():
                waiting += part if isinstance(part, tuple) else (part,)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{source} is nested too deeply") from None
    finally:
        loader.dispose()


# Finding one shipped recipe by name reads every family, and lists read each many times.
_parsed = functools.cache(parse_yaml)


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint ", did you mean ...?" or the names there are."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "none is known"


def _type_name(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(wanted)))
    if typing.get_origin(wanted) in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in typing.get_args(wanted))
    if typing.get_origin(wanted) is list:
        return f"a list, each {_type_name(typing.get_args(wanted)[0])}"
    if typing.get_origin(wanted) is dict:
        return "a mapping"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}.get(wanted, str(wanted))


def _convert(value: Any, wanted: Any, where: str) -> Any:
    """The value as the wanted type, or a RecipeError that names the key."""
    origin = typing.get_origin(wanted)
    if origin in (types.UnionType, typing.Union):
        parts = typing.get_args(wanted)
        if value is None and type(None) in parts:
            return None
        return _convert(value, next(part for part in parts if part is not type(None)), where)
    if dataclasses.is_dataclass(wanted):
        return _build(typing.cast(type, wanted), value, where)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and not math.isfinite(value):
        raise RecipeError(f"{where} must be a finite number, got {value!r}")
    if origin is typing.Literal and isinstance(value, str):
        if value in typing.get_args(wanted):
            return value
        raise RecipeError(f"{where}: {value!r} is not known, {nearest(value, typing.get_args(wanted))}")
    if origin is list:
        (part,) = typing.get_args(wanted)
        if where.endswith("_size") and number:
            value = [value, value]
        if isinstance(value, list):
            return [_convert(item, part, f"{where}[{place}]") for place, item in enumerate(value)]
    if (origin is dict or wanted is dict) and isinstance(value, Mapping):
        return copy.deepcopy(dict(value))
    if wanted is float and number:
        return float(value)
    if wanted is int and number and value == int(value):
        return int(value)
    if wanted in (bool, str) and isinstance(value, wanted):
        return value
    if wanted is str and number:
        return str(value)
    raise RecipeError(f"{where} must be {_type_name(wanted)}, got {value!r}")


def _build(kind: type, values: Any, where: str) -> Any:
    """An instance of a settings class from a mapping."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where or 'a recipe'} must be a mapping of keys to values, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in known:
            raise RecipeError(f"unknown key {prefix}{key}: {nearest(str(key), known)}")
    for name, entry in known.items():
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING and name not in values:
            raise RecipeError(f"{prefix}{name} is missing")
    return kind(**{key: _convert(value, hints[key], prefix + key) for key, value in values.items()})


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`base` with `changes` laid over it, by the rules of this file's first lines."""
    result = dict(copy.deepcopy(dict(base)))
    for key, value in changes.items():
        path = f"{where}.{key}" if where else key
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            anew = path in STARTS_ANEW and value.get("name", old.get("name")) != old.get("name")
            result[key] = copy.deepcopy(dict(value)) if anew else merge(old, value, path)
        elif value is None and where in FREE:
            result.pop(key, None)
        else:
            result[key] = copy.deepcopy(value)
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    values = _parsed(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is no recipe: it must be a mapping with sections such as data, model, training")
    return copy.deepcopy(values)


def _recipes_of(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, dict[str, Any]]:
    """Every recipe of a file by name, extended and changed but not yet checked; the file's own is under its stem."""
    if path in seen:
        raise RecipeError(f"{path} extends itself: {' -> '.join(map(str, (*seen, path)))}")
    values = _read(path)
    base: dict[str, Any] = {}
    if "extends" in values:
        base = _find(str(values["extends"]), path.parent, (*seen, path))
        base.pop("abstract")
    structure = {key: values.pop(key, None) for key in STRUCTURE}
    for key in ("variants", "twins"):
        if not isinstance(structure[key] or {}, Mapping):
            raise RecipeError(f"{path}: {key} must be a mapping, got {structure[key]!r}")
    own = merge(base, values)
    own["name"] = values.get("name", path.stem)
    found = {path.stem: own}
    for name, changes in (structure["variants"] or {}).items():
        found[name] = {**merge(own, changes or {}), "name": name}
    own["abstract"] = bool(structure["variants"])
    for suffix, changes in (structure["twins"] or {}).items():
        for name, recipe in list(found.items()):
            if not recipe.get("twin"):
                found[f"{name}_{suffix}"] = {**merge(recipe, changes or {}), "name": f"{name}_{suffix}", "twin": True}
    return found


def _ready(values: Mapping[str, Any], abstract: bool) -> dict[str, Any]:
    """Without the marks of this file, but for whether it is only the common part of others."""
    return {**{key: value for key, value in values.items() if key not in ("abstract", "twin")}, "abstract": abstract}


def _shipped() -> list[Path]:
    return sorted(FOLDER.glob("*.yaml"))


def _find(name: str, beside: Path | None = None, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The unchecked values of a recipe by name or file."""
    for folder in (beside, Path.cwd()):
        path = Path(name) if folder is None else folder / name
        if Path(name).suffix in (".yaml", ".yml") and path.is_file():
            return _ready(_recipes_of(path.resolve(), seen)[path.stem], abstract=False)
    if Path(name).suffix in (".yaml", ".yml") or "/" in name:
        raise RecipeError(f"there is no recipe file {name}")
    own = FOLDER / f"{name}.yaml"
    for path in ([own] if own.is_file() else []) or _shipped():
        found = _recipes_of(path.resolve(), seen) if path.resolve() not in seen else {}
        if name in found:
            return _ready(found[name], abstract=bool(found[name].get("abstract")) and not seen)
    raise RecipeError(f"there is no recipe {name!r}: {nearest(name, recipe_names())}")


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(
        name
        for path in _shipped()
        for name, values in _recipes_of(path.resolve()).items()
        if not values.get("abstract")
    )


def recipe_families() -> dict[str, dict[str, dict[str, Any]]]:
    """The shipped recipes by file: name -> title, setting, paper, and `twin` for those that are made from others."""
    families: dict[str, dict[str, dict[str, Any]]] = {}
    for path in _shipped():
        for name, values in _recipes_of(path.resolve()).items():
            if not values.get("abstract"):
                told = {key: values.get(key, "") for key in ("title", "setting", "paper", "twin")}
                families.setdefault(path.stem, {})[name] = told
    return families


def _override(values: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c`, in place."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {assignment}: it must read key=value, as in training.epochs=5")
    value = parse_yaml(text, f"the value of {path}")
    section = values
    for depth, key in enumerate(keys[:-1]):
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {assignment}: {'.'.join(keys[: depth + 1])} is no section")
    if value is None and any(".".join(keys[:-1]) == free for free in FREE):
        section.pop(keys[-1], None)
    else:
        section[keys[-1]] = value


def build_recipe(values: Mapping[str, Any]) -> Recipe:
    """A checked recipe from the plain values that a YAML file holds.

    Raises:
        RecipeError: a key is unknown or missing, or a value is of the wrong kind or out of range; names the key.
    """
    recipe = _build(Recipe, values, "")
    training, data, mixing = recipe.training, recipe.data, recipe.mixing
    rules: Sequence[tuple[str, bool, str]] = [
        ("training.epochs", training.epochs >= 1, "must be at least 1"),
        (
            "name",
            bool(recipe.name) and recipe.name not in (".", "..") and not set("/\\\0") & set(recipe.name),
            "must be a plain name, of which a folder is made",
        ),
        ("training.batch_size", training.batch_size >= 1, "must be at least 1"),
        ("training.accumulate", training.accumulate >= 1, "must be at least 1"),
        ("training.threads", training.threads is None or training.threads >= 1, "must be at least 1"),
        ("training.workers", training.workers >= 0, "must be at least 0"),
        ("training.ema", training.ema is None or 0 < training.ema < 1, "must lie between 0 and 1"),
        ("training.clip", training.clip is None or training.clip > 0, "must be above 0"),
        ("training.non_finite_limit", training.non_finite_limit >= 1, "must be at least 1"),
        ("training.patience", training.patience is None or training.patience >= 1, "must be at least 1"),
        (
            "training.class_weights",
            not (training.class_weights and training.sampler != "shuffle"),
            f"and training.sampler: {training.sampler} both balance the classes; take one of them",
        ),
        (
            "training.patience",
            training.patience is None or data.validation > 0,
            "needs a validation part: set data.validation, for example to 0.15",
        ),
        (
            "training.select",
            training.select != "best" or data.validation > 0,
            "best needs a validation part: set data.validation, for example to 0.15",
        ),
        (
            "training.distributed",
            training.distributed != "fsdp" or training.precision != "float16",
            "fsdp does not go with training.precision: float16, whose scale would differ between the parts; "
            "take bfloat16",
        ),
        (
            "training.distributed",
            training.distributed != "fsdp" or not training.compile,
            "fsdp does not go with training.compile",
        ),
        (
            "training.distributed",
            training.distributed != "fsdp" or recipe.optimizer.name not in UNSHARDABLE_OPTIMIZERS,
            f"fsdp does not go with optimizer.name: {recipe.optimizer.name}, which needs whole weights; take adamw",
        ),
        ("optimizer.learning_rate", recipe.optimizer.learning_rate > 0, "must be above 0"),
        ("optimizer.weight_decay", recipe.optimizer.weight_decay >= 0, "must not be negative"),
        ("data.folds", data.folds >= 1, "must be at least 1"),
        ("data.validation", 0 <= data.validation < 1, "must lie in [0, 1)"),
        ("data.split_seed", data.split_seed is None or data.split_seed >= 0, "must not be negative"),
        ("data.train_fraction", 0 < data.train_fraction <= 1, "must lie in (0, 1]"),
        ("data.test_fraction", data.test_fraction is None or 0 < data.test_fraction < 1, "must lie in (0, 1)"),
        (
            "data.test_fraction",
            data.test_fraction is None or data.folds == 1,
            f"is of a single split, but data.folds is {data.folds}",
        ),
        ("mixing.mixup", mixing.mixup >= 0, "must not be negative"),
        ("mixing.cutmix", mixing.cutmix >= 0, "must not be negative"),
        ("mixing.probability", 0 <= mixing.probability <= 1, "must lie in [0, 1]"),
        (
            "evaluation.batch_size",
            recipe.evaluation.batch_size is None or recipe.evaluation.batch_size >= 1,
            "must be at least 1",
        ),
        ("evaluation.worst", recipe.evaluation.worst >= 0, "must not be negative"),
        ("evaluation.bootstrap", recipe.evaluation.bootstrap >= 0, "must not be negative"),
    ]
    for name, size in (("input_size", data.input_size), ("store_size", data.store_size or [1, 1])):
        if len(size) != 2 or min(size) < 1:
            raise RecipeError(f"data.{name} must be one or two positive integers (height, width), got {size}")
    for key, holds, text in rules:
        if not holds:
            raise RecipeError(f"{key} {text}")
    return recipe


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a file, and apply overrides such as `training.epochs=5`.

    Raises:
        RecipeError: there is none, or a key or value is wrong; the text says what would do.
    """
    values = _find(str(name))
    if values.pop("abstract"):
        names = [known for known, found in _recipes_of(FOLDER / f"{name}.yaml").items() if not found.get("abstract")]
        raise RecipeError(f"{name} is a family of recipes, take one of: {', '.join(sorted(names))}")
    for assignment in overrides:
        _override(values, assignment)
    return build_recipe(values)


def overridden(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe with settings changed, such as `training.epochs=5`.

    Raises:
        RecipeError: a key or value is wrong.
    """
    values = recipe_values(recipe)
    for assignment in overrides:
        _override(values, assignment)
    return build_recipe(values)


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The plain values of a recipe, every default written out."""
    return dataclasses.asdict(recipe)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML text that `load_recipe` reads back."""
    return yaml.safe_dump(recipe_values(recipe), sort_keys=False, allow_unicode=True, width=110)
